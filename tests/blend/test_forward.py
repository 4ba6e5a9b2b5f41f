"""The selective forward on a tiny Llama: slices, masks, scores, and who may see whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.blend import STRATEGIES
from lmc.blend.cacheblend import CacheBlend
from lmc.blend.combine import Replay
from lmc.blend.evidence import Deviation, Importance, Need, Outline, Seen
from lmc.blend.forward import Outcome
from lmc.blend.query import Query
from lmc.blend.strategy import NOTHING, Strategy
from lmc.connectors.hf.adapter import Pages
from lmc.kernels.gather import gather
from tests.connectors.hf.tiny import END, TOKENS, T, decoder, far, tiny

L = 4
NEW = np.concatenate([np.arange(60, 70), np.arange(END, T)])  # a gap, and the suffix
OUTLINE = Outline(L=L, T=T, end=END, moved=((20, 60), (70, END)), new=len(NEW))
OTHER = [(token + 7) % 512 for token in TOKENS[:20]]  # another text in front


@cache
def prefilled(front: tuple[int, ...]) -> torch.Tensor:
    """`[L, 2, T, G, D]` of the prompt behind a text of 20 tokens."""
    return tiny().prefill(np.array([*front, *TOKENS[20:]])).pages.rows(0, T)


def stale(moved: np.ndarray = OUTLINE.candidates) -> Pages:
    """Full prefill's KV, where that of the moved rows was computed behind another text."""
    pages = tiny().pages(T)
    pages.rows(0, T)[:] = prefilled(tuple(TOKENS[:20]))
    pages.rows(0, T)[:, :, moved] = prefilled(tuple(OTHER))[:, :, moved]
    return pages


def run(
    strategy: Strategy | None,
    pages: Pages,
    *,
    forced: np.ndarray = NEW,
    outline: Outline = OUTLINE,
    tokens: list[int] = TOKENS,
    max_rows: int | None = None,
    **options: Any,
) -> Outcome:
    adapter = tiny().adapter(np.array(tokens), pages, outline=outline, **options)
    adapter.max_rows = max_rows or adapter.max_rows
    return tiny().run(adapter, forced, strategy, outline)


@dataclass(frozen=True)
class SeeingCacheBlend(CacheBlend):
    """Keeps what it was shown."""

    shown: dict[Need, np.ndarray] = field(default_factory=dict)

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        self.shown.update(seen)
        return super().rows(outline, layer, seen)


@dataclass(frozen=True)
class SeeingQuery(Query):
    """The same of `query`."""

    shown: dict[Need, np.ndarray] = field(default_factory=dict)

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        self.shown.update(seen)
        return super().rows(outline, layer, seen)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SeeingCacheBlend(tensor="both"),
        lambda: SeeingCacheBlend(ratio=[0.5, 0.2], norm="cosine"),
        lambda: SeeingCacheBlend(tensor="k", norm="l1", write="selected"),
        lambda: SeeingQuery(layers="all", queries="sum"),
        lambda: SeeingQuery(layers=[1, 3], heads="max", queries="max"),
        lambda: SeeingQuery(queries="l2"),
        lambda: SeeingQuery(queries="l2", asking=3),
    ],
)
def test_slices_change_nothing(make: Any) -> None:
    whole, sliced = make(), make()
    one, other = stale(), stale()
    expected, got = run(whole, one), run(sliced, other, max_rows=7)
    assert whole.shown.keys() == sliced.shown.keys() == set(whole.needs(OUTLINE))
    for need, scores in whole.shown.items():
        # A row that is right scores its rounding, of numbers as large as the others'.
        np.testing.assert_allclose(sliced.shown[need], scores, rtol=1e-4, atol=1e-6 * scores.max())
    for a, b in zip(expected.rows, got.rows, strict=True):
        assert np.array_equal(a, b)
    assert far(expected.state[0], got.state[0]) < 1e-4
    assert far(one.buffer, other.buffer) < 1e-4


def test_recorded_attention_outputs_of_slices_are_joined() -> None:
    found = []
    for max_rows in (T, 7):
        adapter = tiny().adapter(np.array(TOKENS), tiny().pages(T))
        adapter.max_rows, adapter.outputs = max_rows, []
        tiny().run(adapter, np.arange(T))
        found.append(torch.stack(adapter.outputs))
    assert found[0].shape == (L, T, 128)
    assert far(*found) < 1e-5


