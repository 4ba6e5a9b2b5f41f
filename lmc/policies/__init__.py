"""Eviction policies: which of the held items goes when room is needed.

The store (`lmc.store.Index`) and the simulator (`lmc.sim`) run these same classes. A policy holds
keys and numbers, never bytes, and imports neither torch nor vllm.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lmc.registry import Registry


class Item(NamedTuple):
    """What a policy may know of one item.

    key: names it.
    size: in the unit of the capacity (blocks, tokens or bytes), at least 1.
    cost: what it takes to compute it again, in any unit, above 0 (GDSF).
    parent: key of the item right in front of it in its prompt (leaf_lru).
    next_use: index of the next access to the key, `inf` for none (Belady; known offline only).
    """

    key: Hashable
    size: int = 1
    cost: float = 1.0
    parent: Hashable | None = None
    next_use: float = math.inf


@dataclass
class Policy(Protocol):
    """The order in which items leave a place of `capacity` units.

    The caller owns what is held and how much of it: per access it calls `touch` when the key is
    held; otherwise it calls `evict` until there is room and then `insert`. It never inserts an
    item that is larger than the capacity, nor a key that is held. Methods cost O(1) or O(log n)
    amortised, pinned items aside.

    capacity: the caller's, in the unit of `Item.size`; sizes of queues and ghosts derive from it.
    Fields other than it are the policy's config: `POLICIES.build("lru", capacity=1000)`.
    """

    capacity: int

    def touch(self, item: Item, now: float) -> None:
        """A held item is used at `now` (seconds)."""
        ...

    def insert(self, item: Item, now: float) -> None:
        """An item is held from `now` on; room has been made."""
        ...

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        """Choose the held key that makes room for `incoming`, forget it and return it.

        Never a key in `pinned`. Returns None when all that may go is pinned, and
        `incoming.key` when the policy would rather not admit it (which forgets nothing).
        """
        ...

    def remove(self, key: Hashable) -> None:
        """A held key is gone for another reason: forgotten, not remembered as evicted."""
        ...

    def expired(self, now: float) -> Collection[Hashable]:
        """Held keys that must not be served any more at `now`; the caller removes them."""
        ...


POLICIES = Registry(
    "policy",
    {
        "2q": "lmc.policies.two_q:TwoQ",
        "arc": "lmc.policies.arc:Arc",
        "belady": "lmc.policies.belady:Belady",
        "fifo": "lmc.policies.recency:Fifo",
        "gdsf": "lmc.policies.gdsf:Gdsf",
        "leaf_lru": "lmc.policies.leaf_lru:LeafLru",
        "lfu": "lmc.policies.lfu:Lfu",
        "lfu_aged": "lmc.policies.lfu:LfuAged",
        "lru": "lmc.policies.recency:Lru",
        "s3fifo": "lmc.policies.s3fifo:S3Fifo",
        "sieve": "lmc.policies.sieve:Sieve",
        "ttl": "lmc.policies.recency:Ttl",
        "wtinylfu": "lmc.policies.w_tinylfu:WTinyLfu",
    },
    given=["capacity"],
    has=["insert", "evict", "touch", "expired"],
)
