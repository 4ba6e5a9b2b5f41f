"""SIEVE: a queue in order of arrival, and a hand that spares what was used since it last passed.

Zhang et al., "SIEVE is simpler than LRU", NSDI 2024. A hit sets a bit and moves nothing. The hand
walks from the oldest to the newest; it clears the bit of what was used, evicts the first item
that was not, and stays there.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass

from lmc.policies import Item


class _Node:
    __slots__ = ("key", "newer", "older", "used")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.used = False
        self.newer: _Node | None = None
        self.older: _Node | None = None


@dataclass
class Sieve:
    """Evict the first item, from the hand on, that was not used since the hand last passed."""

    capacity: int

    def __post_init__(self) -> None:
        self._nodes: dict[Hashable, _Node] = {}
        self._oldest: _Node | None = None
        self._newest: _Node | None = None
        self._hand: _Node | None = None

    def touch(self, item: Item, now: float) -> None:
        self._nodes[item.key].used = True

    def insert(self, item: Item, now: float) -> None:
        node = self._nodes[item.key] = _Node(item.key)
        node.older = self._newest
        if self._newest is None:
            self._oldest = node
        else:
            self._newest.newer = node
        self._newest = node

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        node = self._hand or self._oldest
        # Two rounds clear every bit, so what a third would meet is pinned.
        for _ in range(2 * len(self._nodes)):
            assert node is not None
            if node.key not in pinned:
                if not node.used:
                    self._hand = node
                    self.remove(node.key)
                    return node.key
                node.used = False
            node = node.newer or self._oldest
        return None

    def remove(self, key: Hashable) -> None:
        node = self._nodes.pop(key)
        if node is self._hand:
            self._hand = node.newer
        if node.newer is None:
            self._newest = node.older
        else:
            node.newer.older = node.older
        if node.older is None:
            self._oldest = node.newer
        else:
            node.older.newer = node.newer

    def expired(self, now: float) -> Collection[Hashable]:
        return ()
