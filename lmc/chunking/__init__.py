"""Chunkers: where a token list is cut into the runs that are stored and looked up as one."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from lmc.registry import Registry


class Chunker(Protocol):
    """A frozen dataclass that decides cuts. Two rules make its chunks reusable:

    appending tokens never changes a cut already made, and a cut is made from token ids alone.

    longest_chunk: tokens of the longest chunk it closes, or None where there is no limit.
    """

    @property
    def longest_chunk(self) -> int | None: ...

    def cuts(self, tokens: np.ndarray) -> np.ndarray:
        """tokens [T] -> end positions of the closed chunks, ascending, each in (0, T]."""
        ...


CHUNKERS = Registry(
    "chunker",
    {
        "cdc": "lmc.chunking.cdc:Cdc",
        # Spans come with the request (see `pieces.split`); what lies between is cut by cdc.
        "explicit": "lmc.chunking.cdc:Cdc",
        "fixed": "lmc.chunking.fixed:Fixed",
        "separator": "lmc.chunking.separator:Separator",
    },
)


def parse(text: str) -> Chunker:
    """A chunker in a few characters, for command lines.

    `cdc:64` cuts into 64 tokens on average (any positive number), `fixed:256` into 256 each,
    `separator:198,198` behind those ids; a name alone is the chunker's defaults, and
    `module:Class` a chunker of your own with its defaults.

    Raises ValueError for what is none of these.
    """
    name, colon, argument = text.partition(":")
    if name not in CHUNKERS.entries:
        return CHUNKERS.build(text)
    if not colon:
        return CHUNKERS.build(name)
    try:
        numbers = [int(x) for x in argument.split(",")]
        if name == "separator":
            return CHUNKERS.build({"name": name, "ids": numbers})
        (n,) = numbers
    except ValueError:
        raise ValueError(
            f"chunker: got {text!r}, want such as cdc:64, fixed:256 or separator:198,198"
        ) from None
    if name == "fixed":
        return CHUNKERS.build({"name": name, "n": n})
    window = max(n // 2, 1)
    return CHUNKERS.build({"name": name, "window": window, "max_tokens": max(256, 8 * window)})
