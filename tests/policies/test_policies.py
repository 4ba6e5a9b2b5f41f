"""What every policy promises, and what each is known for."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.policies import POLICIES, Item, Policy
from lmc.policies.w_tinylfu import CELLS
from lmc.sim.replay import replay
from tests.policies import models
from tests.policies.traces import hits, trace

MAY_REFUSE = {"name": "belady", "bypass": True}
KEYS = st.lists(st.integers(0, 12), max_size=80)
CAPACITY = st.integers(1, 6)
NAMES = POLICIES.names()
SHORT_TTL = {"name": "ttl", "seconds": 5}
CONFIGS: dict[str, Any] = {name: name for name in NAMES} | {"ttl": SHORT_TTL}


class Place:
    """A caller of a policy that checks every answer."""

    def __init__(self, config: Any, capacity: int) -> None:
        self.policy: Policy = POLICIES.build(config, capacity=capacity)
        self.name = config if isinstance(config, str) else config["name"]
        self.capacity = capacity
        self.held: dict[Any, Item] = {}
        self.used: list[Any] = []  # keys, in order of last use
        self.pinned: set[Any] = set()

    def __contains__(self, key: object) -> bool:
        """Whether a key is pinned: the place is the container that the policy asks."""
        assert key in self.held
        return key in self.pinned

    def leaves(self) -> list[Any]:
        """Held keys that no held item names as its parent, the least recently used first."""
        parents = {item.parent for item in self.held.values()}
        return [key for key in self.used if key not in parents]

    def use(self, key: Any) -> None:
        self.used = [k for k in self.used if k != key] + [key]

    def drop(self, key: Any) -> None:
        del self.held[key]
        self.used.remove(key)
        self.pinned.discard(key)

    def access(self, item: Item, now: float) -> None:
        for key in list(self.policy.expired(now)):
            if key not in self.pinned:
                self.policy.remove(key)
                self.drop(key)
        if item.key in self.held:
            self.use(item.key)
            self.policy.touch(item._replace(size=self.held[item.key].size), now)
        elif item.size <= self.capacity and self.make_room(item, now):
            self.policy.insert(item, now)
            self.held[item.key] = item
            self.use(item.key)
            assert sum(i.size for i in self.held.values()) <= self.capacity

    def make_room(self, item: Item, now: float) -> bool:
        while sum(i.size for i in self.held.values()) + item.size > self.capacity:
            victim = self.policy.evict(item, now, self)
            if victim == item.key:
                assert self.name in ("belady", "leaf_lru")
                return False
            if victim is None:
                free = self.leaves() if self.name == "leaf_lru" else self.held
                assert self.pinned.issuperset(free)
                return False
            assert victim in self.held and victim not in self.pinned
            if self.name == "leaf_lru":
                allowed = [k for k in self.leaves() if k not in self.pinned | {item.parent}]
                assert victim == allowed[0]
            self.drop(victim)
        return True

    def empty(self, now: float) -> None:
        """Evict all: the policy knows what is held, no more and no less."""
        self.pinned.clear()
        # Used before anything else, so that no policy refuses it.
        item = Item("new", next_use=-1.0)
        while self.held:
            self.drop(self.policy.evict(item, now, self))
        assert self.policy.evict(item, now, self) is None


@pytest.mark.parametrize("name", NAMES)
@given(
    accesses=st.lists(
        st.tuples(
            st.integers(0, 15),
            st.integers(1, 8),
            st.integers(0, 2),
            st.sampled_from(["use", "use", "use", "use", "pin", "unpin", "remove"]),
        ),
        max_size=80,
    ),
    capacity=st.integers(1, 20),
)
def test_the_contract(name: str, accesses: list[tuple[int, int, int, str]], capacity: int) -> None:
    place = Place(CONFIGS[name], capacity)
    for now, (key, size, back, action) in enumerate(accesses):
        parent = key - back if 0 < back <= key else None
        one = list(place.held)[-1 - key % len(place.held)] if place.held else None
        if action == "remove" and place.held:
            place.policy.remove(one)
            place.drop(one)
        elif action == "pin" and place.held:
            place.pinned.add(one)
        elif action == "unpin":
            place.pinned.clear()
        else:
            item = Item(key, size, float(size + key), parent, next_use=now + 1 + key % 5)
            place.access(item, float(now))
    place.empty(float(len(accesses)))


MODELS: dict[str, models.Model] = {
    "lru": models.lru,
    "fifo": models.fifo,
    "lfu": models.lfu,
    "lfu_aged": models.lfu_aged,
    "gdsf": models.lfu_aged,  # where all costs and sizes are equal
    "sieve": models.sieve,
    "2q": models.two_q,
    "arc": models.arc,
    "wtinylfu": models.w_tinylfu,
}


@pytest.mark.parametrize("name", MODELS)
@given(KEYS, st.integers(1, 8))
def test_a_policy_does_what_its_paper_says(name: str, keys: list[int], capacity: int) -> None:
    assert hits(keys, capacity, name) == MODELS[name](keys, capacity)


@pytest.mark.parametrize("name", ["lfu_aged", "gdsf", "sieve", "2q", "arc"])
def test_a_policy_with_a_past_keeps_doing_it(name: str) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        keys = (rng.zipf(1.3, 500) % 40).tolist()
        assert hits(keys, 2 + seed, name) == MODELS[name](keys, 2 + seed)


@pytest.mark.parametrize("config", [*NAMES, MAY_REFUSE], ids=[*NAMES, "min"])
def test_only_the_share_of_the_capacity_that_an_item_takes_matters(config: Any) -> None:
    rng = np.random.default_rng(0)
    keys = np.concatenate([rng.zipf(1.1, 3000) % 500, rng.integers(0, 300, 1000)])
    made = trace(keys, per_request=5)
    # A power of two, so that what is a share of the capacity is rounded alike.
    large = np.full(len(keys), 1024)
    ones = replay(made, [100], config).tier
    assert (replay(made, [100 * 1024], config, sizes=large).tier == ones).all()


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 3))
def test_belady_finds_the_most_hits_there_are(keys: list[int], capacity: int) -> None:
    assert sum(hits(keys, capacity, MAY_REFUSE)) == models.most_hits(keys, capacity)


@given(KEYS, CAPACITY, st.integers(1, 5))
def test_belady_is_never_beaten(keys: list[int], capacity: int, per_request: int) -> None:
    best = sum(hits(keys, capacity, MAY_REFUSE, per_request))
    for config in [*CONFIGS.values(), "belady"]:
        assert sum(hits(keys, capacity, config, per_request)) <= best, config


@pytest.mark.parametrize("config", ["lru", MAY_REFUSE, "belady"], ids=["lru", "min", "admits"])
@given(KEYS)
def test_more_capacity_never_hurts(config: Any, keys: list[int]) -> None:
    counts = [sum(hits(keys, capacity, config)) for capacity in range(1, 10)]
    assert all(a <= b for a, b in pairwise(counts))


def test_belady_refuses_what_is_used_last_of_all() -> None:
    policy = POLICIES.build(MAY_REFUSE, capacity=2)
    policy.insert(Item("soon", next_use=3), 0)
    policy.insert(Item("late", next_use=9), 1)
    assert policy.evict(Item("later", next_use=10), 2) == "later"
    assert policy.evict(Item("as late", next_use=9), 2) == "as late"
    assert policy.evict(Item("later", next_use=10), 2, pinned={"soon", "late"}) is None
    assert policy.evict(Item("later", next_use=8), 2, pinned={"late"}) == "later"
    assert policy.evict(Item("sooner", next_use=8), 2) == "late"
    always = POLICIES.build("belady", capacity=1)
    always.insert(Item("soon", next_use=3), 0)
    assert always.evict(Item("later", next_use=10), 1) == "soon"


def test_gdsf_keeps_what_is_dear_for_its_size() -> None:
    policy = POLICIES.build("gdsf", capacity=12)
    policy.insert(Item("dear", size=2, cost=100.0), 0)
    policy.insert(Item("cheap", size=1, cost=10.0), 1)
    policy.insert(Item("large", size=9, cost=80.0), 2)
    assert [policy.evict(Item("new"), 3) for _ in range(3)] == ["large", "cheap", "dear"]


def test_lfu_aged_forgets_what_was_popular_once() -> None:
    keys = [0] * 20 + [1, 2, 3, 1, 2, 3] * 15 + [0]
    assert hits(keys, 3, "lfu")[-1]
    assert not hits(keys, 3, "lfu_aged")[-1]
    assert sum(hits(keys, 3, "lfu_aged")) > sum(hits(keys, 3, "lfu"))


def test_a_scan_does_not_wash_out_what_2q_arc_s3fifo_and_wtinylfu_keep() -> None:
    hot = [1, 2, 3, 4]
    keys = hot * 3 + list(range(100, 108)) + hot + list(range(200, 240)) + hot
    assert sum(hits(keys, 12, "lru")[-4:]) == 0
    for name in ("arc", "s3fifo", "wtinylfu"):
        assert sum(hits(keys, 12, name)[-4:]) == 4, name
    # 2Q wants a second coming after the first queue let go.
    again = hot + list(range(100, 110)) + hot + list(range(200, 240)) + hot
    assert sum(hits(again, 12, "2q")[-4:]) == 4


@pytest.mark.parametrize("name", ["2q", "s3fifo"])
def test_the_item_that_goes_does_not_push_the_newcomer_out_of_the_ghost(name: str) -> None:
    policy = POLICIES.build(name, capacity=4)
    for now, key in enumerate(range(10)):
        if now >= 4:
            policy.evict(Item(key), now)
        policy.insert(Item(key), now)
    ghost = policy._out if name == "2q" else policy._ghost  # type: ignore[attr-defined]
    oldest = next(iter(ghost))
    policy.evict(Item(oldest), 10)
    policy.insert(Item(oldest), 10)
    assert oldest in policy._main  # type: ignore[attr-defined]


def test_leaves_go_before_what_they_continue() -> None:
    policy = POLICIES.build("leaf_lru", capacity=4)
    for now, (key, parent) in enumerate([("a", None), ("b", "a"), ("c", "b"), ("x", None)]):
        policy.insert(Item(key, parent=parent), now)
    policy.touch(Item("c", parent="b"), 9)
    assert policy.evict(Item("new"), 10) == "x"
    assert policy.evict(Item("new"), 11, pinned={"c"}) is None
    assert [policy.evict(Item("new"), 12) for _ in range(4)] == ["c", "b", "a", None]


def test_a_parent_that_comes_after_its_child_is_kept_for_it() -> None:
    policy = POLICIES.build("leaf_lru", capacity=2)
    policy.insert(Item("child", parent="parent"), 0)
    policy.insert(Item("parent"), 1)
    policy.touch(Item("child", parent="parent"), 2)
    assert policy.evict(Item("new"), 3) == "child"


def test_leaf_lru_keeps_what_the_newcomer_continues() -> None:
    policy = POLICIES.build("leaf_lru", capacity=1)
    policy.insert(Item("a"), 0)
    assert policy.evict(Item("b", parent="a"), 1) == "b"
    assert policy.evict(Item("b", parent="a"), 1, pinned={"a"}) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40), CAPACITY)
def test_chunks_that_follow_each_other_in_circles_can_all_go(
    pairs: list[tuple[int, int]], capacity: int
) -> None:
    policy = POLICIES.build("leaf_lru", capacity=capacity)
    held: set[Any] = set()
    for now, (key, parent) in enumerate(pairs):
        item = Item(key, parent=parent)
        if key in held:
            policy.touch(item, now)
        elif len(held) < capacity:
            policy.insert(item, now)
            held.add(key)
        elif (victim := policy.evict(item, now)) != key:
            held.remove(victim)
            policy.insert(item, now)
            held.add(key)
    assert {policy.evict(Item("new"), 99) for _ in held} == held


def test_ttl_counts_from_the_first_day() -> None:
    policy = POLICIES.build({"name": "ttl", "seconds": 10}, capacity=4)
    policy.insert(Item("a"), 0)
    policy.insert(Item("b"), 5)
    policy.touch(Item("a"), 9)
    assert list(policy.expired(9.9)) == []
    assert list(policy.expired(10)) == ["a"]
    assert list(policy.expired(15)) == ["a", "b"]
    with pytest.raises(ValueError, match="seconds 0"):
        POLICIES.build({"name": "ttl", "seconds": 0}, capacity=4)


def test_a_place_says_its_own_capacity() -> None:
    with pytest.raises(ValueError, match="capacity"):
        POLICIES.build({"name": "lru", "capacity": 3}, capacity=4)
    with pytest.raises(ValueError, match=r"'mru'.*belady.*s3fifo"):
        POLICIES.build("mru", capacity=4)


def entries(x: object) -> int:
    """Entries of all containers that x holds on to."""
    if isinstance(x, dict):
        return len(x) + sum(map(entries, x)) + sum(map(entries, x.values()))
    if isinstance(x, list | tuple | set):
        return len(x) + sum(map(entries, x))
    return entries(vars(x)) if hasattr(x, "__dict__") else 0


@pytest.mark.parametrize("hit_rate", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", NAMES)
def test_memory_is_bounded_by_the_capacity(name: str, hit_rate: float) -> None:
    place = Place(CONFIGS[name], 20)
    rng = np.random.default_rng(0)
    for now in range(5000):
        key = int(rng.integers(0, 10)) if rng.random() < hit_rate else 100 + now
        place.access(Item(key, parent=key - 1, next_use=now + 1 + key % 50), float(now))
        if now % 7 == 0 and place.held:
            gone = next(iter(place.held))
            place.policy.remove(gone)
            place.drop(gone)
        if now % 50 == 0:
            # A heap may have 2 entries of 4 for each unit, and 64 more.
            assert entries(place.policy) <= 30 * 20
    if name == "wtinylfu":
        assert place.policy._sketch.width <= 2 * CELLS * 20  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_removed_leaves_nothing_behind(name: str) -> None:
    policy = POLICIES.build(CONFIGS[name], capacity=20)
    for now in range(2000):
        policy.insert(Item(now, parent=now - 1, next_use=now + 50), now)
        if now >= 10:
            policy.remove(now - 10)
    assert entries(policy) <= 30 * 20


def test_none_of_it_imports_torch() -> None:
    code = (
        "import sys; from lmc.policies import POLICIES\n"
        "for n in POLICIES.names(): POLICIES.build(n, capacity=9)\n"
        "assert not {'torch', 'transformers', 'vllm', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["arc", "2q", "fifo", "lfu", "lru", "sieve", "ttl"])
def test_what_is_in_use_is_not_looked_at_for_each_that_goes(name: str) -> None:
    """A long prompt that is held: every chunk that another leaves would walk over all of it."""

    class Pinned(set[Any]):
        asked = 0

        def __contains__(self, key: object) -> bool:
            self.asked += 1
            return super().__contains__(key)

    n = 500
    policy = POLICIES.build(name, capacity=2 * n)
    pinned = Pinned(range(n))
    for key in range(2 * n):
        policy.insert(Item(key), 0.0)
        if key < n:
            policy.touch(Item(key), 0.0)
    for key in range(2 * n, 4 * n):
        victim = policy.evict(Item(key), 0.0, pinned)
        assert victim is not None and not set.__contains__(pinned, victim)
        policy.insert(Item(key), 0.0)
    assert pinned.asked < 12 * n
