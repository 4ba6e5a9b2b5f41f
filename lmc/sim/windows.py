"""Windows of w tokens at every offset: the bound that no way of cutting chunks can pass by far."""

from __future__ import annotations

import numpy as np

from lmc.sim.compiled import compiled


@compiled
def window_hashes(tokens: np.ndarray, w: int) -> np.ndarray:
    """tokens [T] -> [max(T - w + 1, 0)] uint64, the hash of the w ids from each position on.

    A polynomial over the mixed ids modulo 2^64 (Karp & Rabin 1987), mixed once more; 0 is kept
    free for `WindowSet`. Two of n different windows collide with probability about n^2 / 2^65.
    """
    n = max(len(tokens) - w + 1, 0)
    hashes = np.empty(n, dtype=np.uint64)
    base = np.uint64(0x9E3779B97F4A7C15)
    oldest = np.uint64(1)
    for _ in range(w):
        oldest = oldest * base
    h = np.uint64(0)
    for i in range(len(tokens)):
        h = h * base + _mix(np.uint64(tokens[i]))
        if i >= w:
            h = h - oldest * _mix(np.uint64(tokens[i - w]))
        if i >= w - 1:
            hashes[i - w + 1] = max(_mix(h), np.uint64(1))
    return hashes


class WindowSet:
    """A set of non-zero uint64 in one array: 8 to 16 bytes a member, millions a second."""

    def __init__(self) -> None:
        self._table = np.zeros(1 << 12, dtype=np.uint64)
        self._used = 0

    def known(self, hashes: np.ndarray) -> np.ndarray:
        """[n] bool: which of hashes [n] are members."""
        return _known(self._table, hashes)

    def add(self, hashes: np.ndarray) -> None:
        """Put all of hashes [n] in."""
        for part in np.array_split(hashes, max(1, len(hashes) // len(self._table))):
            while 2 * (self._used + len(part)) > len(self._table):
                members = self._table[self._table != 0]
                self._table = np.zeros(2 * len(self._table), dtype=np.uint64)
                _insert(self._table, members)
            self._used += _insert(self._table, part)


def covered(hits: np.ndarray, w: int, T: int) -> np.ndarray:
    """[T] bool: the tokens inside any window [i, i + w) with hits[i]."""
    at = np.flatnonzero(hits)
    edges = np.zeros(T + 1, dtype=np.int64)
    edges[at] += 1
    edges[at + w] -= 1
    return np.cumsum(edges[:T]) > 0


@compiled
def greedy(hits: np.ndarray, start: int, w: int) -> np.ndarray:
    """Starts of the windows with hits[i], from `start` on, the first of those that overlap."""
    starts = np.empty(len(hits) // w + 1, dtype=np.int64)
    n, i = 0, start
    while i < len(hits):
        if hits[i]:
            starts[n] = i
            n += 1
            i += w
        else:
            i += 1
    return starts[:n]


@compiled
def _mix(x: np.uint64) -> np.uint64:
    x = (x + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def _known(table: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    mask = np.uint64(len(table) - 1)
    found = np.empty(len(hashes), dtype=np.bool_)
    for i in range(len(hashes)):
        place = hashes[i] & mask
        while table[place] != 0 and table[place] != hashes[i]:
            place = (place + np.uint64(1)) & mask
        found[i] = table[place] != 0
    return found


@compiled
def _insert(table: np.ndarray, hashes: np.ndarray) -> int:
    mask = np.uint64(len(table) - 1)
    added = 0
    for i in range(len(hashes)):
        place = hashes[i] & mask
        while table[place] != 0 and table[place] != hashes[i]:
            place = (place + np.uint64(1)) & mask
        if table[place] == 0:
            table[place] = hashes[i]
            added += 1
    return added
