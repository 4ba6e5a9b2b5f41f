"""Policies once more, as plainly as the papers put them: lists, one unit each, no regard to speed.

Each takes keys and a capacity and says of every access whether it is a hit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations

Model = Callable[[list[int], int], list[bool]]


def ordered(worst: Callable[[list[int], int, int], object]) -> Model:
    """A cache whose victim is the held key of the least `worst(history, key, since)`.

    history: all accesses before this one; since: the index of the access that put the key in.
    """

    def model(keys: list[int], capacity: int) -> list[bool]:
        since: dict[int, int] = {}
        hits = []
        for i, key in enumerate(keys):
            hits.append(key in since)
            if key in since:
                continue
            if len(since) == capacity:
                del since[min(since, key=lambda k: worst(keys[:i], k, since[k]))]
            since[key] = i
        return hits

    return model


def _last(history: list[int], key: int) -> int:
    return max(i for i, k in enumerate(history) if k == key)


fifo = ordered(lambda history, key, since: since)
lru = ordered(lambda history, key, since: _last(history, key))
lfu = ordered(lambda history, key, since: (history[since:].count(key), _last(history, key)))


def lfu_aged(keys: list[int], capacity: int) -> list[bool]:
    """Value: uses plus the value of the last victim when it was last used."""
    value: dict[int, int] = {}
    last: dict[int, int] = {}
    uses: Counter[int] = Counter()
    age, hits = 0, []
    for i, key in enumerate(keys):
        hits.append(key in value)
        if key not in value and len(value) == capacity:
            victim = min(value, key=lambda k: (value[k], last[k]))
            age = value.pop(victim)
            uses[victim] = 0
        uses[key] += 1
        value[key], last[key] = uses[key] + age, i
    return hits


def sieve(keys: list[int], capacity: int) -> list[bool]:
    """Algorithm 1 of the paper, the hand as an index into a list with the oldest first."""
    queue: list[int] = []
    visited: set[int] = set()
    hand, hits = 0, []
    for key in keys:
        hits.append(key in queue)
        if key in queue:
            visited.add(key)
            continue
        if len(queue) == capacity:
            while queue[hand] in visited:
                visited.remove(queue[hand])
                hand = (hand + 1) % capacity
            del queue[hand]
            if hand == len(queue):
                hand = 0
        queue.append(key)
    return hits


def two_q(keys: list[int], capacity: int) -> list[bool]:
    """The full version of the paper, the oldest first in every list."""
    a1in: list[int] = []
    a1out: list[int] = []
    am: list[int] = []
    hits = []
    for key in keys:
        hits.append(key in a1in or key in am)
        if key in am:
            am.remove(key)
            am.append(key)
        elif key not in a1in:
            known = key in a1out
            if known:
                a1out.remove(key)
            if len(a1in) + len(am) == capacity:
                if len(a1in) > 0.25 * capacity or not am:
                    a1out.append(a1in.pop(0))
                    if len(a1out) > 0.5 * capacity:
                        del a1out[0]
                else:
                    del am[0]
            (am if known else a1in).append(key)
    return hits


def arc(keys: list[int], capacity: int) -> list[bool]:
    """Figure 4 of the paper, the oldest first in every list."""
    c, p = capacity, 0.0
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    hits = []

    def replace(x: int) -> None:
        if t1 and (len(t1) > p or (x in b2 and len(t1) == p)):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for x in keys:
        hits.append(x in t1 or x in t2)
        if hits[-1]:  # case I
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
        elif x in b1:  # case II
            p = min(c, p + max(len(b2) / len(b1), 1))
            replace(x)
            b1.remove(x)
            t2.append(x)
        elif x in b2:  # case III
            p = max(0, p - max(len(b1) / len(b2), 1))
            replace(x)
            b2.remove(x)
            t2.append(x)
        else:  # case IV
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    del b1[0]
                    replace(x)
                else:
                    del t1[0]
            elif len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    del b2[0]
                replace(x)
            t1.append(x)
    return hits


def w_tinylfu(keys: list[int], capacity: int) -> list[bool]:
    """Of the paper, with exact counts: a window of 1%, an SLRU of 20:80, all halved at times."""
    window_size = max(capacity // 100, 1)
    main_size = capacity - window_size
    window: list[int] = []
    probation: list[int] = []
    protected: list[int] = []
    uses: Counter[int] = Counter()
    counted, hits = 0, []
    for key in keys:
        hit = key in window or key in probation or key in protected
        hits.append(hit)
        if key in probation:
            probation.remove(key)
            protected.append(key)
            if len(protected) > 0.8 * main_size:
                probation.append(protected.pop(0))
        elif hit:
            queue = window if key in window else protected
            queue.remove(key)
            queue.append(key)
        else:
            if len(window) == window_size:
                candidate = window.pop(0)
                main = probation or protected
                if len(probation) + len(protected) < main_size:
                    probation.append(candidate)
                elif main and uses[candidate] > uses[main[0]]:
                    del main[0]
                    probation.append(candidate)
            window.append(key)
        uses[key] = min(uses[key] + 1, 15)
        counted += 1
        if counted >= 10 * max(len(window) + len(probation) + len(protected), 16):
            uses = Counter({k: n // 2 for k, n in uses.items()})
            counted //= 2
    return hits


def most_hits(keys: list[int], capacity: int) -> int:
    """Of all ways to hold at most `capacity` keys, each admitted or not when it is accessed."""
    best = {frozenset[int](): 0}
    for key in keys:
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            now = held | {key}
            choices = [now] if len(now) <= capacity else map(frozenset, combinations(now, capacity))
            for choice in choices:
                after[choice] = max(after.get(choice, 0), hits + (key in held))
        best = after
    return max(best.values())
