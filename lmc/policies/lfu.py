"""LFU: the least often used item goes first, the one that reached its count first among equals.

`Lfu` never forgets a count while its item is held, so what was popular once stays.
`LfuAged` is LFU with dynamic ageing (LFU-DA; Arlitt et al., "Evaluating content management
techniques for web proxy caches", 2000): an item's value is its uses plus the value that the last
evicted item had, so that newcomers start level with what is being evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import ClassVar

from lmc.policies import Item
from lmc.policies.queues import first_free


@dataclass
class Lfu:
    """Least frequently used first, without ageing."""

    capacity: int
    ages: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._uses: dict[Hashable, int] = {}
        self._value: dict[Hashable, int] = {}
        self._buckets: dict[int, OrderedDict[Hashable, None]] = {}
        self._heap: list[int] = []  # every bucket's value, and stale ones
        self._age = 0

    def touch(self, item: Item, now: float) -> None:
        self._leave(item.key)
        self._uses[item.key] += 1
        self._join(item.key)

    def insert(self, item: Item, now: float) -> None:
        self._uses[item.key] = 1
        self._join(item.key)

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        passed, victim = [], None
        while self._heap and victim is None:
            bucket = self._buckets.get(self._heap[0])
            victim = first_free(bucket, pinned) if bucket else None
            if victim is None:  # stale, or all of them are pinned
                value = heappop(self._heap)
                if bucket and value not in passed:
                    passed.append(value)
        for value in passed:
            heappush(self._heap, value)
        if victim is not None:
            if self.ages:
                self._age = max(self._age, self._value[victim])
            self.remove(victim)
        return victim

    def remove(self, key: Hashable) -> None:
        self._leave(key)
        del self._uses[key], self._value[key]

    def expired(self, now: float) -> Collection[Hashable]:
        return ()

    def _join(self, key: Hashable) -> None:
        value = self._value[key] = self._uses[key] + self._age
        bucket = self._buckets.get(value)
        if bucket is None:
            bucket = self._buckets[value] = OrderedDict()
            heappush(self._heap, value)
            if len(self._heap) > 2 * len(self._buckets) + 64:
                self._heap = sorted(self._buckets)
        bucket[key] = None

    def _leave(self, key: Hashable) -> None:
        value = self._value[key]
        bucket = self._buckets[value]
        del bucket[key]
        if not bucket:
            del self._buckets[value]


@dataclass
class LfuAged(Lfu):
    """LFU with dynamic ageing."""

    ages: ClassVar[bool] = True
