"""Stack distances against a naive stack and the real LRU; estimates against the truth."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.policies import Item
from lmc.sim.replay import MISS, MetadataTier, prefix_run, replay
from lmc.sim.stack import NEVER, hit_curve, prefix_distances, shards, stack_distances
from lmc.sim.trace import Accesses, Request, accesses

Trace = tuple[np.ndarray, np.ndarray]


@st.composite
def traces(draw: st.DrawFn, largest: int = 9) -> Trace:
    """Keys [A] numbered by first appearance, and a size per access, the same for one key."""
    names = draw(st.lists(st.integers(0, 12), max_size=80))
    numbers: dict[int, int] = {}
    keys = np.array([numbers.setdefault(n, len(numbers)) for n in names], dtype=np.int64)
    size_of = draw(st.lists(st.integers(1, largest), min_size=len(numbers), max_size=len(numbers)))
    return keys, np.array(size_of, dtype=np.int64)[keys]


def naive(keys: np.ndarray, sizes: np.ndarray) -> list[int]:
    """The recency stack as a list."""
    stack: list[tuple[int, int]] = []
    distances = []
    for item in zip(keys.tolist(), sizes.tolist(), strict=True):
        if item in stack:
            place = stack.index(item)
            distances.append(sum(size for _, size in stack[: place + 1]))
            del stack[place]
        else:
            distances.append(NEVER)
        stack.insert(0, item)
    return distances


def as_accesses(keys: np.ndarray, offsets: list[int] | None = None) -> Accesses:
    offsets = offsets or [0, len(keys)]
    ones = np.ones(len(offsets) - 1, dtype=np.int64)
    return Accesses(
        keys, np.ones_like(keys), np.array(offsets), np.arange(len(ones)) * 1.0, ones, ones, 1
    )


def zipf(n: int, seed: int) -> np.ndarray:
    """[n] keys: 60% are new, the others any earlier one, the older the more popular."""
    rng = np.random.default_rng(seed)
    new = rng.random(n) < 0.6
    new[0] = True
    so_far = np.cumsum(new)
    return np.where(new, so_far - 1, (so_far ** rng.random(n)).astype(np.int64) - 1)


@given(trace=traces())
def test_distances_are_those_of_a_naive_stack(trace: Trace) -> None:
    keys, sizes = trace
    assert stack_distances(keys, sizes).tolist() == naive(keys, sizes)
    assert stack_distances(keys).tolist() == naive(keys, np.ones_like(keys))


@pytest.mark.parametrize("unique", [1, 2, 3, 7, 64])
def test_time_slots_run_out_many_times(unique: int) -> None:
    """2 U slots serve 40 U accesses."""
    rng = np.random.default_rng(unique)
    keys = np.concatenate([np.arange(unique), rng.integers(0, unique, 40 * unique)])
    sizes = rng.integers(1, 1 << 40, unique)[keys]
    assert stack_distances(keys, sizes).tolist() == naive(keys, sizes)


@given(trace=traces())
def test_a_distance_is_the_capacity_at_which_lru_hits(trace: Trace) -> None:
    keys, sizes = trace
    for given_sizes in (None, sizes):
        largest = 1 if given_sizes is None else int(sizes.max(initial=1))
        distances = stack_distances(keys, given_sizes)
        for capacity in {largest, largest + 1, largest + 2, 2 * largest, 20, 100}:
            if capacity >= largest:
                hit = replay(as_accesses(keys), [capacity], "lru", sizes=given_sizes).tier != MISS
                assert hit.tolist() == (distances <= capacity).tolist()


@given(trace=traces(), capacity=st.integers(1, 9))
def test_items_that_never_enter_only_add_hits(trace: Trace, capacity: int) -> None:
    """Capacities below the largest size, at which `replay` turns items away."""
    keys, sizes = trace
    hit = replay(as_accesses(keys), [capacity], "lru", sizes=sizes).tier != MISS
    assert (hit >= (stack_distances(keys, sizes) <= capacity)).all()


def test_an_item_that_never_enters_empties_the_stack_and_not_the_place() -> None:
    keys, sizes = np.array([0, 1, 0]), np.array([1, 10, 1])
    assert stack_distances(keys, sizes).tolist() == [NEVER, NEVER, 11]
    tiers = [replay(as_accesses(keys), [c], "lru", sizes=sizes).tier[2] for c in (9, 10, 11)]
    assert tiers == [0, MISS, 0]  # more capacity, fewer hits: no one distance says that


@given(trace=traces(), cuts=st.sets(st.integers(0, 80)), capacity=st.integers(1, 12))
def test_prefix_distances_are_the_capacities_of_the_run_of_hits(
    trace: Trace, cuts: set[int], capacity: int
) -> None:
    keys, _ = trace
    offsets = [0, *sorted(c for c in cuts if c < len(keys)), len(keys)]
    requests = as_accesses(keys, offsets)
    hit = replay(requests, [capacity], "lru").tier != MISS
    found = prefix_distances(stack_distances(keys), requests.offsets)
    assert (found <= capacity).tolist() == prefix_run(hit, requests).tolist()
    assert (found <= capacity).tolist() == looked_up_as_a_whole(keys, offsets, capacity)


def looked_up_as_a_whole(keys: np.ndarray, offsets: list[int], capacity: int) -> list[bool]:
    """What is in the run of hits when a request is looked up before any of it is used."""
    tier = MetadataTier(capacity, "lru")
    in_run: list[bool] = []
    for start, end in pairwise(offsets):
        request = keys[start:end].tolist()
        run = len(list(takewhile(tier.__contains__, request)))
        in_run += [i < run for i in range(len(request))]
        for item in map(Item, request):
            if not tier.use(item, 0.0):
                tier.put(item, 0.0)
    return in_run


@given(trace=traces(), tokens=st.integers(1, 512))
def test_curve_rises_from_0_and_says_the_share_of_hits(trace: Trace, tokens: int) -> None:
    keys, sizes = trace
    distances = stack_distances(keys, sizes)
    curve = hit_curve(distances, sizes * tokens)
    again = distances[distances != NEVER]
    assert curve.capacity.tolist() == sorted(set(again.tolist()))
    assert (np.diff(curve.hit_rate) > 0).all()
    assert curve.at([0]).tolist() == [0.0]
    for capacity in (1, 5, 20, 1000):
        hits = sizes[distances <= capacity].sum()
        assert curve.at([capacity])[0] == pytest.approx(hits / max(sizes.sum(), 1), abs=1e-12)
    assert curve.infinite == curve.at([NEVER])[0]


def test_total_counts_what_the_accesses_do_not_say() -> None:
    distances = stack_distances(np.array([0, 1, 0, 1]))
    assert hit_curve(distances, np.full(4, 10), total=80).at([1, 2]).tolist() == [0.0, 0.25]
    assert hit_curve(distances).at([1, 2]).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("keys", [[], [0], [0, 1, 2]], ids=["empty", "one", "new_alone"])
def test_a_trace_without_reuse(keys: list[int]) -> None:
    array = np.array(keys, dtype=np.int64)
    distances = stack_distances(array)
    assert distances.tolist() == [NEVER] * len(keys)
    offsets = np.array([0, len(keys)])
    assert prefix_distances(distances, offsets).tolist() == distances.tolist()
    for curve in (hit_curve(distances), shards(array, rate=1.0)):
        assert curve.infinite == 0
        assert curve.at([0, 1, 1000]).tolist() == [0.0, 0.0, 0.0]


@given(trace=traces())
def test_sampling_all_keys_is_exact(trace: Trace) -> None:
    keys, sizes = trace
    estimate = shards(keys, sizes, rate=1.0)
    exact = hit_curve(stack_distances(keys, sizes))
    capacities = np.arange(200)
    np.testing.assert_allclose(estimate.at(capacities), exact.at(capacities), rtol=0, atol=1e-12)
    assert not estimate.error_at(capacities).any()


@pytest.mark.parametrize("sized", [False, True], ids=["unit_sizes", "varied_sizes"])
def test_two_standard_errors_cover_the_truth(sized: bool) -> None:
    """About as often as they should, neither less nor because they are too wide."""
    keys = zipf(60_000, seed=1)
    sizes = np.random.default_rng(2).integers(1, 9, len(keys))[keys] if sized else None
    capacities = np.array([300, 1000, 3000, 10_000, 30_000]) * (5 if sized else 1)
    truth = hit_curve(stack_distances(keys, sizes)).at(capacities)
    # One seed misses at all capacities or at none, so it takes many to tell.
    curves = [shards(keys, sizes, rate=0.1, seed=seed) for seed in range(100)]
    off = np.array([c.at(capacities) for c in curves]) - truth
    error = np.array([c.error_at(capacities) for c in curves])
    assert (abs(off) <= 2 * error).mean() >= 0.88  # 0.94 by Student's t of 16 groups
    ratio = np.sqrt((error**2).mean(axis=0) / (off**2).mean(axis=0))
    assert (abs(ratio - 1) < 0.15).all()


def test_a_very_popular_key_does_not_spoil_the_estimate() -> None:
    """A third of the accesses go to one key, which most samples do not have."""
    keys = np.repeat(zipf(20_000, seed=3) + 1, 2)
    keys[::3] = 0
    _, keys = np.unique(keys, return_inverse=True)
    truth = hit_curve(stack_distances(keys)).infinite
    curves = [shards(keys, rate=0.1, seed=seed) for seed in range(10)]
    assert max(abs(c.infinite - truth) for c in curves) < 0.06


def test_an_estimate_is_a_rate_where_the_sample_is_too_large() -> None:
    """All keys go round, so there are no popular ones to take the accesses in excess from."""
    keys = np.tile(np.arange(100), 20)
    curves = [shards(keys, rate=0.1, seed=seed) for seed in range(10)]
    for c in curves:
        assert c.hit_rate[0] >= 0 and c.hit_rate[-1] <= 1 and (np.diff(c.hit_rate) >= 0).all()
    assert any(c.hit_rate[0] == 0 for c in curves)  # would be below 0


KEYS = np.array([0, 1, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stack_distances(np.array([0, -1])), "keys: got -1"),
        (lambda: stack_distances(np.array([0, 2])), r"keys: got 0 to 2, want all in \[0, 2\)"),
        (lambda: stack_distances(np.array([0.0, 1.0])), "keys: got float64"),
        (lambda: stack_distances(KEYS, np.array([1, 2])), r"sizes: got int64 \(2,\)"),
        (lambda: stack_distances(KEYS, np.array([1, 0, 1])), "sizes: got 0"),
        (lambda: stack_distances(KEYS, np.array([1, 2, 3])), "sizes: got 3 at access 2 to key 0"),
        (lambda: prefix_distances(KEYS, np.array([0, 2])), "offsets"),
        (lambda: prefix_distances(KEYS, np.array([0, 2, 1, 3])), "offsets"),
        (lambda: hit_curve(KEYS, np.array([1, 2])), "weights: got 2, want 3"),
        (lambda: hit_curve(KEYS, np.array([1, 2, -1])), "weights: .*none below 0"),
        (lambda: hit_curve(KEYS, np.zeros(3)), "total: got 0"),
        (lambda: hit_curve(KEYS, total=2), "total: got 2, want .* at least the weights' 3"),
        (lambda: shards(KEYS, rate=0.0), "rate: got 0"),
        (lambda: shards(KEYS, rate=1.1), "rate: got 1.1"),
        (lambda: shards(KEYS, rate=float("nan")), "rate: got nan"),
        (lambda: shards(KEYS, rate=1e-12), "samples none of 2 keys"),
        (lambda: shards(np.array([-1]), rate=1.0), "keys: got -1"),
        (lambda: shards(KEYS, np.array([1, 2, 3]), rate=1.0), "sizes: got 3"),
    ],
)
def test_wrong_values(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_mooncake_conversation() -> None:
    """What other simulators of this trace say (libCacheSim 0.3.5; LMCache counts prefixes)."""
    if "LMC_DATA" not in os.environ:
        pytest.skip("LMC_DATA, a folder with mooncake_conversation.jsonl, is not set")
    with (Path(os.environ["LMC_DATA"]) / "mooncake_conversation.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    trace = accesses(
        Request(
            r["timestamp"] / 1000, "", r["input_length"], r["output_length"], r["hash_ids"], 512
        )
        for r in rows
    )
    capacities = [1000, 10_000, 30_000, 50_000]
    assert len(trace.keys) == 288_500
    blocks = hit_curve(stack_distances(trace.keys))
    assert blocks.at(capacities).round(4).tolist() == [0.0445, 0.2112, 0.3257, 0.3546]
    assert round(blocks.infinite, 4) == 0.3664

    full = trace.full_blocks()
    assert len(full.keys) == 276_491
    distances = prefix_distances(stack_distances(full.keys), full.offsets)
    prefix = hit_curve(distances, full.tokens, total=int(full.input_tokens.sum()))
    assert prefix.at(capacities).round(4).tolist() == [0.0457, 0.2192, 0.3370, 0.3628]
