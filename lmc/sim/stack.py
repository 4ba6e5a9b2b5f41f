"""LRU at all capacities in one pass, by stack distances; at a fraction of the cost, by sampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmc.chunking.cdc import splitmix64
from lmc.sim.compiled import compiled

# The distance of a first access: no capacity makes it a hit.
NEVER = np.iinfo(np.int64).max
_GROUPS = 16


def stack_distances(
    keys: np.ndarray, sizes: np.ndarray | None = None, offsets: np.ndarray | None = None
) -> np.ndarray:
    """The smallest capacity at which LRU hits, for each access: [A] int64, `NEVER` for a first one.

    It is the sum of the sizes of the different items used since the last access to the key, its
    own included. LRU holds the longest prefix of the recency stack (all items, the latest used
    first) that fits: a hit reorders that prefix, and a miss puts an item in front and drops items
    from the end until the rest fits, so the first item behind the prefix still does not fit. An
    access therefore hits iff the sizes down to its item add up to at most the capacity.

    An item larger than the capacity is the exception: here it empties the place, while a place
    that does not let it in (`lmc.sim.replay`) keeps what it has. So below the largest size the
    distances claim fewer hits than such a place has, never more; from it on they are exact.

    Method: Mattson et al., "Evaluation techniques for storage hierarchies" (1970), with the tree
    over time of Bennett & Kruskal, "LRU stack processing" (1975). Time O(A log U), memory 40
    bytes a key.

    Args:
        keys: [A] integers in `[0, A)`, numbered densely: memory goes by the largest.
        sizes: [A] integers above 0 in any unit, the same at each access to a key; default 1 each.
        offsets: [R + 1] of requests, as in `lmc.sim.trace.Accesses`, each of which is looked up as
            a whole before any of it is put in, as a store does; no key twice in one. Default: each
            access is looked up, and put in, alone.

    Raises:
        ValueError: keys or sizes out of range or of another type, differing lengths, offsets that
            do not ascend from 0 to A, or a key with two sizes (which of them LRU has then depends
            on the capacity).
    """
    keys, sizes = _checked(keys, sizes)
    offsets = np.arange(len(keys) + 1) if offsets is None else offsets
    _check_offsets(offsets, len(keys))
    distances = np.empty(len(keys), dtype=np.int64)
    if len(keys):
        wrong = _fill_distances(keys, sizes, offsets, int(keys.max()) + 1, distances)
        if wrong >= 0:
            raise ValueError(
                f"sizes: got {sizes[wrong]} at access {wrong} to key {keys[wrong]}, "
                "which had another size before; want one size per key"
            )
    return distances


def prefix_distances(distances: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[A] int64: the smallest capacity at which an access and all before it in its request hit.

    That is the running maximum of `distances` [A] within each request; `offsets` [R + 1] is as
    in `lmc.sim.trace.Accesses`. It is exact where blocks are used in order, front to back.
    Whether a request is looked up block by block or as a whole, before any of it is put in, is
    the same: hits put nothing out, so up to the first miss the same blocks are held.

    Raises ValueError for offsets that do not ascend from 0 to A.
    """
    _check_offsets(offsets, len(distances))
    return _running_maximum(distances, offsets)


def _check_offsets(offsets: np.ndarray, A: int) -> None:
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != A or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets: got {offsets}, want them to ascend from 0 to {A}")


@dataclass(frozen=True, eq=False)
class Curve:
    """The hit rate at every capacity: a staircase.

    capacity: [K] int64, ascending, each at which the hit rate rises.
    hit_rate: [K] float64, from that capacity on; 0 below the first.
    """

    capacity: np.ndarray
    hit_rate: np.ndarray

    def at(self, capacities: np.ndarray | list[int]) -> np.ndarray:
        """The hit rate at each of `capacities` [n]."""
        return _steps(self.capacity, self.hit_rate, capacities)

    @property
    def infinite(self) -> float:
        """The hit rate of a place that evicts nothing."""
        return float(self.hit_rate[-1]) if len(self.hit_rate) else 0.0

    def capacity_for(self, rate: float) -> int:
        """The smallest capacity at which the hit rate is `rate` or more; 0 for a rate of 0.

        Raises ValueError for a rate that no capacity gives.
        """
        # What adds up to the highest rate may miss it by the last bits of a sum.
        if rate > self.infinite * (1 + 1e-12):
            raise ValueError(
                f"rate: got {rate:.6g}, but no capacity gives over {self.infinite:.6g}"
            )
        if rate <= 0:
            return 0
        place = int(np.searchsorted(self.hit_rate, rate * (1 - 1e-12)))
        return int(self.capacity[min(place, len(self.capacity) - 1)])


