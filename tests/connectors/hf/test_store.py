"""What a context policy stores, what a plan finds of it, and the scores that Cache-Craft reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmc.blend import STRATEGIES
from lmc.blend.cachecraft import CacheCraft
from lmc.blend.plan import Plan
from lmc.chunking.pieces import chunk_key
from lmc.connectors.hf import HFStore
from tests.connectors.hf.tiny import (
    CHUNKS,
    END,
    SPANS,
    SYSTEM,
    TOKENS,
    T,
    blended,
    decoder,
    far,
    reference,
    stored,
    tiny,
)


def plan_of(store: HFStore, strategy: Any = "full_reuse") -> Plan:
    return store.plan(TOKENS, SPANS, STRATEGIES.build(strategy))


# By policy, of the prompt's chunks: kind, origin, and where each stood when it was computed.
EXPECTED = {
    "isolated": [("moved", "isolated", 0)] * 4,
    "anchored": [("exact", "anchored", 20), *[("moved", "anchored", 20)] * 3],
    # The last chunk stood in front, directly behind the system text.
    "first_seen": [
        ("moved", "exact", 140),
        ("moved", "exact", 100),
        ("moved", "exact", 60),
        ("moved", "anchored", 20),
    ],
}


@pytest.mark.parametrize("context", EXPECTED)
def test_a_context_policy_decides_origin_and_start(context: Any) -> None:
    system, *chunks = plan_of(stored("Llama", context)).found
    assert (system.kind, system.record.start, system.start, system.end) == ("exact", 0, 0, 20)
    found = [(s.kind, s.record.origin, s.record.start) for s in chunks]
    assert found == EXPECTED[context]
    assert [(s.start, s.end) for s in chunks] == SPANS[1:]
    assert [s.delta for s in chunks] == [s.start - s.record.start for s in chunks]


@pytest.mark.parametrize("context", EXPECTED)
def test_a_chunk_holds_the_kv_of_its_context(context: Any) -> None:
    store = stored("Llama", context)
    for i, s in enumerate(plan_of(store).found[1:]):
        prompts = {
            "isolated": CHUNKS[i],
            "anchored": [*SYSTEM, *CHUNKS[i]],
            "first_seen": [*SYSTEM, *(t for chunk in reversed(CHUNKS) for t in chunk)],
        }
        pages = tiny().prefill(np.array(prompts[context])).pages
        right = pages.rows(s.record.start, s.record.start + 40)
        assert far(store.chunk(s.record.slot), right) < 1e-5


def test_the_first_anchored_chunk_is_exact_and_changes_nothing() -> None:
    store = HFStore(tiny())
    store.add_chunks("anchored", SYSTEM, [CHUNKS[0]])
    got = blended(store, "full_reuse")
    assert got.plan.kinds()["exact"] == 60
    assert far(got.logits[0], reference(tiny())[-1:]) < 1e-5


def test_without_a_system_text_the_first_chunk_is_in_front() -> None:
    store = HFStore(tiny())
    store.add_chunks("anchored", [], CHUNKS)
    tokens, spans = TOKENS[20:], [(start - 20, end - 20) for start, end in SPANS[1:]]
    plan = store.plan(tokens, spans, STRATEGIES.build("full_reuse"))
    assert [s.kind for s in plan.found] == ["exact", "moved", "moved", "moved"]
    assert [s.record.origin for s in plan.found] == ["isolated"] * 4


def test_an_unknown_context_policy_is_named() -> None:
    with pytest.raises(ValueError, match="got 'alone', valid: isolated, anchored, first_seen"):
        HFStore(tiny()).add_chunks("alone", SYSTEM, CHUNKS)  # type: ignore[arg-type]


def test_a_full_store_lets_the_oldest_chunks_go_and_their_scores_with_them() -> None:
    store = HFStore(tiny(), memory_bytes=100 * 4 * 2 * 2 * 32 * 4)  # 100 tokens in float32
    store.add_chunks("first_seen", SYSTEM, CHUNKS[:2])
    assert len(store._attended) == 1  # one chunk stood in front, and one behind it
    store.add_chunks("isolated", [], CHUNKS[2:])
    tokens, spans = TOKENS[100:], [(0, 40), (40, 80)]
    plan = store.plan(tokens, spans, STRATEGIES.build("full_reuse"))
    assert [(s.start, s.end) for s in plan.found] == spans
    assert plan_of(store).found == ()
    assert not store._attended
    assert store.store.chunks.memory.size == store.store.index.size == 80 * 4 * 2 * 2 * 32 * 4


# -- Cache-Craft -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attention() -> torch.Tensor:
    """`[T, T]` of the model itself over the prompt's chunks in the opposite order."""
    model = decoder("Llama")
    model.set_attn_implementation("eager")
    ids = [*SYSTEM, *(t for chunk in reversed(CHUNKS) for t in chunk)]
    with torch.inference_mode():
        paid = model(torch.tensor([ids]), output_attentions=True).attentions
    return torch.stack(paid).mean((0, 1, 2))


