"""Replay of a trace's accesses through the store's policies, in tiers that hold no bytes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lmc.policies import POLICIES, Item
from lmc.sim.trace import Accesses

Write = Literal["through", "back"]
MISS = -1


@dataclass(frozen=True, eq=False)
class Replay:
    """What happened to each access.

    tier: [A] int8, the place of the first tier that held it, or `MISS`.
    written: [tiers] sum of the sizes written to each tier, promotions included.
    """

    tier: np.ndarray
    written: list[int]

    @property
    def hits(self) -> int:
        """Accesses that any tier held."""
        return int((self.tier != MISS).sum())


def replay(
    accesses: Accesses,
    capacities: Sequence[int],
    policy: Mapping[str, Any] | str = "lru",
    *,
    sizes: np.ndarray | None = None,
    costs: np.ndarray | None = None,
    write: Write = "through",
) -> Replay:
    """Look every access up in order of arrival; put what no tier holds in.

    An access is served by the first tier that holds it, which counts as a use there, and is
    promoted: put into every tier above. What is larger than a tier never enters it.

    Args:
        capacities: of the tiers, the first asked first, in the unit of `sizes`.
        policy: of every tier, each with a fresh one of its own.
        sizes: [A] positive integers; default 1 each, so that capacities count blocks.
        costs: [A] what computing each block again takes, for policies that weigh it.
        write: `through` puts what is new into every tier. `back` puts it into the first alone,
            and what a tier evicts or does not take into the next, unless that holds it already.

    Raises:
        ValueError: no capacities, one below 1, a wrong policy, or arrays of another length.
    """
    if not capacities or min(capacities) < 1:
        raise ValueError(f"capacities: got {list(capacities)}, want one or more of at least 1")
    if write not in ("through", "back"):
        raise ValueError(f"write: got {write!r}, want through or back")
    A = len(accesses.keys)
    for name, array in (("sizes", sizes), ("costs", costs)):
        if array is not None and (len(array) != A or (A and array.min() <= 0)):
            raise ValueError(f"{name}: got {len(array)} values, want {A}, all above 0")
    tiers = [MetadataTier(capacity, policy) for capacity in capacities]
    found = np.full(A, MISS, dtype=np.int8)
    keys = accesses.keys.tolist()
    next_use = accesses.next_use().tolist()
    size_of = [1] * A if sizes is None else sizes.tolist()
    cost_of = size_of if costs is None else costs.tolist()
    times = accesses.timestamps.tolist()
    offsets = accesses.offsets.tolist()
    for i, now in enumerate(times):
        for tier in tiers:
            tier.expire(now)
        parent = None
        for a in range(offsets[i], offsets[i + 1]):
            item = Item(keys[a], size_of[a], cost_of[a], parent, next_use[a])
            parent = item.key
            place = next((t for t, tier in enumerate(tiers) if tier.use(item, now)), MISS)
            found[a] = place
            first = len(tiers) if write == "through" else 1
            for t in range(first if place == MISS else place):
                put(tiers, t, item, now, write)
    return Replay(found, [tier.written for tier in tiers])


def put(tiers: Sequence[MetadataTier], t: int, item: Item, now: float, write: Write) -> None:
    """Put an item into tier t; with `back`, what leaves goes one tier down, and so on."""
    for evicted in tiers[t].put(item, now):
        if write == "back" and t + 1 < len(tiers) and evicted.key not in tiers[t + 1]:
            put(tiers, t + 1, evicted, now, write)


class MetadataTier:
    """What one tier would hold: keys and sizes."""

    def __init__(self, capacity: int, policy: Mapping[str, Any] | str) -> None:
        self.capacity = capacity
        self.policy = POLICIES.build(policy, capacity=capacity)
        self.size = 0
        self.written = 0
        self._held: dict[Hashable, Item] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def use(self, item: Item, now: float) -> bool:
        """Whether the item is held; if so it was used."""
        held = self._held.get(item.key)
        if held is None:
            return False
        if held.size != item.size:
            item = item._replace(size=held.size)  # what it occupies since it came
        self._held[item.key] = item
        self.policy.touch(item, now)
        return True

    def put(self, item: Item, now: float) -> list[Item]:
        """Hold an item; what left for it, or the item itself if it does not fit or is refused."""
        evicted: list[Item] = []
        if item.size > self.capacity:
            return [item]
        while self.size + item.size > self.capacity:
            key = self.policy.evict(item, now)
            assert key is not None  # nothing is pinned
            if key == item.key:
                return [*evicted, item]
            left = self._held.pop(key)
            self.size -= left.size
            evicted.append(left)
        self.policy.insert(item, now)
        self._held[item.key] = item
        self.size += item.size
        self.written += item.size
        return evicted

    def expire(self, now: float) -> None:
        """Forget what the policy says must not be served any more."""
        for key in self.policy.expired(now):
            self.policy.remove(key)
            self.size -= self._held.pop(key).size


def prefix_run(hit: np.ndarray, accesses: Accesses) -> np.ndarray:
    """[A] bool: hits that lie in the run of hits from the start of their request."""
    misses = np.cumsum(~hit)
    before = misses - ~hit  # misses in front of each access, over the whole trace
    first = np.repeat(accesses.offsets[:-1], np.diff(accesses.offsets))
    return hit & (before == before[first]) if len(hit) else hit
