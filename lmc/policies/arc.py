"""ARC: two LRU lists, of items used once and more often, whose shares follow the ghosts' hits.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, Figure 4. T1
holds what was used once lately, T2 what was used at least twice; B1 and B2 remember the keys that
left them. A miss that B1 remembers means that T1 was too small, one that B2 remembers the same
of T2, and the target p of T1's size moves accordingly. Sizes stand where the paper counts pages.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass

from lmc.policies import Item
from lmc.policies.queues import Queue


@dataclass
class Arc:
    """Adaptive replacement cache."""

    capacity: int

    def __post_init__(self) -> None:
        self._t1 = Queue()
        self._t2 = Queue()
        self._b1 = Queue()
        self._b2 = Queue()
        self._p = 0.0
        self._adapted: Hashable | None = None  # the newcomer p has followed

    def touch(self, item: Item, now: float) -> None:
        if item.key in self._t1:
            self._t2.push(item.key, self._t1.take(item.key))
        else:
            self._t2.move_to_end(item.key)

    def insert(self, item: Item, now: float) -> None:
        self._adapt(item)
        self._adapted = None
        for ghost in (self._b1, self._b2):
            if item.key in ghost:
                ghost.take(item.key)
                self._t2.push(item.key, item.size)
                break
        else:
            self._t1.push(item.key, item.size)
        self._b1.trim(max(self.capacity - self._t1.size, 0))
        held = self._t1.size + self._t2.size
        self._b2.trim(max(2 * self.capacity - held - self._b1.size, 0))

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        self._adapt(incoming)
        again = incoming.key in self._b2
        first = self._t1.size > self._p or (again and self._t1.size == self._p)
        pairs = ((self._t1, self._b1), (self._t2, self._b2))
        for queue, ghost in pairs if first else reversed(pairs):
            key = queue.oldest(pinned)
            if key is not None:
                ghost.push(key, queue.take(key))
                return key
        return None

    def remove(self, key: Hashable) -> None:
        (self._t1 if key in self._t1 else self._t2).take(key)

    def expired(self, now: float) -> Collection[Hashable]:
        return ()

    def _adapt(self, incoming: Item) -> None:
        """Move p once for each newcomer, before the first item goes for it."""
        if self._adapted == incoming.key:
            return
        self._adapted = incoming.key
        b1, b2 = self._b1.size, self._b2.size
        if incoming.key in self._b1:
            self._p = min(self.capacity, self._p + incoming.size * max(1.0, b2 / b1))
        elif incoming.key in self._b2:
            self._p = max(0.0, self._p - incoming.size * max(1.0, b1 / b2))
