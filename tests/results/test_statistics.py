"""Estimates: values computed by hand, pairing, and the front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.results.statistics import (
    Estimate,
    paired_difference,
    pareto_front,
    recovery_estimate,
)


def _value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def test_recovery_of_reuse_is_0_and_of_full_prefill_1() -> None:
    reuse = {0: 0.4, 1: 0.2, 2: 0.6}
    assert recovery_estimate(reuse, reuse) == Estimate(0, 0, 0)
    assert recovery_estimate(dict.fromkeys(reuse, 0.0), reuse) == Estimate(1, 1, 1)
    assert _value(recovery_estimate({0: 0.1, 1: 0.2}, reuse)) == pytest.approx(0.5)
    assert recovery_estimate({9: 0.1}, reuse) is None


KL = st.floats(0, 10)


@given(st.dictionaries(st.integers(0, 50), st.tuples(KL, KL, st.floats(0.1, 10)), min_size=1))
@settings(max_examples=15)  # each draws thousands of resamples
def test_paired_difference_is_that_of_the_recoveries(kl: dict[int, Sequence[float]]) -> None:
    a, b, reuse = ({p: v[i] for p, v in kl.items()} for i in range(3))
    difference = paired_difference(a, b, reuse)
    assert difference.value == pytest.approx(
        _value(recovery_estimate(a, reuse)) - _value(recovery_estimate(b, reuse)), abs=1e-9
    )
    turned = paired_difference(b, a, reuse)
    assert (turned.low, turned.high) == pytest.approx((-difference.high, -difference.low))
    assert paired_difference(a, a, reuse) == Estimate(0, 0, 0)


def test_pairing_removes_what_prompts_differ_by() -> None:
    rng = np.random.default_rng(0)
    reuse = dict.fromkeys(range(32), 1.0)
    b = {p: float(rng.uniform(0, 1)) for p in reuse}
    a = {p: kl - 0.01 for p, kl in b.items()}  # a little better on every prompt
    difference = paired_difference(a, b, reuse)
    assert (difference.low, difference.high) == pytest.approx((0.01, 0.01))
    one, other = recovery_estimate(a, reuse), recovery_estimate(b, reuse)
    assert one is not None and other is not None
    assert one.low < other.high  # which two separate intervals cannot tell apart


def test_paired_difference_takes_common_prompts_only() -> None:
    difference = paired_difference({0: 0.1, 1: 9.0}, {0: 0.3, 2: 9.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert difference.value == pytest.approx(0.2)
    with pytest.raises(ValueError, match="got 0 prompts"):
        paired_difference({0: 0.1}, {1: 0.1}, {0: 1.0, 1: 1.0})
    with pytest.raises(ValueError, match="KL above 0"):
        paired_difference({0: 0.1}, {0: 0.1}, {0: 0.0})


def test_front_by_hand() -> None:
    points = [(0.4, 0.9), (0.1, 0.5), (0.2, 0.4), (0.2, 0.7), (0.5, 0.9), (0.1, 0.5), (0.1, 0.2)]
    assert pareto_front(points) == [1, 5, 3, 0]
    assert pareto_front([]) == []
    with pytest.raises(ValueError, match="got NaN"):
        pareto_front([(0.1, float("nan"))])


COORDINATE = st.one_of(st.integers(0, 4), st.floats(allow_nan=False))


@given(st.lists(st.tuples(COORDINATE, COORDINATE), max_size=25))
def test_front_is_what_brute_force_finds(points: list[tuple[float, float]]) -> None:
    def dominated(i: int) -> bool:
        cost, value = points[i]
        return any(c <= cost and v >= value and (c < cost or v > value) for c, v in points)

    front = pareto_front(points)
    assert sorted(front) == [i for i in range(len(points)) if not dominated(i)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)
