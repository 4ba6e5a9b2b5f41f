"""Content-defined chunking of token ids.

The idea is Rabin's (fingerprinting by random polynomials, 1981): let the content, not the offset,
say where to cut, so that an insertion moves cuts and does not change them. The rule is local
minimum chunking (Bjorner, Blass, Gurevich, "Content-dependent chunking for differential
compression, the local maximum approach", JCSS 2010), which needs no divisor and no minimum length:
two cuts are always more than a window apart. FastCDC (Xia et al., ATC 2016) is the relative that
storage systems use; its minimum length makes cuts depend on earlier cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

AT_ONCE = 1 << 13  # positions looked at together, so that they stay in the processor's cache


@dataclass(frozen=True)
class Cdc:
    """Cut where the hash of the last few token ids is a local minimum.

    A position p is a cut iff the hash of the `hash_tokens` ids that end at p is smaller than the
    hash at each of the `window` positions to its left and not larger than at each of the `window`
    positions to its right (of equal ones the leftmost wins). All of these must exist, so a cut is
    a function of ids `[p - hash_tokens - window, p + window)` and of nothing else.

    n: tokens of a chunk, on average; `window` is half of it, and a chunk has more tokens than that.
    hash_tokens: ids that are hashed at a position.
    max_tokens: the longest chunk, default 8 windows and at least 256. Text without a local minimum
        (one token repeated) is cut at this length after the previous cut; only these cuts depend on
        what came before.

    Raises ValueError for n or hash_tokens below 1, or max_tokens not above the window.
    """

    n: int = 33
    hash_tokens: int = 4
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1 or self.hash_tokens < 1:
            raise ValueError(f"got n {self.n} and hash_tokens {self.hash_tokens}, want at least 1")
        if self.longest_chunk <= self.window:
            raise ValueError(
                f"got max_tokens {self.max_tokens}, want more than half of n, {self.window}"
            )

    @property
    def window(self) -> int:
        """Positions on either side of a cut whose hash is not smaller."""
        return max(self.n // 2, 1)

    @property
    def longest_chunk(self) -> int:
        return max(256, 8 * self.window) if self.max_tokens is None else self.max_tokens

    def cuts(self, tokens: np.ndarray) -> np.ndarray:
        """tokens [T] -> end positions of the closed chunks, ascending, each in (0, T]."""
        return self.cuts_within(tokens, [(0, len(tokens))])[0]

    def cuts_within(
        self, tokens: np.ndarray, regions: Sequence[tuple[int, int]]
    ) -> list[np.ndarray]:
        """The cuts of regions `[start, end)` of tokens [T], each cut as if it stood alone.

        What is near a region's border depends on what is behind it, so no minimum is known there.
        """
        minima = self._minima(tokens)
        starts, ends = np.array(regions, np.int64).reshape(-1, 2).T
        first = np.searchsorted(minima, starts + self.window + self.hash_tokens)
        last = np.searchsorted(minima, ends - self.window, "right")
        return [
            self._forced(minima[a:b], start, end)
            for (start, end), a, b in zip(regions, first.tolist(), last.tolist(), strict=True)
        ]

    def _forced(self, minima: np.ndarray, start: int, end: int) -> np.ndarray:
        """The cuts of one region: its minima, and where they are too far apart, more."""
        # A position is decided once `window` tokens follow it, and a forced cut stands once all
        # positions before it are: appended tokens may still bring a minimum there.
        undecided = end - self.window + 1
        borders = [start, *minima.tolist(), undecided + 1]
        longest = self.longest_chunk
        if all(b - a <= longest for a, b in pairwise(borders)):
            return minima
        found: list[int] = []
        for last, p in pairwise(borders):
            found += range(last + longest, p, longest)
            found.append(p)
        return np.array(found[:-1], dtype=np.int64)

    def _minima(self, tokens: np.ndarray) -> np.ndarray:
        """Positions of tokens [T] that are local minima, ascending."""
        w, k = self.window, self.hash_tokens
        found = [
            self._minima_of(tokens[p - w - k : p + AT_ONCE - 1 + w]) + p
            for p in range(w + k, len(tokens) - w + 1, AT_ONCE)
        ]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _minima_of(self, tokens: np.ndarray) -> np.ndarray:
        """The minima of a few tokens, counted from the first position that can be one."""
        w, k = self.window, self.hash_tokens
        n = len(tokens) - k + 1  # hashes[i] belongs to position i + k
        ids = tokens.astype(np.uint64)
        hashes = np.zeros(n, dtype=np.uint64)
        for j in range(k):
            hashes ^= ids[j : j + n]
            splitmix64(hashes)
        lowest = _lowest(hashes, w)  # of hashes[i : i + w], [n - w + 1]
        here = hashes[w : n - w]
        return np.flatnonzero((here < lowest[: n - 2 * w]) & (here <= lowest[w + 1 :]))


def _lowest(x: np.ndarray, w: int) -> np.ndarray:
    """The least of each w values in a row, `[len(x) - w + 1]`: of windows that double in width."""
    width = 1
    while 2 * width <= w:
        x = np.minimum(x[:-width], x[width:])
        width *= 2
    return x if width == w else np.minimum(x[: width - w], x[w - width :])


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which each bit depends on all, in place.

    splitmix64 (Steele et al. 2014).
    """
    x += np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
