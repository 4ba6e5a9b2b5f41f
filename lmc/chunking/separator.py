"""Chunks that end with a given token sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


@dataclass(frozen=True)
class Separator:
    """Cut after every occurrence of the token ids `ids`; the separator ends its chunk.

    The ids are those of the separator inside a text: tokenise it between its neighbours, since
    merges may differ from the separator alone.

    Raises ValueError for no ids.
    """

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("got no ids, want the token ids of the separator")

    @property
    def longest_chunk(self) -> int | None:
        return None

    def cuts(self, tokens: np.ndarray) -> np.ndarray:
        """tokens [T] -> end positions of the closed chunks, ascending, each in (0, T]."""
        k = len(self.ids)
        if len(tokens) < k:
            return np.empty(0, dtype=np.int64)
        hits = (sliding_window_view(tokens, k) == np.array(self.ids)).all(axis=1)
        return np.flatnonzero(hits) + k
