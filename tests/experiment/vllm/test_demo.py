"""What the demo is there to show, on the real model; about five minutes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from lmc.experiment.run import run
from lmc.results.rows import read_rows
from lmc.results.summary import summarise


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(2400)
def test_the_demo_shows_what_it_says(tmp_path: Path, demo: Path) -> None:
    run(demo, tmp_path, ["workload.limit=8"])
    arms = {s.arm: s for s in summarise(read_rows(tmp_path))}
    for exact in ("prefix_caching", "prefix_equal_rows", "full_recompute"):
        assert arms[exact].greedy_agreement == 1, exact
        assert arms[exact].logprob_error is not None
        assert arms[exact].logprob_error < 1e-4, exact
    assert arms["epic16"].found >= 0.9
    assert arms["epic16_cdc"].found >= 0.65
    worst_first = [arms[a] for a in ("full_reuse_norotate", "full_reuse", "epic16")]
    for worse, better in pairwise(worst_first):
        assert worse.kl_last is not None
        assert better.kl_last is not None
        assert worse.kl_last > better.kl_last, (worse.arm, better.arm)
        assert worse.kl_mean is not None
        assert better.kl_mean is not None
        assert worse.kl_mean.value > better.kl_mean.value, (worse.arm, better.arm)
    # Rows, not seconds: what was computed of a prompt, which no busy machine can change.
    assert arms["epic16"].compute_fraction == pytest.approx(112 / 1616)
    assert arms["prefix_equal_rows"].compute_fraction == pytest.approx(112 / 1616)
