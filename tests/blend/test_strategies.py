from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.blend import STRATEGIES
from lmc.blend.strategy import positions, runs_of

RUNS = [(10, 40), (40, 50), (90, 200)]


@pytest.mark.parametrize(
    ("config", "runs"),
    [
        ("prefix", []),
        ("full_reuse", []),
        ("full_recompute", [(10, 50), (90, 200)]),
        ({"name": "epic", "link_tokens": 16}, [(10, 26), (40, 50), (90, 106)]),
        ({"name": "epic", "link_tokens": 0}, []),
    ],
)
def test_rows(config: object, runs: list[tuple[int, int]]) -> None:
    assert runs_of(STRATEGIES.build(config).rows(RUNS)) == runs  # type: ignore[arg-type]


def test_every_strategy_chooses_among_moved_rows_only() -> None:
    for name in STRATEGIES.names():
        rows = STRATEGIES.build(name).rows(RUNS)
        assert np.all(np.diff(rows) > 0)
        assert np.isin(rows, positions(RUNS)).all()
        assert len(STRATEGIES.build(name).rows([])) == 0


def test_unknown_strategy_and_field_are_named() -> None:
    with pytest.raises(ValueError, match=r"'cachblend'.*epic, full_recompute, full_reuse, prefix"):
        STRATEGIES.build("cachblend")
    with pytest.raises(ValueError, match=r"'epic'.*ratio.*link_tokens"):
        STRATEGIES.build({"name": "epic", "ratio": 0.1})
    with pytest.raises(ValueError, match="at least 0, got -1"):
        STRATEGIES.build({"name": "epic", "link_tokens": -1})


@given(st.sets(st.integers(0, 100)))
def test_runs_and_positions_are_inverse(rows: set[int]) -> None:
    ascending = np.array(sorted(rows), np.int64)
    assert np.array_equal(positions(runs_of(ascending)), ascending)
