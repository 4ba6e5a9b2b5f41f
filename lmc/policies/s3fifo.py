"""S3-FIFO: a small FIFO sifts out what is asked for once; what comes back goes to the main one.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, with the parameters of
its authors' libCacheSim 0.3, pinned because hit rates depend on them: the small queue takes 10%
of the capacity, the ghost remembers as much as the main queue holds (90%), an item leaves the
small queue for the main one after 2 uses there, counts stop at 3, and until the first eviction
what the small queue has no room for goes to the main queue.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass

from lmc.policies import Item
from lmc.policies.queues import Queue

SMALL, GHOST = 0.1, 0.9
TO_MAIN, MOST_USES = 2, 3


@dataclass
class S3Fifo:
    """Small, main and ghost FIFO queues."""

    capacity: int

    def __post_init__(self) -> None:
        self._small = Queue()
        self._main = Queue()
        self._ghost = Queue()
        self._uses: dict[Hashable, int] = {}
        self._evicted = False

    def touch(self, item: Item, now: float) -> None:
        self._uses[item.key] = min(self._uses[item.key] + 1, MOST_USES)

    def insert(self, item: Item, now: float) -> None:
        self._uses[item.key] = 0
        if item.key in self._ghost:
            self._ghost.take(item.key)
            self._main.push(item.key, item.size)
        elif not self._evicted and self._small.size >= SMALL * self.capacity:
            self._main.push(item.key, item.size)
        else:
            self._small.push(item.key, item.size)
        # Not when an item goes, for that might forget the newcomer it goes for.
        self._ghost.trim(GHOST * self.capacity)

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        self._evicted = True
        main_first = self._main.size > (1 - SMALL) * self.capacity or not self._small
        if main_first:
            key = self._from_main(pinned)
            return self._from_small(pinned) if key is None else key
        key = self._from_small(pinned)
        return self._from_main(pinned) if key is None else key

    def remove(self, key: Hashable) -> None:
        (self._small if key in self._small else self._main).take(key)
        del self._uses[key]

    def expired(self, now: float) -> Collection[Hashable]:
        return ()

    def _from_small(self, pinned: Container) -> Hashable | None:
        """Evict the oldest that was not used; what was used moves to the main queue."""
        while (key := self._small.oldest(pinned)) is not None:
            size = self._small.take(key)
            if self._uses[key] < TO_MAIN:
                del self._uses[key]
                self._ghost.push(key, size)
                return key
            self._uses[key] = 0
            self._main.push(key, size)
        return None

    def _from_main(self, pinned: Container) -> Hashable | None:
        """Evict the oldest that has no uses left; one that has gives one for another round."""
        while (key := self._main.oldest(pinned)) is not None:
            if self._uses[key] == 0:
                self.remove(key)
                return key
            self._uses[key] -= 1
            self._main.move_to_end(key)
        return None