@pytest.mark.parametrize("tensor", ["k", "v", "both"])
@pytest.mark.parametrize("norm", ["l1", "squared", "cosine"])
def test_rows_whose_kv_is_right_do_not_deviate_and_a_planted_one_does(
    tensor: Any, norm: Any
) -> None:
    pages = stale(np.empty(0, np.int64))
    right = pages.buffer.clone()
    noise = torch.Generator().manual_seed(0)
    pages.rows(0, T)[:, :, 101] += torch.randn(L, 2, 2, 32, generator=noise)
    strategy = SeeingCacheBlend(ratio=1 / OUTLINE.n, tensor=tensor, norm=norm)
    outcome = run(strategy, pages)
    (scores,) = strategy.shown.values()
    others = np.delete(OUTLINE.candidates, np.searchsorted(OUTLINE.candidates, 101))
    assert scores[others].max() < 1e-4 < 1e-2 < scores[101]
    assert [rows.tolist() for rows in outcome.selected[2:]] == [[101], [101]]
    assert far(pages.buffer, right) < 1e-5  # and being computed again it is right again


def test_importance_is_the_attention_of_the_model_itself() -> None:
    """The question's rows, by the model's eager attention over the reused KV."""
    from transformers import DynamicCache

    outline = Outline(L=L, T=T, end=END, moved=((20, END),), new=T - END)
    reused = stale(np.arange(20, END))
    cache = DynamicCache()
    for layer in range(L):
        k, v = reused.rows(0, END)[layer].transpose(1, 2)
        cache.update(k[None].clone(), v[None].clone(), layer)
    model = decoder("Llama")
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        question = torch.tensor([TOKENS[END:]])
        paid = model(question, past_key_values=cache, output_attentions=True).attentions
    layers = (1, 2)
    attention = torch.stack([paid[layer][0] for layer in layers])  # [2, H, rows that ask, T]
    reduced = {
        ("mean", "sum"): attention.mean(1).sum(1),
        ("mean", "l2"): attention.mean(1).norm(dim=1),
        ("max", "max"): attention.amax((1, 2)),
    }
    for (heads, queries), expected in reduced.items():
        strategy = SeeingQuery(layers=list(layers), heads=heads, queries=queries)  # type: ignore[arg-type]
        run(strategy, stale(np.arange(20, END)), forced=np.arange(END, T), outline=outline)
        (scores,) = strategy.shown.values()
        np.testing.assert_allclose(scores, expected.mean(0).numpy(), rtol=1e-3, atol=1e-6)
    strategy = SeeingQuery(layers=list(layers), queries="sum", asking=4)
    run(strategy, stale(np.arange(20, END)), forced=np.arange(END, T), outline=outline)
    expected = attention[:, :, -4:].mean(1).sum(1).mean(0)
    np.testing.assert_allclose(
        strategy.shown[Importance(layers, "mean", "sum", 4)], expected, rtol=1e-3, atol=1e-6
    )


@given(data=st.data())
@settings(max_examples=15)
def test_a_row_never_depends_on_what_stands_behind_it(data: st.DataObject) -> None:
    candidates = OUTLINE.candidates.tolist()
    first = data.draw(st.sets(st.sampled_from(candidates), max_size=40))
    later = data.draw(st.sets(st.sampled_from(sorted(first)))) if first else set()
    replay = Replay([sorted(first), sorted(later)])
    changed = data.draw(st.sampled_from(sorted({*first, *NEW.tolist()})))
    tokens = list(TOKENS)
    tokens[changed] = (tokens[changed] + 1) % 512
    one, other = stale(), stale()
    run(replay, one)
    run(replay, other, tokens=tokens)
    assert torch.equal(one.rows(0, changed), other.rows(0, changed))
    assert far(one.rows(changed, changed + 1), other.rows(changed, changed + 1)) > 1e-3


@given(
    rows=st.sets(st.integers(20, END - 1), min_size=2, max_size=60).map(sorted),
    choice=st.integers(0, 1000),
)
@settings(max_examples=15)
def test_a_bottom_right_mask_shows_rows_the_future(rows: list[int], choice: int) -> None:
    """Row i of M sees keys up to T - M + i, and the question is part of M."""
    changed = rows[choice % len(rows)]
    tokens = list(TOKENS)
    tokens[changed] = (tokens[changed] + 1) % 512
    differing = {}
    for mask in ("position", "bottom_right"):
        one, other = stale(), stale()
        run(None, one, forced=np.array(rows), mask=mask)
        run(None, other, forced=np.array(rows), mask=mask, tokens=tokens)
        # K and V of layer 1 show what layer 0 attended to.
        difference = (one.rows(0, END) - other.rows(0, END))[1].abs().amax((0, 2, 3))
        differing[mask] = np.flatnonzero(difference.numpy() > 1e-6).tolist()
    M = len(rows) + T - END
    assert differing["position"] == [row for row in rows if row >= changed]
    assert differing["bottom_right"] == [
        row for i, row in enumerate(rows) if T - M + i >= changed or row == changed
    ]


