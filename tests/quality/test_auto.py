"""The automatic mode: the least knob that recovers enough, or why there is none."""

from __future__ import annotations

from typing import Any

import pytest

from lmc.blend.evidence import Outline
from lmc.quality import BLENDS
from lmc.quality.auto import Auto
from lmc.quality.gate import verdict
from tests.quality.profiles import FULL


def auto(**fields: Any) -> Auto:
    built = BLENDS.build({"name": "auto", **fields})
    assert isinstance(built, Auto)
    return built


@pytest.mark.parametrize(
    ("strategy", "bound", "expected"),
    [
        ("epic", 0.1, {"name": "epic", "link_tokens": 4}),
        ("epic", 0.3, {"name": "epic", "link_tokens": 8}),
        ("epic", 0.31, {"name": "epic", "link_tokens": 9}),
        ("epic", 0.6, {"name": "epic", "link_tokens": 32}),
        ("cacheblend", 0.5, {"name": "cacheblend", "ratio": 0.2}),
        ("cacheblend", 0.501, {"name": "cacheblend", "ratio": 0.201}),
        (
            {"name": "cacheblend", "tensor": "k"},
            0.2,
            {"name": "cacheblend", "tensor": "k", "ratio": 0.05},
        ),
    ],
)
def test_the_least_that_recovers_enough(strategy: Any, bound: float, expected: Any) -> None:
    resolved = auto(strategy=strategy, min_recovery=bound).resolve(FULL)
    assert resolved == BLENDS.build(expected)
    assert verdict(strategy, resolved, FULL, bound) is None


def test_where_none_does_the_best_is_named() -> None:
    with pytest.raises(ValueError, match=r"0\.7; best: link_tokens 32 recovers 0\.60"):
        auto(strategy="epic", min_recovery=0.7).resolve(FULL)
    with pytest.raises(ValueError, match="no quality profile of this model"):
        auto(strategy="epic").resolve(None)
    with pytest.raises(ValueError, match="'random' is not in the quality profile"):
        auto(strategy="random").resolve(FULL)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("full_reuse", "want one with a ratio or another such knob"),
        ("prefix", "want one with a ratio or another such knob"),
        ("auto", "unknown blend strategy: got 'auto'"),
        ({"name": "epic", "link_tokens": 4}, "but link_tokens is chosen for it"),
        ({"name": "epic", "links": 4}, "unknown field links"),
    ],
)
def test_only_a_strategy_with_a_free_knob(strategy: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        auto(strategy=strategy)


def test_it_never_runs_itself() -> None:
    with pytest.raises(TypeError, match="resolved with a quality profile before"):
        auto().rows(Outline(L=2, T=20, end=10, moved=((0, 10),), new=10))
