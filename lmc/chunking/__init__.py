"""Chunkers: where a token list is cut into the runs that are stored and looked up as one."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from lmc.registry import Registry


class Chunker(Protocol):
    """A frozen dataclass that decides cuts. Two rules make its chunks reusable:

    appending tokens never changes a cut already made, and a cut is made from token ids alone.

    It may have `cuts_within(tokens, regions)`, where that is cheaper than the `cuts` of each.

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
    has=["cuts", "longest_chunk"],
)