def test_a_bottom_right_mask_is_right_when_all_rows_are_computed_and_does_not_go_by_slices() -> (
    None
):
    outline = Outline(L=L, T=T, end=END, moved=((20, END),), new=T - END)
    none = np.empty(0, np.int64)
    results = []
    for options in ({}, {"mask": "bottom_right"}):
        pages = stale(np.arange(20, END))
        run(CacheBlend(ratio=1.0), pages, forced=none, outline=outline, **options)
        results.append(pages.buffer)
    assert far(*results) < 1e-5
    long = [*TOKENS] * 30
    assert tiny().adapter(np.array(long), stale()).max_rows < len(long)
    masked = tiny().adapter(np.array(long), stale(), mask="bottom_right")
    assert masked.max_rows == len(long)


@pytest.mark.parametrize("write", ["all", "selected"])
def test_dropped_rows_keep_fresh_kv_or_get_the_reused_back(write: Any) -> None:
    pages, before = stale(), stale()
    outcome = run(CacheBlend(ratio=0.3, write=write), pages)
    dropped = np.setdiff1d(outcome.selected[1], outcome.selected[2])
    assert len(dropped) == OUTLINE.n - len(outcome.selected[2]) > 0
    # In layer 0 fresh rows are no other than reused ones: nothing was attended to yet.
    assert _same(pages, before, dropped) == [True, write == "selected", True, True]
    assert _same(pages, before, outcome.selected[2]) == [True, False, False, False]


def _same(one: Pages, other: Pages, rows: np.ndarray) -> list[bool]:
    pairs = zip(_of(one, rows), _of(other, rows), strict=True)
    return [torch.equal(a, b) for a, b in pairs]


def _of(pages: Pages, rows: np.ndarray) -> torch.Tensor:
    return gather(pages.all, torch.from_numpy(rows))


@given(shift=st.integers(1, 700), name=st.sampled_from(["cacheblend", "query", "epic"]))
@settings(max_examples=10)
def test_shifting_every_position_equally_changes_nothing(shift: int, name: str) -> None:
    from lmc.kernels.rerotate import rerotate

    strategy = STRATEGIES.build(name)
    forced = NEW if name != "epic" else np.union1d(NEW, strategy.rows(OUTLINE))
    one, other = stale(), stale()
    cos, sin = (torch.from_numpy(x) for x in tiny().rotations.angles(shift))
    for layer in other.rows(0, T):
        layer[0] = rerotate(layer[0].contiguous(), cos[0], sin[0], interleaved=False)
    expected = run(strategy, one, forced=forced)
    got = run(strategy, other, forced=forced, positions=np.arange(T) + shift)
    assert [r.tolist() for r in expected.rows] == [r.tolist() for r in got.rows]
    logits = [tiny().logits(outcome.state[0]) for outcome in (expected, got)]
    assert far(*logits) < 1e-3
    assert far(one.rows(0, T)[:, 1], other.rows(0, T)[:, 1]) < 1e-3


def test_without_a_strategy_only_the_forced_rows_are_computed() -> None:
    pages, before = stale(), stale()
    outcome = run(None, pages)
    assert [rows.tolist() for rows in outcome.rows] == [NEW.tolist()] * L
    assert torch.equal(_of(pages, OUTLINE.candidates), _of(before, OUTLINE.candidates))


def test_a_strategy_that_takes_rows_up_again_is_refused() -> None:
    @dataclass(frozen=True)
    class Again(CacheBlend):
        def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
            return outline.candidates[: 3 + layer]

    with pytest.raises(ValueError, match="Again takes up 1 rows in layer 1 that layer 0 left out"):
        run(Again(), stale())


def test_a_probe_measures_before_the_rows_and_deviation_behind_its_layer() -> None:
    """A strategy is shown a deviation from the next layer on, and importance from the first."""
    seen_at: list[set[type]] = []

    @dataclass(frozen=True)
    class Both(CacheBlend):
        def needs(self, outline: Outline) -> tuple[Need, ...]:
            return (Importance((1,)), Deviation(1))

        def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
            seen_at.append({type(need) for need in seen})
            return outline.candidates

    outcome = run(Both(), stale())
    assert seen_at == [{Importance}, {Importance}, {Importance, Deviation}, {Importance, Deviation}]
    assert outcome.probe == len(NEW) * 2