def hit_curve(
    distances: np.ndarray, weights: np.ndarray | None = None, total: float | None = None
) -> Curve:
    """The share of accesses that hit at each capacity, from their distances [A].

    Args:
        distances: of `stack_distances`, or of `prefix_distances` for hits in the prefix alone.
        weights: [A] not negative, such as tokens; default 1 each.
        total: what the rate is a share of, when more was asked for than the accesses say (tokens
            of partial blocks, which are not kept); default the sum of the weights.

    Raises:
        ValueError: another number of weights, a negative one, or a total that is below their sum
            or 0.
    """
    again = distances != NEVER
    if weights is None and total is None:
        # Counting needs no weights carried along: less than half the time of what follows.
        capacity, hits = np.unique(distances[again], return_counts=True)
        return Curve(capacity, np.cumsum(hits) / max(len(distances), 1))
    if weights is None:
        weights = np.broadcast_to(1.0, len(distances))
    if len(weights) != len(distances) or (len(weights) and not weights.min() >= 0):
        raise ValueError(f"weights: got {len(weights)}, want {len(distances)}, none below 0")
    weighed = float(weights.sum())
    whole = weighed if total is None else total
    if len(distances) and not (whole > 0 and whole >= weighed):
        raise ValueError(f"total: got {whole}, want above 0 and at least the weights' {weighed}")
    return _staircase(distances[again], weights[again], whole)


@dataclass(frozen=True, eq=False)
class ShardsCurve(Curve):
    """An estimated `Curve`.

    error: [K] float64, the standard error of `hit_rate`.
    """

    error: np.ndarray

    def error_at(self, capacities: np.ndarray | list[int]) -> np.ndarray:
        """The standard error of the hit rate at each of `capacities` [n]."""
        return _steps(self.capacity, self.error, capacities)


def shards(
    keys: np.ndarray, sizes: np.ndarray | None = None, rate: float = 0.01, seed: int = 0
) -> ShardsCurve:
    """The hit curve, estimated from the accesses to a share `rate` of the keys.

    Fixed-rate SHARDS: Waldspurger et al., "Efficient MRC construction with SHARDS" (FAST 2015). A
    key is sampled iff its hash is below a threshold, so all accesses to it are. What was used
    since its last access is scaled by 1 / rate; its own size, which is known, is not. As in
    SHARDS_adj the rate is a share of `rate * A` accesses, and those that the sample lacks or has
    too many count as hits at the smallest size, since they belong to a few very popular keys.

    The standard error is a delete-one jackknife over 16 groups of sampled keys, times
    sqrt(1 - rate) since a full sample has no error. It covers which keys were drawn. It does not
    cover the resolution: distances of less than a few typical sizes / rate are known badly.

    Args:
        keys, sizes: as for `stack_distances`.
        rate: share of the keys, in (0, 1].
        seed: of the hash.

    Raises:
        ValueError: as `stack_distances`; a rate outside (0, 1], or one that samples no key.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate: got {rate}, want above 0 and at most 1")
    keys, sizes = _checked(keys, sizes)
    A = len(keys)
    if not A:
        return ShardsCurve(keys, np.empty(0), np.empty(0))
    smallest = int(sizes.min())
    start = splitmix64(np.array([seed], dtype=np.int64).astype(np.uint64))
    hashes = splitmix64(np.arange(keys.max() + 1, dtype=np.uint64) ^ start)
    # The upper 53 bits decide, which a float holds exactly; the lowest 4 name the group.
    chosen = ((hashes >> np.uint64(11)) < rate * 2.0**53)[keys]
    keys, sizes = keys[chosen], sizes[chosen]
    if not len(keys):
        raise ValueError(f"rate: got {rate}, which samples none of {len(hashes)} keys; want more")
    curve = _estimate(keys, sizes, rate, A, smallest)
    group = hashes[keys] % np.uint64(_GROUPS)
    others = rate * (_GROUPS - 1) / _GROUPS
    without = np.empty((_GROUPS, len(curve.capacity)))
    for g in range(_GROUPS):
        kept = group != g
        without[g] = _estimate(keys[kept], sizes[kept], others, A, smallest).at(curve.capacity)
    error = np.sqrt((1 - rate) * (_GROUPS - 1) * without.var(axis=0))
    return ShardsCurve(curve.capacity, curve.hit_rate.clip(0, 1), error)


def _estimate(keys: np.ndarray, sizes: np.ndarray, rate: float, A: int, smallest: int) -> Curve:
    """The curve of A accesses from those to the sampled keys, not yet clipped to [0, 1]."""
    _, dense = np.unique(keys, return_inverse=True)
    distances = stack_distances(dense, sizes)
    again = distances != NEVER
    own = sizes[again]
    scaled = own + np.rint((distances[again] - own) / rate).astype(np.int64)
    weights = np.ones(len(own) + 1)
    weights[0] = rate * A - len(keys)
    return _staircase(np.append(smallest, scaled), weights, rate * A)


def _staircase(distances: np.ndarray, weights: np.ndarray, total: float) -> Curve:
    capacity, place = np.unique(distances, return_inverse=True)
    hits = np.bincount(place, weights, minlength=len(capacity))
    return Curve(capacity, np.cumsum(hits) / total)


def _steps(capacity: np.ndarray, values: np.ndarray, at: np.ndarray | list[int]) -> np.ndarray:
    """values [K] from capacity [K] on, 0 before the first."""
    return np.concatenate([[0.0], values])[np.searchsorted(capacity, at, side="right")]


def _checked(keys: np.ndarray, sizes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Both as int64; sizes of 1 without memory for them."""
    A = len(keys)
    if keys.ndim != 1 or keys.dtype.kind not in "iu":
        raise ValueError(f"keys: got {keys.dtype} {keys.shape}, want integers [A]")
    if A and not 0 <= keys.min() <= keys.max() < A:
        raise ValueError(f"keys: got {keys.min()} to {keys.max()}, want all in [0, {A})")
    if sizes is None:
        return keys.astype(np.int64, copy=False), np.broadcast_to(np.int64(1), A)
    if sizes.shape != (A,) or sizes.dtype.kind not in "iu":
        raise ValueError(f"sizes: got {sizes.dtype} {sizes.shape}, want integers ({A},)")
    if A and sizes.min() < 1:
        raise ValueError(f"sizes: got {sizes.min()}, want all above 0")
    return keys.astype(np.int64, copy=False), sizes.astype(np.int64, copy=False)


