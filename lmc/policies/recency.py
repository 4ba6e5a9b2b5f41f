"""Policies that keep one queue: LRU, FIFO, and LRU with a time to live."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass
from heapq import heappop, heappush

from lmc.policies import Item
from lmc.policies.queues import first_free


@dataclass
class Fifo:
    """First in, first out: a use changes nothing."""

    capacity: int

    def __post_init__(self) -> None:
        self._queue: OrderedDict[Hashable, None] = OrderedDict()

    def touch(self, item: Item, now: float) -> None:
        pass

    def insert(self, item: Item, now: float) -> None:
        self._queue[item.key] = None

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        key = first_free(self._queue, pinned)
        if key is not None:
            del self._queue[key]
        return key

    def remove(self, key: Hashable) -> None:
        del self._queue[key]

    def expired(self, now: float) -> Collection[Hashable]:
        return ()


@dataclass
class Lru(Fifo):
    """Least recently used first. What vLLM, SGLang and LMCache do."""

    def touch(self, item: Item, now: float) -> None:
        self._queue.move_to_end(item.key)


@dataclass
class Ttl(Lru):
    """LRU whose items are served for `seconds` after they were put in, however often they are used.

    As Redis does with EXPIRE, which a read does not renew.

    Raises ValueError for seconds that are not above 0.
    """

    seconds: float = 600.0

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"got seconds {self.seconds}, want more than 0")
        super().__post_init__()
        self._until: dict[Hashable, float] = {}
        # All that are held, the first to expire on top, and some that are not any more.
        self._heap: list[tuple[float, int, Hashable]] = []
        self._inserted = 0  # tells equal times apart

    def insert(self, item: Item, now: float) -> None:
        super().insert(item, now)
        self._until[item.key] = now + self.seconds
        self._push(item.key)
        if len(self._heap) > 2 * len(self._until) + 64:
            self._heap.clear()
            for key in self._until:
                self._push(key)

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        key = super().evict(incoming, now, pinned)
        if key is not None:
            del self._until[key]
        return key

    def remove(self, key: Hashable) -> None:
        super().remove(key)
        del self._until[key]

    def expired(self, now: float) -> Collection[Hashable]:
        old: dict[Hashable, None] = {}
        while self._heap and self._heap[0][0] <= now:
            until, _, key = heappop(self._heap)
            if self._until.get(key) == until:
                old[key] = None
        for key in old:
            self._push(key)  # until it is removed
        return old.keys()

    def _push(self, key: Hashable) -> None:
        self._inserted += 1
        heappush(self._heap, (self._until[key], self._inserted, key))
