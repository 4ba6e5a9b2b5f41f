"""Faults planted in PTX: one of its safeguards less, or an address a little off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# What is dropped, by name: the whole statement, or a part of it.
DROPPED = {
    "barrier": r"\n\s*bar\.sync\s[^;]*;",
    "wait": r"\n\s*(?:cp\.async\.wait_group|wgmma\.wait_group\.sync\.aligned)\s[^;]*;",
    "fence": r"\n\s*fence\.proxy\.async[^;]*;",
    "mask": r"@!?%p\d+\s+(?=(?:ld|st)\.(?:global|shared))",
}
_SHARED = re.compile(r"\.shared\b|\bwgmma\.mma|\b(?:ld|st)matrix\b")
SHIFTED = re.compile(
    r"\b(?:ld|st)\.(?:global|shared)[^;\n]*?\[\s*%\w+(?P<offset>\s*\+\s*\d+)?(?=\s*\])"
)


class Mutant(NamedTuple):
    """A kernel with one fault: what was done, to which line of it as `Totals` names lines, and the
    PTX that came of it."""

    what: str
    line: str
    ptx: str


def mutants(ptx: str, kind: str) -> Iterator[Mutant]:
    """A mutant for each place of a kind.

    kind: a name of DROPPED, or "address": 16 bytes more in a load or a store. Barriers with
    nothing behind them that they could order are left out.
    """
    if kind == "address":
        for match in SHIFTED.finditer(ptx):
            old = int(re.sub(r"\D", "", match["offset"] or "0"))
            first = match.start("offset") if match["offset"] else match.end()
            text = f"{ptx[:first]}+{old + 16}{ptx[match.end() :]}"
            what = f"16 bytes further: {_statement(ptx, match.start())}"
            yield Mutant(what, _line(ptx, match.start()), text)
        return
    for match in re.finditer(DROPPED[kind], ptx):
        if kind == "barrier" and not _orders(ptx[: match.start()], ptx[match.end() :]):
            continue
        begins = match.start() + len(match[0]) - len(match[0].lstrip())
        # A line stays one, so that all others keep their numbers.
        text = ptx[:begins] + ptx[match.end() :]
        what = f"without {' '.join(match[0].split())} in: {_statement(ptx, begins)}"
        yield Mutant(what, _line(ptx, begins), text)


def _line(ptx: str, at: int) -> str:
    kernel = re.search(r"\.entry\s+([\w$]+)", ptx)
    assert kernel is not None
    return f"{kernel[1]}:{ptx.count(chr(10), 0, at) + 1}"


def _statement(ptx: str, at: int) -> str:
    return " ".join(ptx[at : ptx.index(";", at)].split())


def _orders(before: str, behind: str) -> bool:
    """Whether shared memory is touched behind a barrier at all, or a loop goes back over it."""
    back = any(f"{label}:" in before for label in re.findall(r"\bbra(?:\.uni)?\s+([$\w]+)", behind))
    return back or bool(_SHARED.search(behind))
