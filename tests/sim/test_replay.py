"""Replay in tiers, the arrays behind it, and sweeps over policies and capacities."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.chunking import CHUNKERS
from lmc.chunking.fixed import Fixed
from lmc.model.shape import shape
from lmc.sim.replay import MISS, MetadataTier, prefix_run, replay
from lmc.sim.store import replay_store
from lmc.sim.sweep import (
    block_costs,
    lru_rows,
    parse_capacity,
    store_sweep,
    sweep,
)
from lmc.sim.trace import Accesses, Request, accesses
from tests.policies.traces import trace

SMALL = shape("smollm2-135m")
BLOCKS = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 4)),
    min_size=1,
    max_size=8,
)


def blocks(*prompts: list[int], partial: int = 4) -> list[Request]:
    """Prompts of blocks of 4 tokens, the last with `partial` of them, a second apart."""
    return [
        Request(float(i), "", 4 * len(ids) - 4 + partial, 1, blocks=ids, block_tokens=4)
        for i, ids in enumerate(prompts)
    ]


def text(*prompts: str) -> list[Request]:
    """Prompts whose token ids are characters, a second apart."""
    ids = [np.frombuffer(p.encode(), dtype=np.uint8).astype(np.int32) for p in prompts]
    return [Request(float(i), "s", len(t), 1, tokens=t) for i, t in enumerate(ids)]


def test_accesses_by_hand() -> None:
    a = accesses(blocks([7, 8], [7, 9, 9], partial=1))
    assert a.keys.tolist() == [0, 1, 0, 2, 2]
    assert a.tokens.tolist() == [4, 1, 4, 4, 1]
    assert a.offsets.tolist() == [0, 2, 5]
    assert a.starts().tolist() == [0, 4, 0, 4, 8]
    assert a.next_use().tolist() == [2, math.inf, math.inf, 4, math.inf]
    assert (a.requests, a.unique, a.block_tokens) == (2, 3, 4)
    full = a.full_blocks()
    assert full.keys.tolist() == [0, 0, 1]
    assert full.offsets.tolist() == [0, 1, 3]
    assert full.input_tokens.tolist() == [5, 9]


def test_requests_are_replayed_in_order_of_arrival() -> None:
    late, early = blocks([1], [2])
    a = accesses([Request(9.0, "", 4, 0, blocks=[1], block_tokens=4), early])
    assert (a.timestamps.tolist(), late.timestamp) == ([1.0, 9.0], 0.0)


def test_chunks_are_named_by_context_or_by_content() -> None:
    prompts = text("aaaabbbb", "ccccbbbbxx")
    chained = accesses(prompts, Fixed(4))
    assert chained.keys.tolist() == [0, 1, 2, 3, 4]
    content = accesses(prompts, Fixed(4), context=False)
    assert content.keys.tolist() == [0, 1, 2, 1, 3]
    assert content.tokens.tolist() == [4, 4, 4, 4, 2]


@pytest.mark.parametrize(
    ("requests", "chunker", "message"),
    [
        ([], None, "no requests"),
        ([Request(0.0, "", 4, 0)], Fixed(4), "lengths only"),
        (text("aaaa"), None, "chunker"),
        ([*blocks([1]), Request(0.0, "", 4, 0, blocks=[1], block_tokens=8)], None, r"\[4, 8\]"),
    ],
)
def test_what_cannot_be_replayed(requests: list[Request], chunker: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accesses(requests, chunker)  # type: ignore[arg-type]


def test_write_through_and_promotion_by_hand() -> None:
    # One block above, two below. 1 falls out of the first tier, is found below and promoted.
    done = replay(trace(np.array([1, 2, 1, 1, 3, 2])), [1, 2])
    assert done.tier.tolist() == [MISS, MISS, 1, 0, MISS, MISS]
    # Above: four new ones and the promotion. Below: four new ones; 2 went for 3.
    assert done.written == [5, 4]


def test_write_back_writes_what_leaves() -> None:
    done = replay(trace(np.array([1, 2, 3, 1, 2])), [1, 2], write="back")
    # 1, then 2, go down as they leave; 1 is promoted, for which 3 goes down and 2 is lost.
    assert done.tier.tolist() == [MISS, MISS, MISS, 1, MISS]
    assert done.written == [5, 3]
    through = replay(trace(np.array([1, 2, 3, 1, 2])), [1, 2])
    assert through.tier.tolist() == [MISS, MISS, MISS, MISS, MISS]


@given(BLOCKS, st.integers(1, 6), st.integers(1, 12), st.sampled_from(["through", "back"]))
def test_tiers_hold_no_more_than_they_can(
    made: list[tuple[list[int], int]], high: int, low: int, write: str
) -> None:
    requests = [
        Request(float(i), "", 4 * len(ids) - 4 + part, 0, blocks=ids, block_tokens=4)
        for i, (ids, part) in enumerate(made)
    ]
    a = accesses(requests)
    sizes = 1 + a.keys % 3
    done = replay(a, [high, low], sizes=sizes, write=write)  # type: ignore[arg-type]
    alone = replay(a, [high], sizes=sizes)
    # What stands below changes nothing above.
    assert ((done.tier == 0) == (alone.tier == 0)).all()
    assert done.hits >= alone.hits
    everything = replay(a, [int(sizes.sum())])
    assert done.hits <= everything.hits == len(a.keys) - a.unique


def test_what_the_first_tier_cannot_take_is_written_to_the_next() -> None:
    a = trace(np.array([1, 1]))
    done = replay(a, [3, 9], sizes=np.array([5, 5]), write="back")
    assert done.tier.tolist() == [MISS, 1]


def test_an_item_larger_than_a_tier_never_enters_it() -> None:
    a = trace(np.array([1, 1, 2, 2]))
    sizes = np.array([5, 5, 1, 1])
    assert replay(a, [3], sizes=sizes).tier.tolist() == [MISS, MISS, MISS, 0]


def test_ttl_is_counted_in_the_time_of_the_trace() -> None:
    made = [Request(t, "", 4, 0, blocks=[1], block_tokens=4) for t in (0.0, 9.0, 11.0, 12.0)]
    done = replay(accesses(made), [5], {"name": "ttl", "seconds": 10})
    assert done.tier.tolist() == [MISS, 0, MISS, 0]


def test_prefix_run_ends_at_the_first_miss() -> None:
    a = accesses(blocks([1, 2, 3], [1, 2, 3], [1]))
    hit = np.array([1, 0, 1, 0, 1, 1, 1], dtype=bool)
    assert prefix_run(hit, a).tolist() == [True, False, False, False, False, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacities": []}, "capacities"),
        ({"capacities": [0]}, r"\[0\]"),
        ({"capacities": [3], "write": "around"}, "'around'"),
        ({"capacities": [3], "sizes": np.array([1])}, "sizes: got 1 values, want 2"),
        ({"capacities": [3], "costs": np.array([1, 0])}, "costs"),
        ({"capacities": [3], "policy": "mru"}, "'mru'"),
    ],
)
def test_wrong_replays(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay(trace(np.array([1, 2])), **arguments)


def test_a_tier_counts_what_it_holds() -> None:
    tier = MetadataTier(10, "fifo")
    from lmc.policies import Item

    assert tier.put(Item("a", 6), 0.0) == []
    assert [item.key for item in tier.put(Item("b", 5), 1.0)] == ["a"]
    assert [item.key for item in tier.put(Item("large", 11), 2.0)] == ["large"]
    assert (tier.size, tier.written, "a" in tier, "b" in tier) == (5, 11, False, True)


def test_capacities_as_text() -> None:
    assert parse_capacity("1000") == (1000.0,)
    assert parse_capacity("1k+2.5M+inf") == (1000.0, 2_500_000.0, math.inf)
    assert parse_capacity("2 GiB") == (float(2 << 30),)
    for wrong in ("", "0", "-1", "1x", "k", "1+", "1e999999x"):
        with pytest.raises(ValueError, match="capacity"):
            parse_capacity(wrong)


def test_units_agree() -> None:
    a = accesses(blocks([1, 2], [1, 3], [1, 2]))
    by_unit = {
        "blocks": 2,
        "tokens": 8,
        "bytes": 8 * SMALL.bytes_per_token(),
    }
    hits = [
        [o.hits for o in sweep(a, ["lru"], [(c,)], unit=unit, model=SMALL)]  # type: ignore[arg-type]
        for unit, c in by_unit.items()
    ]
    assert hits == [[2]] * 3


def test_metrics_by_hand() -> None:
    a = accesses(blocks([1, 2, 5], [1, 2, 6], partial=3))
    (objects,) = sweep(a, ["lru"], [(math.inf,)], model=SMALL)
    assert (objects.accesses, objects.hits, objects.row()["capacity"]) == (6, 2, "inf")
    (prefix,) = sweep(a, ["lru"], [(math.inf,)], metric="prefix", model=SMALL)
    assert (prefix.accesses, prefix.hits) == (22, 8)  # tokens
    assert prefix.loaded.tolist() == [[0], [8]]
    assert prefix.rows.tolist() == [11, 3]
    assert prefix.pairs.tolist() == [66, 9 + 10 + 11]
    json.dumps(prefix.row(), allow_nan=False)


def test_the_last_token_is_always_computed() -> None:
    a = accesses(blocks([1, 2], [1, 2]))
    (o,) = sweep(a, ["lru"], [(9.0,)], metric="prefix", model=SMALL)
    assert o.rows.tolist() == [8, 1]
    assert o.pairs.tolist() == [36, 8]


def test_tiers_are_told_apart() -> None:
    a = trace(np.array([1, 2, 3, 1, 2]))
    (o,) = sweep(a, ["lru"], [(1.0, 2.0)], write="back", model=SMALL)
    assert o.row()["tiers"] == [
        {"capacity": 1, "hits": 0, "written": 5},
        {"capacity": 2, "hits": 1, "written": 3},
    ]


@given(BLOCKS)
def test_one_pass_gives_what_lru_gives_at_each_capacity(made: list[tuple[list[int], int]]) -> None:
    a = accesses(blocks(*[ids for ids, _ in made]))
    for metric in ("object", "prefix"):
        curve, rows = lru_rows(a, metric=metric, model=SMALL)  # type: ignore[arg-type]
        assert rows[-1]["hit_rate"] == curve.infinite
        finite = [r for r in rows if r["capacity"] != "inf"]
        replayed = sweep(
            a,
            ["lru"],
            [(float(r["capacity"]),) for r in finite],
            metric=metric,  # type: ignore[arg-type]
            model=SMALL,
        )
        for row, o in zip(finite, replayed, strict=True):
            assert (row["hits"], row["accesses"]) == (o.hits, o.accesses)


def test_a_sample_states_its_error_and_has_no_prefix() -> None:
    a = trace(np.random.default_rng(0).zipf(1.3, 4000))
    _, rows = lru_rows(a, model=SMALL, sample=0.5)
    assert all(row["error"] >= 0 for row in rows)
    with pytest.raises(ValueError, match="no sample"):
        lru_rows(a, metric="prefix", model=SMALL, sample=0.5)


def test_deep_blocks_cost_more() -> None:
    a = accesses(blocks([1, 2]))
    cost = block_costs(a, SMALL)
    assert cost[0] == SMALL.cost.flops(0, 4)
    assert cost[1] == SMALL.cost.flops(4, 8)


DOCUMENTS = ["".join(chr(97 + i) + str(j) for j in range(40)) for i in range(4)]


def test_the_store_finds_exact_and_moved_text() -> None:
    a, b, c, _ = DOCUMENTS
    prompts = text(a + b + "?1", a + b + "?2", b + a + "?3", c + "?4")
    spans = [
        Request(r.timestamp, r.session, r.input_tokens, 0, tokens=r.tokens, segments=s)
        for r, s in zip(
            prompts,
            [[("a", 0, len(a)), ("b", len(a), len(a) + len(b))]] * 2
            + [[("b", 0, len(b)), ("a", len(b), len(a) + len(b))]]
            + [[("c", 0, len(c))]],
            strict=True,
        )
    ]
    done = replay_store(
        spans, CHUNKERS.build("cdc"), 1 << 30, SMALL, blend="full_reuse", spans=True
    )
    both = len(a) + len(b)
    assert done.tokens["exact"].tolist() == [0, both, 0, 0]
    assert done.tokens["moved"].tolist() == [0, 0, both, 0]
    assert done.loaded.tolist() == [0, both, both, 0]
    assert done.rows.tolist() == [both + 2, 2, 2, len(c) + 2]
    assert done.found == 2 * both
    prefix = replay_store(spans, CHUNKERS.build("cdc"), 1 << 30, SMALL, blend="prefix", spans=True)
    assert prefix.tokens["moved"].sum() == 0


@given(st.lists(st.permutations(DOCUMENTS), min_size=1, max_size=4), st.integers(1, 400))
def test_the_tokens_of_a_store_replay_add_up(orders: list[list[str]], tokens: int) -> None:
    prompts = text(*("".join(order[:3]) for order in orders))
    capacity = tokens * SMALL.bytes_per_token()
    for blend in ("prefix", "full_reuse", "epic"):
        done = replay_store(prompts, Fixed(16), capacity, SMALL, blend=blend)
        total = sum(done.tokens.values())
        assert total.tolist() == [r.input_tokens for r in prompts]
        assert (done.rows >= 1).all()
        computed = done.tokens["new"] + done.tokens["recomputed"]
        assert (done.rows == np.maximum(computed, 1)).all()


def test_who_evicted_what_was_asked_for_again() -> None:
    def asked(at: float, session: str, seed: int, T: int = 64) -> Request:
        tokens = np.random.default_rng(seed).integers(0, 1000, T).astype(np.int32)
        return Request(at, session, T, 1, tokens=tokens)

    prompts = [
        asked(0, "a", 1),
        asked(1, "b", 2),  # room for one: `a` gives way to it
        asked(2, "a", 1),  # in vain, by `b`, which gives way to it in turn
        asked(3, "a", 3),
        asked(4, "a", 1),  # in vain, by `a` itself
        asked(5, "c", 2),  # `b`'s, which gave way to `a`
        asked(6, "c", 4, 16),
    ]
    done = replay_store(prompts, Fixed(16), 64 * SMALL.bytes_per_token(), SMALL)
    assert done.causes["evicted"] == sum(done.evicted_by.values()) == 3 * 64
    assert done.evicted_by == {"a": 128, "b": 64}
    assert done.own == 64
    (row,) = (o.row() for o in store_sweep(
        prompts, ["lru"], [(64 * SMALL.bytes_per_token(),)], Fixed(16), model=SMALL
    ))  # fmt: skip
    assert row["evicted_by"] == {
        "tokens": 192,
        "own": 64,
        "sessions": {"a": 128, "b": 64},
        "sessions_in_all": 2,
    }


def test_the_store_as_a_sweep() -> None:
    a, b, *_ = DOCUMENTS
    prompts = text(a + b, a + b, b + a)
    outcomes = list(
        store_sweep(prompts, ["lru", "fifo"], [(1e9,), (math.inf,)], Fixed(16), model=SMALL)
    )
    assert [(o.policy, o.row()["capacity"]) for o in outcomes] == [
        ("lru", 1_000_000_000),
        ("lru", "inf"),
        ("fifo", 1_000_000_000),
        ("fifo", "inf"),
    ]
    row = outcomes[0].row()
    assert row["hit_rate"] == pytest.approx(row["exact"] + row["moved"] + row["recomputed"])
    with pytest.raises(ValueError, match="one tier"):
        list(store_sweep(prompts, ["lru"], [(1e9, 2e9)], Fixed(16), model=SMALL))
    with pytest.raises(ValueError, match="capacity: got 5 bytes"):
        replay_store(prompts, Fixed(16), 5, SMALL)
    with pytest.raises(ValueError, match="token ids"):
        replay_store(blocks([1]), Fixed(16), 1 << 30, SMALL)


def test_the_simulator_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "import lmc.sim.sweep, lmc.sim.reuse, lmc.sim.readers, lmc.sim.timing, lmc.plots\n"
        "import lmc.cli.sim, lmc.cli\n"
        "assert not {'torch', 'vllm', 'transformers', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_empty_block_trace_is_refused() -> None:
    empty = Accesses(
        *(np.zeros(0, dtype=np.int64),) * 2,
        offsets=np.array([0, 0]),
        timestamps=np.zeros(1),
        input_tokens=np.array([3]),
        output_tokens=np.array([0]),
        block_tokens=4,
    )
    with pytest.raises(ValueError, match="no blocks"):
        list(sweep(empty, ["lru"], [(4.0,)], model=SMALL))
