"""The loading controller: its ratio is load time over prefill time, and the rest is delegated."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.blend.evidence import Importance, Outline
from lmc.model.times import TierSpeed, TTFTModel
from lmc.quality import BLENDS
from lmc.quality.controlled import Controlled

TIERS = (TierSpeed("host", 0.0, 10_000.0), TierSpeed("disk", 0.5, 1_000.0))
TIMES = TTFTModel(0.0, 0.01, 0.0, 20.0, TIERS)  # 0.01 s a row; host hands over 500 tokens a second
INNERS: list[Any] = [
    "cacheblend",
    {"name": "cacheblend", "tensor": "k", "write": "selected"},
    {"name": "query", "layers": [1]},
    "random",
    "uniform",
]


@pytest.fixture(scope="module")
def times(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("times") / "times.yaml"
    TIMES.save(path)
    return str(path)


def outline(n: int, T: int) -> Outline:
    moved = ((5, 5 + n // 2), (10 + n // 2, 10 + n)) if n > 1 else ((5, 5 + n),)
    return Outline(L=6, T=T, end=15 + n, moved=moved, new=T - n)


def build(times: str, **fields: Any) -> Controlled:
    strategy = BLENDS.build({"name": "controlled", "times": times, **fields})
    assert isinstance(strategy, Controlled)
    return strategy


@pytest.mark.parametrize(
    ("fields", "ratio"),
    [
        # 800 tokens: 1.6 s from host, 0.5 + 16 s from disk; 1000 rows: 10 s.
        ({}, 0.16),
        ({"floor": 0.3}, 0.3),
        ({"floor": 0.0}, 0.16),
        ({"floor": 0.165}, 0.165),
        ({"tier": "disk"}, 1.0),
    ],
)
def test_the_ratio_is_what_loading_hides(times: str, fields: Any, ratio: float) -> None:
    assert build(times, **fields).ratio(outline(800, 1000)) == ratio


def test_a_ratio_is_rounded_down_to_a_hundredth(times: str) -> None:
    assert build(times).ratio(outline(849, 1000)) == 0.16
    assert build(times).ratio(outline(850, 1000)) == 0.17


def test_it_becomes_its_inner_strategy_at_that_ratio(times: str) -> None:
    request = outline(200, 210)  # 0.4 s of 2.1 s
    controlled = build(times, strategy={"name": "cacheblend", "tensor": "k", "norm": "l1"})
    inner = BLENDS.build({"name": "cacheblend", "tensor": "k", "norm": "l1", "ratio": 0.19})
    assert controlled.ratio(request) == 0.19
    assert controlled.needs(request) == inner.needs(request)
    assert controlled.counts(request) == inner.counts(request)
    rng = np.random.default_rng(0)
    seen = {need: rng.random(request.T, dtype=np.float32) for need in inner.needs(request)}
    for layer in range(6):
        rows = controlled.rows(request, layer, seen)
        assert np.array_equal(rows, inner.rows(request, layer, seen))


@pytest.mark.parametrize("inner", INNERS)
@given(n=st.integers(0, 300), suffix=st.integers(1, 300), seed=st.integers(0, 3))
def test_counts_equal_rows(times: str, inner: Any, n: int, suffix: int, seed: int) -> None:
    request = outline(n, n + 15 + suffix)
    strategy = build(times, strategy=inner, floor=0.05)
    rng = np.random.default_rng(seed)
    seen = {need: rng.random(request.T, dtype=np.float32) for need in strategy.needs(request)}
    before = request.candidates
    for layer, count in enumerate(strategy.counts(request)):
        rows = strategy.rows(request, layer, seen)
        assert len(rows) == count
        assert np.isin(rows, before).all()
        before = rows


@given(n=st.integers(0, 400), more=st.integers(0, 400), T=st.integers(900, 1200))
def test_more_to_load_is_more_to_recompute(times: str, n: int, more: int, T: int) -> None:
    strategy = build(times, floor=0.02)
    low, high = strategy.ratio(outline(n, T)), strategy.ratio(outline(n + more, T))
    assert 0.02 <= low <= high <= 1
    assert high == 0.02 or round(high * 100) == pytest.approx(high * 100)
    # Loading hides it: the share of the prefill takes no longer.
    assert high == 0.02 or high * T * 0.01 <= (n + more) * 20 / 10_000 + 1e-9


def test_what_its_inner_strategy_is_told_holds_for_it(times: str) -> None:
    assert build(times).written == "all"
    assert build(times, strategy={"name": "cacheblend", "write": "selected"}).written == "selected"
    assert build(times, strategy="uniform").written == "all"
    ablation = build(times, strategy={"name": "cacheblend", "causal": "bottom_right"})
    assert ablation.mask == "bottom_right"
    (need,) = build(times, strategy="query").needs(outline(100, 200))
    assert isinstance(need, Importance)
    config, inner = build(times, floor=0.2, strategy={"name": "query", "layers": 2}).least
    assert config == {"name": "query", "layers": 2, "ratio": 0.2}
    assert inner == BLENDS.build(config)


def test_other_times_are_another_strategy(times: str, tmp_path: Path) -> None:
    path = tmp_path / "times.yaml"
    TIMES.save(path)
    before = build(str(path))
    TTFTModel(0.0, 0.02, 0.0, 20.0, TIERS).save(path)
    assert repr(build(str(path))) != repr(before)
    for twin in (copy.deepcopy(before), pickle.loads(pickle.dumps(before))):
        assert twin == before
        assert twin.counts(outline(800, 1000)) == before.counts(outline(800, 1000))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"times": "/nowhere.yaml"}, "/nowhere.yaml: cannot be read"),
        ({"tier": "tape"}, "tier: got 'tape'; valid: host, disk"),
        ({"floor": 1.5}, "floor must be from 0 to 1, got 1.5"),
        ({"strategy": "epic"}, "'epic', want one with a ratio"),
        ({"strategy": "full_reuse"}, "'full_reuse', want one with a ratio"),
        ({"strategy": "full_recompute"}, "'full_recompute', want one with a ratio"),
        ({"strategy": {"name": "query", "ratio": 0.1}}, "but ratio is chosen for it"),
        ({"model": {}}, "unknown field model"),
        ({"strategy": "cachblend"}, "unknown blend strategy"),
    ],
)
def test_wrong_fields_say_what_is_wrong(times: str, fields: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are the test
        BLENDS.build({"name": "controlled", "times": times, **fields})
    assert words in str(error.value)
