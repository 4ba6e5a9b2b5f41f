"""2Q: newcomers queue apart, and only what comes back after leaving that queue is kept by LRU.

Johnson and Shasha, "2Q: a low overhead high performance buffer management replacement
algorithm", VLDB 1994, the full version: A1in is a FIFO of newcomers, A1out remembers the keys it
let go, Am is an LRU of what was asked for again while A1out remembered it. A1in takes 25% of the
capacity, and A1out remembers as much as 50% of it would hold, as the paper recommends.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass

from lmc.policies import Item
from lmc.policies.queues import Queue

KIN, KOUT = 0.25, 0.5


@dataclass
class TwoQ:
    """2Q, full version."""

    capacity: int

    def __post_init__(self) -> None:
        self._in = Queue()
        self._out = Queue()
        self._main = Queue()

    def touch(self, item: Item, now: float) -> None:
        if item.key in self._main:
            self._main.move_to_end(item.key)

    def insert(self, item: Item, now: float) -> None:
        if item.key in self._out:
            self._out.take(item.key)
            self._main.push(item.key, item.size)
        else:
            self._in.push(item.key, item.size)
        # Not when an item goes, for that might forget the newcomer it goes for.
        self._out.trim(KOUT * self.capacity)

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        queues = (self._in, self._main)
        for queue in queues if self._in.size > KIN * self.capacity else reversed(queues):
            key = queue.oldest(pinned)
            if key is None:
                continue
            size = queue.take(key)
            if queue is self._in:
                self._out.push(key, size)
            return key
        return None

    def remove(self, key: Hashable) -> None:
        (self._in if key in self._in else self._main).take(key)

    def expired(self, now: float) -> Collection[Hashable]:
        return ()
