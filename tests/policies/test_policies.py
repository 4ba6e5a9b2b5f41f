"""What every policy promises, and what each is known for."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from itertools import pairwise
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.policies import POLICIES, Item, Policy, build_policy
from lmc.sim.replay import MISS, replay
from lmc.sim.trace import Accesses
from tests.policies.traces import trace

KEYS = st.lists(st.integers(0, 12), max_size=80)
NAMES = POLICIES.names()


class Place:
    """A caller that checks every answer."""

    def __init__(self, policy: Policy, capacity: int) -> None:
        self.policy, self.capacity = policy, capacity
        self.held: dict[int, Item] = {}

    @property
    def size(self) -> int:
        return sum(item.size for item in self.held.values())

    def access(self, item: Item, now: float, pinned: set[int]) -> str:
        for key in list(self.policy.expired(now)):
            self.policy.remove(key)
            del self.held[key]  # type: ignore[arg-type]
        if item.key in self.held:
            self.policy.touch(self.held[item.key]._replace(next_use=item.next_use), now)  # type: ignore[index]
            return "hit"
        if item.size > self.capacity:
            return "large"
        while self.size + item.size > self.capacity:
            before = len(self.held)
            victim = self.policy.evict(item, now, pinned)
            if victim is None:
                return "pinned"
            if victim == item.key:
                return "refused"
            assert victim not in pinned
            del self.held[victim]  # type: ignore[arg-type]
            assert len(self.held) == before - 1
        self.policy.insert(item, now)
        self.held[item.key] = item  # type: ignore[index]
        assert self.size <= self.capacity
        return "put"


@pytest.mark.parametrize("name", NAMES)
@given(
    accesses=st.lists(
        st.tuples(
            st.integers(0, 15),
            st.integers(1, 8),
            st.sampled_from(["use", "use", "use", "pin", "unpin", "remove"]),
        ),
        max_size=80,
    ),
    capacity=st.integers(1, 20),
)
def test_the_contract(name: str, accesses: list[tuple[int, int, str]], capacity: int) -> None:
    place = Place(build_policy(name, capacity), capacity)
    pinned: set[int] = set()
    for now, (key, size, action) in enumerate(accesses):
        item = Item(key, size, float(size), parent=key - 1 if key % 4 else None, next_use=now + key)
        if action == "remove" and key in place.held and key not in pinned:
            place.policy.remove(key)
            del place.held[key]
        elif action == "pin" and key in place.held:
            pinned.add(key)
        elif action == "unpin":
            pinned.discard(key)
        else:
            outcome = place.access(item, float(now), pinned)
            if outcome == "pinned":
                assert pinned or name == "leaf_lru"
        assert pinned <= place.held.keys()


def hits(keys: Iterable[int], capacity: int, policy: Any) -> list[bool]:
    made = trace(np.array(list(keys), dtype=np.int64))
    return (replay(made, [capacity], policy).tier != MISS).tolist()


def naive(keys: list[int], capacity: int, worst: Any) -> list[bool]:
    """A cache whose victim is the held key that `worst` puts first; it is given the history."""
    held: list[int] = []
    out = []
    for i, key in enumerate(keys):
        out.append(key in held)
        if key not in held:
            if len(held) == capacity:
                held.remove(min(held, key=lambda k: worst(keys[:i], k, out)))
            held.append(key)
    return out


def last_use(history: list[int], key: int) -> int:
    return max(i for i, k in enumerate(history) if k == key)


def arrival(history: list[int], key: int, out: list[bool]) -> int:
    return max(i for i, k in enumerate(history) if k == key and not out[i])


@given(KEYS, st.integers(1, 6))
def test_lru_fifo_and_lfu_are_what_their_names_say(keys: list[int], capacity: int) -> None:
    def uses(history: list[int], key: int, out: list[bool]) -> tuple[int, int]:
        since = arrival(history, key, out)
        return history[since:].count(key), last_use(history, key)

    assert hits(keys, capacity, "lru") == naive(keys, capacity, lambda h, k, _: last_use(h, k))
    assert hits(keys, capacity, "fifo") == naive(keys, capacity, arrival)
    assert hits(keys, capacity, "lfu") == naive(keys, capacity, uses)


@given(KEYS, st.integers(1, 6))
def test_belady_is_never_beaten(keys: list[int], capacity: int) -> None:
    best = sum(hits(keys, capacity, "belady"))
    for name in NAMES:
        assert sum(hits(keys, capacity, name)) <= best, name


@pytest.mark.parametrize("name", ["lru", "belady"])
@given(KEYS)
def test_more_capacity_never_hurts(name: str, keys: list[int]) -> None:
    counts = [sum(hits(keys, capacity, name)) for capacity in range(1, 10)]
    assert all(a <= b for a, b in pairwise(counts))


@given(KEYS, st.integers(1, 6))
def test_gdsf_with_equal_costs_is_lfu_with_ageing(keys: list[int], capacity: int) -> None:
    assert hits(keys, capacity, "gdsf") == hits(keys, capacity, "lfu_aged")


def test_gdsf_keeps_what_is_dear() -> None:
    policy = build_policy("gdsf", 2)
    policy.insert(Item("dear", cost=100.0), 0)
    policy.insert(Item("cheap", cost=1.0), 1)
    assert policy.evict(Item("new"), 2) == "cheap"


def test_sieve_by_hand() -> None:
    # For d the hand clears a and evicts b; for e it goes on at c, though a is older.
    found = hits(b"abcadead", 3, "sieve")
    assert found == [False, False, False, True, False, False, True, True]


def test_a_scan_does_not_wash_out_what_2q_arc_and_s3fifo_keep() -> None:
    hot = [1, 2, 3, 4]
    keys = hot * 3 + list(range(100, 108)) + hot + list(range(200, 240)) + hot
    assert sum(hits(keys, 12, "lru")[-4:]) == 0
    assert sum(hits(keys, 12, "arc")[-4:]) == 4
    assert sum(hits(keys, 12, "s3fifo")[-4:]) == 4
    assert sum(hits(keys, 12, "wtinylfu")[-4:]) == 4
    # 2Q wants a second coming after the first queue let go.
    again = hot + list(range(100, 110)) + hot + list(range(200, 240)) + hot
    assert sum(hits(again, 12, "2q")[-4:]) == 4


def test_leaves_go_before_what_they_continue() -> None:
    policy = build_policy("leaf_lru", 4)
    for now, (key, parent) in enumerate([("a", None), ("b", "a"), ("c", "b"), ("x", None)]):
        policy.insert(Item(key, parent=parent), now)
    policy.touch(Item("c", parent="b"), 9)
    assert policy.evict(Item("new"), 10) == "x"
    assert policy.evict(Item("new"), 11, pinned={"c"}) is None
    assert [policy.evict(Item("new"), 12) for _ in range(4)] == ["c", "b", "a", None]


def test_leaf_lru_keeps_what_the_newcomer_continues() -> None:
    policy = build_policy("leaf_lru", 1)
    policy.insert(Item("a"), 0)
    assert policy.evict(Item("b", parent="a"), 1) == "b"


def test_ttl_counts_from_the_first_day() -> None:
    policy = build_policy({"name": "ttl", "seconds": 10}, 4)
    policy.insert(Item("a"), 0)
    policy.insert(Item("b"), 5)
    policy.touch(Item("a"), 9)
    assert list(policy.expired(9.9)) == []
    assert list(policy.expired(10)) == ["a"]
    with pytest.raises(ValueError, match="seconds 0"):
        build_policy({"name": "ttl", "seconds": 0}, 4)


def test_a_place_says_its_own_capacity() -> None:
    with pytest.raises(ValueError, match="capacity"):
        build_policy({"name": "lru", "capacity": 3}, 4)
    with pytest.raises(ValueError, match=r"'mru'.*belady.*s3fifo"):
        build_policy("mru", 4)


def objects(root: object) -> int:
    """How many objects a policy holds on to."""
    seen, todo = {id(root)}, [root]
    while todo:
        for child in gc.get_referents(todo.pop()):
            plain = isinstance(child, type | ModuleType | FunctionType | str | int | float)
            if not plain and child is not None and id(child) not in seen:
                seen.add(id(child))
                todo.append(child)
    return len(seen) + sum(
        len(x) for x in (o for o in gc.get_objects() if id(o) in seen) if isinstance(x, dict | list)
    )


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_trace(name: str) -> None:
    def after(n: int) -> int:
        place = Place(build_policy(name, 20), 20)
        rng = np.random.default_rng(0)
        for now in range(n):
            key = now if rng.random() < 0.5 else int(rng.integers(0, 10)) - 20
            place.access(Item(key, next_use=now + abs(key) % 50), float(now), set())
        return objects(place.policy)

    assert after(6000) < 2 * after(1500) + 100


def test_none_of_it_imports_torch(mixed: Accesses) -> None:
    import subprocess

    code = (
        "import sys; from lmc.policies import POLICIES, build_policy\n"
        "for n in POLICIES.names(): build_policy(n, 9)\n"
        "assert not {'torch', 'vllm', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
