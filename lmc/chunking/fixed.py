"""Chunks of one length, counted from the start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fixed:
    """Cut after every n tokens. What engines do for prefixes; found again only on the same grid.

    Raises ValueError for n below 1.
    """

    n: int = 64

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"got n {self.n}, want at least 1")

    @property
    def longest_chunk(self) -> int:
        return self.n

    def cuts(self, tokens: np.ndarray) -> np.ndarray:
        """tokens [T] -> end positions of the closed chunks, ascending, each in (0, T]."""
        return np.arange(self.n, len(tokens) + 1, self.n, dtype=np.int64)
