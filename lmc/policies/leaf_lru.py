"""LRU over the leaves of a prefix tree: nothing goes before what continues it.

A block whose predecessor is gone can serve no prefix, so a held item with held children stays
until they have gone. As SGLang's radix tree does (Zheng et al., "SGLang: efficient execution of
structured language model programs", NeurIPS 2024), and as vLLM does by freeing a request's blocks
from the last one on. What the newcomer itself continues stays too: rather than lose it, the
newcomer is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

from lmc.policies import Item


@dataclass
class LeafLru:
    """Least recently used first among items that no held item names as its parent."""

    capacity: int

    def __post_init__(self) -> None:
        self._used: dict[Hashable, int] = {}  # tick of the last use
        self._parent: dict[Hashable, Hashable | None] = {}
        self._children: dict[Hashable, int] = {}  # held ones, of parents held or not
        # Every leaf is in the heap, once, with a tick not above that of its last use: one that
        # was used since, or is no leaf any more, is found out when it comes to the top.
        self._heap: list[tuple[int, Hashable]] = []
        self._queued: set[Hashable] = set()
        self._tick = 0

    def touch(self, item: Item, now: float) -> None:
        self._tick += 1
        self._used[item.key] = self._tick

    def insert(self, item: Item, now: float) -> None:
        self.touch(item, now)
        parent = item.parent
        if (parent == item.key or item.key in self._children) and self._behind(parent, item.key):
            parent = None  # chunks that come in any order may close a circle, which has no leaf
        self._parent[item.key] = parent
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1
        self._queue(item.key)

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        passed = []
        while self._heap:
            tick, key = self._heap[0]
            used = self._used.get(key)
            if used is None or key in self._children:
                heappop(self._heap)
                self._queued.remove(key)
            elif used != tick:
                heapreplace(self._heap, (used, key))
            elif key in pinned or key == incoming.parent:
                passed.append(heappop(self._heap))
            else:
                break
        # All leaves were passed over, or the victim is at the top.
        victim = self._heap[0][1] if self._heap else None
        for entry in passed:
            heappush(self._heap, entry)
        if victim is not None:
            self.remove(victim)
        elif any(key not in pinned for _, key in passed):
            return incoming.key
        return victim

    def remove(self, key: Hashable) -> None:
        del self._used[key]
        parent = self._parent.pop(key)
        if parent is None:
            return
        self._children[parent] -= 1
        if not self._children[parent]:
            del self._children[parent]
            if parent in self._used:
                self._queue(parent)

    def expired(self, now: float) -> Collection[Hashable]:
        return ()

    def _behind(self, start: Hashable | None, key: Hashable) -> bool:
        """Whether `key` is `start` or lies in front of it, as far as items are held."""
        while start is not None and start != key:
            start = self._parent.get(start)
        return start == key

    def _queue(self, key: Hashable) -> None:
        if key in self._queued:
            return
        self._queued.add(key)
        heappush(self._heap, (self._used[key], key))
        if len(self._heap) > 2 * len(self._used) + 64:
            self._queued &= self._used.keys()
            self._heap = [(self._used[k], k) for k in self._queued]
            heapify(self._heap)
