"""2Q: newcomers queue apart, and only what comes back after leaving that queue is kept by LRU.

Johnson and Shasha, "2Q: a low overhead high performance buffer management replacement
algorithm", VLDB 1994, the full version: A1in is a FIFO of newcomers, A1out remembers the keys it
let go, Am is an LRU of what was asked for again while A1out remembered it. A1in and A1out take
25% and 50% of the capacity, as the paper recommends.
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

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        queues = (self._in, self._main)
        for queue in queues if self._in.size > KIN * self.capacity else reversed(queues):
            key = queue.oldest(pinned)
            if key is None:
                continue
            size = queue.take(key)
            if queue is self._in:
                self._out.push(key, size)
                self._out.trim(KOUT * self.capacity)
            return key
        return None

    def remove(self, key: Hashable) -> None:
        (self._in if key in self._in else self._main).take(key)

    def expired(self, now: float) -> Collection[Hashable]:
        return ()