@compiled
def _fill_distances(
    keys: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, U: int, distances: np.ndarray
) -> int:
    """Fill `distances`; the first access whose size is not that of its key before, or -1.

    Each access takes the next time slot and empties the one its key had. The tree is Fenwick's,
    over the slots taken so far only, so that taking one costs O(1) amortised and emptying or
    summing O(log of the slots since). When slots run out the U at most that are not empty move
    together, which at 2 U slots happens once in U accesses.
    """
    slots = min(2 * U, len(keys))
    tree = np.empty(slots + 1, dtype=np.int64)  # [i]: sizes in slots (i - lowest bit of i, i]
    access = np.empty(slots + 1, dtype=np.int64)  # the one in each slot, -1 for none
    slot_of = np.zeros(U, dtype=np.int64)  # of each key; slots count from 1
    last = 0
    for r in range(len(offsets) - 1):
        for a in range(offsets[r], offsets[r + 1]):
            slot = slot_of[keys[a]]
            distances[a] = NEVER
            if slot > 0:
                if sizes[access[slot]] != sizes[a]:
                    return a
                distances[a] = _sum(tree, slot - 1, last)
        for a in range(offsets[r], offsets[r + 1]):
            key, size = keys[a], sizes[a]
            slot = slot_of[key]
            if slot > 0:
                access[slot] = -1
                while slot <= last:
                    tree[slot] -= size
                    slot += slot & -slot
            if last == slots:
                last = 0
                for old in range(1, slots + 1):
                    if access[old] >= 0:
                        last += 1
                        access[last] = access[old]
                        slot_of[keys[access[last]]] = last
                        _append(tree, last, sizes[access[last]])
            last += 1
            access[last] = a
            slot_of[key] = last
            _append(tree, last, size)
    return -1


@compiled
def _append(tree: np.ndarray, i: int, size: int) -> None:
    """Let slot i, right behind the last, hold `size`."""
    first = i - (i & -i)
    tree[i] = size
    child = i - 1
    while child > first:
        tree[i] += tree[child]
        child -= child & -child


@compiled
def _sum(tree: np.ndarray, low: int, high: int) -> int:
    """The sizes in slots (low, high]."""
    total = 0
    while high > low:
        total += tree[high]
        high -= high & -high
    while low > high:
        total -= tree[low]
        low -= low & -low
    return total


@compiled
def _running_maximum(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    out = values.copy()
    for i in range(len(offsets) - 1):
        for a in range(offsets[i] + 1, offsets[i + 1]):
            out[a] = max(out[a], out[a - 1])
    return out