def test_scores_are_the_models_own_attention(attention: torch.Tensor) -> None:
    store = stored("Llama", "first_seen")
    plan = plan_of(store)
    for i, s in enumerate(plan.found[1:]):
        start = s.record.start
        scores = store.attended(s.record)
        mine = attention[start : start + 40]
        others = [(a, a + 40) for a in range(20, start, 40)]
        expected = sum((mine[:, a:b].sum(1) for a, b in others), torch.zeros(40))
        np.testing.assert_allclose(scores.tokens, expected, atol=1e-5)
        inter = [float(mine[:, a:b].sum()) for a, b in others]
        assert scores.inter == pytest.approx(inter, rel=1e-4)
        assert scores.lengths == (40,) * (3 - i)
        if others:
            own = float(mine[:, start : start + 40].sum())
            assert scores.intra == pytest.approx(own, rel=1e-4)


def test_cachecraft_recomputes_the_rows_that_looked_at_what_is_missing() -> None:
    store = stored("Llama", "first_seen")
    plan = plan_of(store, "cachecraft")
    strategy = CacheCraft()
    for i, s in enumerate(plan.found[1:]):
        scores = store.attended(s.record)
        # Stored behind those that follow it now, so nothing overlaps.
        share = strategy.overhead(scores, ())
        inside = plan.rows[(plan.rows >= s.start) & (plan.rows < s.end)] - s.start
        assert len(inside) == int(np.ceil(share * 40))
        assert share >= 0.5
        if i < 3:
            best = np.argsort(-scores.tokens, kind="stable")[: len(inside)]
            assert inside.tolist() == sorted(best.tolist())
    assert np.array_equal(plan.rows, plan.chosen)
    assert plan.kinds()["recomputed"] == len(plan.rows)


def test_cachecraft_takes_the_variant_whose_context_is_nearest() -> None:
    """A chunk was seen behind A, then behind C; of these A stands before it now."""
    a, b, c, d = CHUNKS
    store = HFStore(tiny())
    store.add(b, [(0, 40)])
    for front in (a, c):
        store.add([*SYSTEM, *front, *d], [(0, 20), (20, 60), (60, 100)], system=20)
    tokens, spans = [*SYSTEM, *b, *a, *d, 5], [(0, 20), (20, 60), (60, 100), (100, 140)]
    before = {}
    for name in ("full_reuse", "cachecraft"):
        segment = store.plan(tokens, spans, STRATEGIES.build(name)).found[-1]
        assert (segment.start, segment.end) == (100, 140)
        assert len(store.variants(segment)) == 2
        before[name] = store.attended(segment.record).before
    front_a, front_c = (chunk_key(b"hf", np.array(front)) for front in (a, c))
    # One that continues what stands before it is every plan's choice; without it, Cache-Craft's.
    assert before == {"full_reuse": (front_a,), "cachecraft": (front_a,)}
    apart, spans = [*SYSTEM, *a, *b, *d, 5], SPANS[:4]
    for name in before:
        segment = store.plan(apart, spans, STRATEGIES.build(name)).found[-1]
        before[name] = store.attended(segment.record).before
    assert before == {"full_reuse": (front_c,), "cachecraft": (front_a,)}


def test_cachecraft_recomputes_nothing_where_no_context_is_missing() -> None:
    a, b, c, d = CHUNKS
    store = HFStore(tiny())
    store.add([*SYSTEM, *a, *b, *d], [(0, 20), (20, 60), (60, 100), (100, 140)], system=20)
    tokens = [*SYSTEM, *c, *a, *b, *d, 5]
    plan = store.plan(tokens, SPANS, STRATEGIES.build("cachecraft"))
    # What is new is computed, and of A, which had no other chunk in front, the first half.
    assert plan.rows.tolist() == list(range(20, 80))
    reversed_order = [*SYSTEM, *c, *b, *a, *d, 5]
    plan = store.plan(reversed_order, SPANS, STRATEGIES.build("cachecraft"))
    assert (plan.rows >= 140).any()


@pytest.mark.parametrize("context", ["isolated", "anchored"])
def test_cachecraft_takes_half_of_chunks_that_had_no_other_in_front(context: Any) -> None:
    plan = plan_of(stored("Llama", context), "cachecraft")
    assert not stored("Llama", context)._attended
    moved = [s for s in plan.found if s.kind == "moved"]
    assert plan.rows.tolist() == [row for s in moved for row in range(s.start, s.start + 20)]


def test_cachecraft_is_served_as_planned() -> None:
    got = blended(stored("Llama", "first_seen"), "cachecraft")
    assert got.compute_fraction == (len(got.plan.rows) + T - END) / T
    right = reference(tiny())[-1:]
    reuse = blended(stored("Llama", "first_seen"), "full_reuse")
    assert 0 < far(got.logits[0], right) < far(reuse.logits[0], right)
