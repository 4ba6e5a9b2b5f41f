"""Cache-Craft's score and rows on chunks small enough to count by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.blend.cachecraft import CacheCraft, overlap
from lmc.blend.dense import Attended, alone
from lmc.blend.evidence import Outline, runs_of

A, B, C, D = (bytes([x]) * 32 for x in range(4))
# Four tokens that paid 0.5, 0.1, 0.9 and 0.3 to A (2 tokens), B (5) and C (10).
CHUNK = Attended(
    tokens=np.array([0.5, 0.1, 0.9, 0.3], np.float32),
    intra=0.8,
    before=(A, B, C),
    inter=(0.8, 0.6, 0.4),
    lengths=(2, 5, 10),
)
# a = 0.8 / (4 * 2) + 0.6 / (4 * 5) + 0.4 / (4 * 10) = 0.14, b = 0.8 / 16 = 0.05
IMPACT = 1 / (1 + math.exp(-0.14 / 0.05))


def outline(*moved: tuple[int, int]) -> Outline:
    return Outline(L=2, T=100, end=90, moved=moved, new=10)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ((), 0.0),
        ((D,), 0.0),
        ((A, B, C), 1.0),
        ((D, A, D, B, C), 1.0),  # what is new in between is not asked about
        ((A,), 0.8 / 1.8),
        ((A, C), 1.2 / 1.8),
        ((C, A), 0.0),  # the one pair of them is reversed
        ((B, A, C), 2 / 3),  # one of three pairs is
        ((C, B, A), 0.0),
        ((C, A, B), 1 / 3),
    ],
)
def test_overlap_by_hand(before: tuple[bytes, ...], expected: float) -> None:
    assert overlap(CHUNK, before) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("alpha", "before", "expected"),
    [
        (1.0, (), IMPACT),
        (0.5, (), IMPACT / 2),
        (3.0, (), 1.0),  # at most all
        (1.0, (A,), IMPACT * (1 - 0.8 / 1.8)),
        (1.0, (A, B, C), 0.0),
        (0.0, (), 0.0),
    ],
)
def test_overhead_by_hand(alpha: float, before: tuple[bytes, ...], expected: float) -> None:
    assert CacheCraft(alpha).overhead(CHUNK, before) == pytest.approx(expected, abs=1e-9)


def test_rows_are_those_that_looked_most_at_other_chunks() -> None:
    assert CacheCraft(0.6).overhead(CHUNK, (A,)) == pytest.approx(0.6 * IMPACT / 1.8)
    assert CacheCraft(0.6).rows_of(CHUNK, (A,)).tolist() == [0, 2]  # ceil(0.31 * 4) of them
    assert CacheCraft(1.0).rows_of(CHUNK, ()).tolist() == [0, 1, 2, 3]
    assert CacheCraft(0.1).rows_of(CHUNK, ()).tolist() == [2]
    assert CacheCraft(1.0).rows_of(CHUNK, (A, B, C)).tolist() == []


def test_a_chunk_that_had_no_other_in_front_is_computed_again_from_its_beginning() -> None:
    strategy = CacheCraft(0.5)
    assert strategy.overhead(alone(40), (A,)) == 0.25
    assert strategy.rows_of(alone(40), (A,)).tolist() == list(range(10))
    assert runs_of(strategy.rows(outline((20, 60), (60, 64)))) == [(20, 30), (60, 61)]
    assert strategy.rows(outline()).dtype == np.int64


def test_a_chunk_that_looked_at_others_alone_depends_on_them_wholly() -> None:
    chunk = Attended(np.ones(3, np.float32), 0.0, (A,), (3.0,), (1,))
    assert CacheCraft().overhead(chunk, ()) == 1.0


def test_a_text_that_stands_in_front_twice_counts_at_its_first_place() -> None:
    chunk = Attended(np.ones(2, np.float32), 1.0, (A, B, A), (0.2, 0.6, 0.2), (1, 1, 1))
    assert overlap(chunk, (A, B, A)) == pytest.approx(1.0)
    assert overlap(chunk, (B, A)) == 0.0
    assert overlap(chunk, (A,)) == pytest.approx(0.4)


def test_a_negative_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha must be at least 0, got -1"):
        CacheCraft(-1)


KEYS = [bytes([i]) * 32 for i in range(8)]


@given(
    old=st.permutations(KEYS).flatmap(lambda p: st.integers(0, 6).map(lambda n: p[:n])),
    now=st.permutations(KEYS).flatmap(lambda p: st.integers(0, 8).map(lambda n: p[:n])),
    seed=st.integers(0, 1000),
    alpha=st.floats(0, 3),
)
def test_any_chunk(old: list[bytes], now: list[bytes], seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    paid = rng.random((12, len(old))).astype(np.float32)
    inter = tuple(float(x) for x in paid.sum(0))
    chunk = Attended(paid.sum(1), 4.0, tuple(old), inter, tuple([5] * len(old)))
    strategy = CacheCraft(alpha)
    share = strategy.overhead(chunk, now)
    assert 0 <= overlap(chunk, now) <= 1 + 1e-9
    assert -1e-9 <= share <= min(1.0, alpha)
    rows = strategy.rows_of(chunk, now)
    assert len(rows) == math.ceil(max(0.0, share) * 12 - 1e-9)
    left = np.setdiff1d(np.arange(12), rows)
    if len(rows) and len(left):
        assert chunk.tokens[rows].min() >= chunk.tokens[left].max()
    # Where its whole context stands before it in its order again, the chunk is as it was.
    if old:
        assert strategy.overhead(chunk, [*old, KEYS[7]]) == pytest.approx(0, abs=1e-6)
