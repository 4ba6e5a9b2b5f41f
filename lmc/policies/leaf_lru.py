"""LRU over the leaves of a prefix tree: nothing goes before what continues it.

A block whose predecessor is gone can serve no prefix, so a held item with held children stays
until they have gone. As SGLang's radix tree does (Zheng et al., "SGLang", NeurIPS 2024), and as
vLLM does by freeing a request's blocks from the last one on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from lmc.policies import Item


@dataclass
class LeafLru:
    """Least recently used first among items that no held item names as its parent."""

    capacity: int

    def __post_init__(self) -> None:
        self._parent: dict[Hashable, Hashable | None] = {}
        self._children: Counter[Hashable] = Counter()  # held ones
        self._used: dict[Hashable, int] = {}  # tick of the last use
        self._leaves: list[tuple[int, Hashable]] = []
        self._tick = 0

    def touch(self, item: Item, now: float) -> None:
        self._tick += 1
        self._used[item.key] = self._tick
        if not self._children[item.key]:
            self._push(item.key)

    def insert(self, item: Item, now: float) -> None:
        self._parent[item.key] = item.parent
        if item.parent is not None:
            self._children[item.parent] += 1
        self.touch(item, now)

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        passed, victim = [], None
        while self._leaves and victim is None:
            entry = heappop(self._leaves)
            tick, key = entry
            if self._used.get(key) != tick or self._children[key]:
                continue  # used since, gone, or no leaf any more
            if key in pinned or key == incoming.parent:
                passed.append(entry)
            else:
                victim = key
        for entry in passed:
            heappush(self._leaves, entry)
        if victim is None:
            # All that is left is pinned, or is what the newcomer continues.
            return incoming.key if incoming.parent in self._used else None
        self.remove(victim)
        return victim

    def remove(self, key: Hashable) -> None:
        del self._used[key]
        if not self._children[key]:
            del self._children[key]
        parent = self._parent.pop(key)
        if parent is None:
            return
        self._children[parent] -= 1
        if not self._children[parent]:
            del self._children[parent]
            if parent in self._used:
                self._push(parent)

    def expired(self, now: float) -> Collection[Hashable]:
        return ()

    def _push(self, key: Hashable) -> None:
        heappush(self._leaves, (self._used[key], key))
        if len(self._leaves) > 2 * len(self._used) + 64:
            self._leaves = [(t, k) for k, t in self._used.items() if not self._children[k]]
            heapify(self._leaves)
