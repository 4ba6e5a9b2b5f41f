"""GDSF: keep what costs most to compute again per unit of room, and is used most often.

Greedy-Dual-Size-Frequency (Cherkasova, "Improving WWW proxies performance with
Greedy-Dual-Size-Frequency caching policy", HP Labs 1998). The priority of an item is
clock + uses · cost / size; the lowest goes, and the clock rises to its priority, which ages all
that stays. With the FLOPs of a prefill as cost, a chunk deep in a prompt is worth more than one
at its start, since each of its rows attends to more keys.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from lmc.policies import Item


@dataclass
class Gdsf:
    """Lowest clock + uses · cost / size first; of equals the one used longest ago."""

    capacity: int

    def __post_init__(self) -> None:
        self._uses: dict[Hashable, int] = {}
        self._entry: dict[Hashable, tuple[float, int, Hashable]] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._clock = 0.0
        self._ticks = 0  # tells equal priorities apart

    def touch(self, item: Item, now: float) -> None:
        self._uses[item.key] += 1
        self._rank(item)

    def insert(self, item: Item, now: float) -> None:
        self._uses[item.key] = 1
        self._rank(item)

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        passed, victim = [], None
        while self._heap and victim is None:
            entry = heappop(self._heap)
            if self._entry.get(entry[2]) is not entry:
                continue  # ranked again since, or gone
            if entry[2] in pinned:
                passed.append(entry)
            else:
                victim = entry
        for entry in passed:
            heappush(self._heap, entry)
        if victim is None:
            return None
        self._clock = max(self._clock, victim[0])
        self.remove(victim[2])
        return victim[2]

    def remove(self, key: Hashable) -> None:
        del self._uses[key], self._entry[key]

    def expired(self, now: float) -> Collection[Hashable]:
        return ()

    def _rank(self, item: Item) -> None:
        self._ticks += 1
        priority = self._clock + self._uses[item.key] * item.cost / item.size
        entry = self._entry[item.key] = (priority, self._ticks, item.key)
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entry) + 64:
            self._heap = list(self._entry.values())
            heapify(self._heap)
