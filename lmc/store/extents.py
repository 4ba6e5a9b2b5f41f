"""Which units of a row are free: what is taken may be in several runs, so that nothing is lost."""

from __future__ import annotations

import bisect

Run = tuple[int, int]  # [start, end)


class Extents:
    """Free runs of `n` units.

    There is no fragmentation: as long as enough units are free they can be taken, in as few runs
    as there are.
    """

    def __init__(self, n: int) -> None:
        self.free = n
        self._starts: list[int] = [0] if n else []  # of free runs, ascending
        self._ends: dict[int, int] = {0: n} if n else {}  # by start
        self._by_length: list[tuple[int, int]] = [(n, 0)] if n else []  # (length, start)

    def take(self, k: int) -> list[Run] | None:
        """`k` units: the smallest free run that has them, else the largest runs; None if too few.

        Runs are given in the order of their places.
        """
        if k > self.free:
            return None
        taken: list[Run] = []
        while k:
            at = bisect.bisect_left(self._by_length, (k, 0))
            length, start = self._by_length[min(at, len(self._by_length) - 1)]
            n = min(k, length)
            self._remove(start)
            if n < length:
                self._insert(start + n, start + length)
            taken.append((start, start + n))
            self.free -= n
            k -= n
        return sorted(taken)

    def give(self, runs: list[Run]) -> None:
        """Give back what was taken."""
        for start, end in runs:
            at = bisect.bisect_right(self._starts, start)
            before = self._starts[at - 1] if at else None
            behind = self._starts[at] if at < len(self._starts) else None
            assert before is None or self._ends[before] <= start, "given back twice"
            assert behind is None or end <= behind, "given back twice"
            self.free += end - start
            if behind == end:
                end = self._ends[behind]
                self._remove(behind)
            if before is not None and self._ends[before] == start:
                self._remove(before)
                start = before
            self._insert(start, end)

    def _insert(self, start: int, end: int) -> None:
        bisect.insort(self._starts, start)
        self._ends[start] = end
        bisect.insort(self._by_length, (end - start, start))

    def _remove(self, start: int) -> None:
        del self._starts[bisect.bisect_left(self._starts, start)]
        length = self._ends.pop(start) - start
        del self._by_length[bisect.bisect_left(self._by_length, (length, start))]
