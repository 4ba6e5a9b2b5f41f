"""Belady's MIN: what is used furthest in the future goes.

Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal
1966. It needs `Item.next_use`, which a trace tells and a live store cannot. Where all items are of
one size no policy has more hits (Mattson et al., "Evaluation techniques for storage hierarchies",
1970); for other sizes the best choice is NP-hard (Chrobak et al. 2012) and this one a heuristic.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from lmc.policies import Item


@dataclass
class Belady:
    """The upper bound of every other policy: furthest next use first.

    bypass: refuse a newcomer that is used no sooner than all that could go for it, which no policy
        can beat at all. False: admit every newcomer, as the paper and other simulators do; a
        policy that may refuse (leaf_lru) could then have a few more hits.
    """

    capacity: int
    bypass: bool = False

    def __post_init__(self) -> None:
        self._next: dict[Hashable, float] = {}
        self._ticks: dict[Hashable, int] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._tick = 0  # tells equal next uses apart: the one seen first goes first

    def touch(self, item: Item, now: float) -> None:
        self._tick += 1
        self._next[item.key] = item.next_use
        self._ticks[item.key] = self._tick
        heappush(self._heap, (-item.next_use, self._tick, item.key))
        if len(self._heap) > 2 * len(self._next) + 64:
            self._heap = [(-n, self._ticks[key], key) for key, n in self._next.items()]
            heapify(self._heap)

    def insert(self, item: Item, now: float) -> None:
        self.touch(item, now)

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        passed, victim = [], None
        while self._heap and victim is None:
            use, tick, key = self._heap[0]
            if self._ticks.get(key) != tick:  # used since, or gone
                heappop(self._heap)
            elif key in pinned:
                passed.append(heappop(self._heap))
            elif self.bypass and incoming.next_use >= -use:
                victim = incoming.key
            else:
                heappop(self._heap)
                self.remove(key)
                victim = key
        for entry in passed:
            heappush(self._heap, entry)
        return victim

    def remove(self, key: Hashable) -> None:
        del self._next[key], self._ticks[key]

    def expired(self, now: float) -> Collection[Hashable]:
        return ()
