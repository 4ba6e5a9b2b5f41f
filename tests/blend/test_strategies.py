"""Strategies: rows by hand, invariants of all of them, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.blend import STRATEGIES
from lmc.blend.evidence import (
    Need,
    Outline,
    Seen,
    positions,
    probe_row_layers,
    runs_of,
    share,
    top,
    without,
)
from lmc.blend.strategy import NOTHING, Strategy
from lmc.quality import BLENDS

RUNS = ((10, 40), (40, 50), (90, 200))
OUTLINE = Outline(L=6, T=220, end=200, moved=RUNS, new=70)
SELECTION = [[10, 11, 95], [10, 95], [95]]
TIMES = Path(__file__).parents[2] / "benchmarks" / "times" / "smollm2-135m-cpu.yaml"
FIELDS: dict[str, dict[str, Any]] = {
    "replay": {"by_layer": SELECTION},
    "controlled": {"times": str(TIMES)},
}
# What `auto` becomes is one of the others.
NAMES = [name for name in BLENDS.names() if name != "auto"]


def build(name: str, **fields: Any) -> Strategy:
    strategy: Strategy = BLENDS.build({"name": name, **FIELDS.get(name, {}), **fields})
    return strategy


def over(runs: tuple[tuple[int, int], ...]) -> Outline:
    """A request of which these runs are moved."""
    return dataclasses.replace(OUTLINE, moved=runs)


def evidence(strategy: Strategy, outline: Outline, seed: int = 0) -> dict[Need, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {need: rng.random(outline.T, dtype=np.float32) for need in strategy.needs(outline)}


@pytest.mark.parametrize(
    ("config", "runs"),
    [
        ("prefix", []),
        ("full_reuse", []),
        ("full_recompute", [(10, 50), (90, 200)]),
        ({"name": "epic", "link_tokens": 16}, [(10, 26), (40, 50), (90, 106)]),
        ({"name": "epic", "link_tokens": 0}, []),
        ({"name": "block", "page": 16}, [(10, 16), (40, 48), (90, 96)]),
        ({"name": "tail", "rows_per_run": 12}, [(28, 50), (188, 200)]),
    ],
)
def test_rows(config: object, runs: list[tuple[int, int]]) -> None:
    assert runs_of(STRATEGIES.build(config).rows(over(RUNS))) == runs  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moved", [RUNS, ((3, 4),), ()])
def test_every_strategy_keeps_its_word(name: str, moved: tuple[tuple[int, int], ...]) -> None:
    """Moved rows only, ascending, never more than a layer before, as many as it said."""
    outline = Outline(L=6, T=220, end=200, moved=moved, new=220 - len(positions(moved)))
    strategy = build(name)
    seen = evidence(strategy, outline)
    before = outline.candidates
    for layer, count in enumerate(strategy.counts(outline)):
        rows = strategy.rows(outline, layer, seen)
        assert np.all(np.diff(rows) > 0)
        assert np.isin(rows, before).all()
        assert np.array_equal(rows, strategy.rows(outline, layer, seen))
        # A union cannot know how far its two parts will overlap.
        assert len(rows) == count or (name == "union" and len(rows) <= count)
        before = rows


@pytest.mark.parametrize("name", ["cacheblend", "query", "random", "uniform"])
@pytest.mark.parametrize("ratio", [0, 0.1, 0.5, 1])
def test_ratio_is_of_the_moved_rows(name: str, ratio: float) -> None:
    strategy = build(name, ratio=ratio)
    rows = strategy.rows(OUTLINE, 5, evidence(strategy, OUTLINE))
    assert len(rows) == round(150 * ratio)
    with pytest.raises(ValueError, match=r"ratio must be from 0 to 1, got 1\.5"):
        build(name, ratio=1.5)


def test_cacheblend_takes_the_greatest_deviation_behind_the_check_layer() -> None:
    strategy = build("cacheblend", ratio=0.02, check_layer=2, tensor="k", norm="l1")
    (need,) = strategy.needs(OUTLINE)
    scores = np.zeros(220, np.float32)
    scores[[12, 45, 100, 5]] = [3, 2, 1, 9]  # row 5 is not a moved one
    assert np.array_equal(strategy.rows(OUTLINE, 2, {}), OUTLINE.candidates)
    assert strategy.rows(OUTLINE, 3, {need: scores}).tolist() == [12, 45, 100]
    assert strategy.counts(OUTLINE) == [150, 150, 150, 3, 3, 3]


def test_cacheblend_gradual_filters_what_is_left() -> None:
    strategy = build("cacheblend", ratio=[0.5, 0.2, 0.1], check_layer=0)
    assert strategy.counts(OUTLINE) == [150, 75, 30, 15, 15, 15]
    seen = evidence(strategy, OUTLINE)
    assert len(seen) == 3
    kept = [strategy.rows(OUTLINE, layer, seen) for layer in range(6)]
    assert [len(rows) for rows in kept] == [150, 75, 30, 15, 15, 15]
    with pytest.raises(ValueError, match=r"a list that falls, got \[0.1, 0.2\]"):
        build("cacheblend", ratio=[0.1, 0.2])


def test_query_takes_what_the_question_looks_at_and_counts_its_probe() -> None:
    strategy = build("query", ratio=0.02, layers=[1, 3])
    (need,) = strategy.needs(OUTLINE)
    scores = np.zeros(220, np.float32)
    scores[[12, 45, 100, 5]] = [3, 2, 1, 9]
    assert strategy.rows(OUTLINE, 0, {need: scores}).tolist() == [12, 45, 100]
    assert probe_row_layers(strategy.needs(OUTLINE), OUTLINE) == 70 * 4


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", 6), ("middle", 2), (2, 2), ([4, 0], 2), (99, 6)]
)
def test_layers_by_name(layers: object, expected: int) -> None:
    (need,) = build("query", layers=layers).needs(OUTLINE)
    assert len(need.layers) == expected  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"layers: got \[6\], want layers of 0 to 5"):
        build("query", layers=[6]).needs(OUTLINE)


def test_union_is_the_union() -> None:
    parts = [build("epic", link_tokens=4), build("cacheblend", ratio=0.1)]
    union = build("union", first={"name": "epic", "link_tokens": 4},
                  second={"name": "cacheblend", "ratio": 0.1})  # fmt: skip
    seen = evidence(union, OUTLINE)
    for layer in range(6):
        rows = [part.rows(OUTLINE, layer, seen) for part in parts]
        assert np.array_equal(union.rows(OUTLINE, layer, seen), np.union1d(*rows))
    with pytest.raises(ValueError, match="'full_recompute' cannot be joined"):
        build("union", first="full_recompute")


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=6),
    st.floats(0.02, 1),
    st.integers(1, 12),
    st.integers(1, 80),
)
def test_lmc_stays_within_its_budget_and_uses_it(
    gaps_and_lengths: list[tuple[int, int]], compute: float, L: int, suffix: int
) -> None:
    moved, end = [], 0
    for gap, length in gaps_and_lengths:
        moved.append((end + gap, end + gap + length))
        end += gap + length
    gaps = sum(gap for gap, _ in gaps_and_lengths)
    outline = Outline(L=L, T=end + suffix, end=end, moved=tuple(moved), new=gaps + suffix)
    strategy = build("lmc", compute=compute)
    needs = strategy.needs(outline)
    counts = strategy.counts(outline)
    spent = outline.new * L + probe_row_layers(needs, outline) + sum(counts)
    budget = compute * outline.T * L
    if needs:
        assert spent <= budget + 1e-6
        # What is left would not have paid for one row more in either stage.
        assert spent > budget - 4 * L or counts[-1] == outline.n
    else:
        assert sum(counts) == L * sum(min(4, length) for _, length in gaps_and_lengths)


def test_lmc_takes_what_is_looked_at_and_wrong() -> None:
    strategy = build("lmc", compute=0.45, link_tokens=2, wide=2.0, layers=[0])
    importance, deviation = strategy.needs(OUTLINE)
    looked_at, wrong = np.zeros(220, np.float32), np.ones(220, np.float32)
    boundary = [10, 11, 40, 41, 90, 91]
    _, *_, second = strategy.counts(OUTLINE)
    looked_at[100:160] = np.linspace(2, 1, 60)
    wrong[100:103] = 0  # looked at most, and right
    seen = {importance: looked_at, deviation: wrong}
    first = strategy.rows(OUTLINE, 0, seen).tolist()
    assert first == boundary + list(range(100, 100 + len(first) - 6))
    kept = strategy.rows(OUTLINE, 5, seen).tolist()
    assert kept == boundary + list(range(103, 103 + second - 6))


def test_replay_repeats_and_refuses_what_no_forward_can_do() -> None:
    strategy = build("replay")
    rows = [strategy.rows(OUTLINE, layer, {}).tolist() for layer in range(6)]
    assert rows == [*SELECTION, [95], [95], [95]]
    with pytest.raises(ValueError, match="layer 1 has rows that layer 0 left out"):
        build("replay", by_layer=[[1], [2]])


@dataclasses.dataclass(frozen=True)
class EarlyLayers(Strategy):
    """All rows in the lower half of the layers: by layer, and measured by nothing."""

    def counts(self, outline: Outline) -> list[int]:
        return [len(self.rows(outline, layer)) for layer in range(outline.L)]

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        return outline.candidates if layer < outline.L // 2 else positions([])


def test_rows_that_differ_by_layer_make_a_strategy_selective() -> None:
    assert EarlyLayers().selective
    assert EarlyLayers().counts(OUTLINE) == [150, 150, 150, 0, 0, 0]


def test_what_must_be_measured_makes_a_strategy_selective() -> None:
    for name in NAMES:
        strategy = build(name)
        assert strategy.selective or not strategy.needs(OUTLINE), name
    assert not any(build(name).selective for name in ("epic", "full_reuse", "random", "ape"))
    names = [name for name in NAMES if build(name).selective]
    assert {"cacheblend", "query", "replay", "union"} <= set(names)


def test_unknown_strategy_and_field_are_named() -> None:
    with pytest.raises(ValueError, match=r"'cachblend'.*cacheblend, .*epic, full_recompute"):
        STRATEGIES.build("cachblend")
    with pytest.raises(ValueError, match=r"'epic'.*ratio.*link_tokens"):
        STRATEGIES.build({"name": "epic", "ratio": 0.1})
    with pytest.raises(ValueError, match="at least 0, got -1"):
        STRATEGIES.build({"name": "epic", "link_tokens": -1})


@given(st.sets(st.integers(0, 100)))
def test_runs_and_positions_are_inverse(rows: set[int]) -> None:
    ascending = np.array(sorted(rows), np.int64)
    assert np.array_equal(positions(runs_of(ascending)), ascending)


@given(st.sets(st.integers(0, 220)))
def test_without_leaves_the_other_rows(rows: set[int]) -> None:
    ascending = np.array(sorted(rows), np.int64)
    left = positions(without(RUNS, ascending))
    assert np.array_equal(left, np.setdiff1d(positions(RUNS), ascending))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.floats(0, 1))
def test_top_takes_the_greatest_and_of_equals_the_earlier(values: list[int], ratio: float) -> None:
    scores = np.array(values, np.float32)
    rows = np.arange(len(values))
    k = share(ratio, len(values))
    kept = top(scores, rows, k)
    assert len(kept) == k
    by_rank = sorted(rows, key=lambda row: (-scores[row], row))
    assert kept.tolist() == sorted(by_rank[:k])
    assert (k > 0) == (ratio > 1e-9 / len(values))
