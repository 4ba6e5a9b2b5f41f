"""Aggregation: paired ratios, intervals and recovery, against values computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lmc.cli.tables import fallbacks, speed_and_quality
from lmc.results.statistics import bootstrap, paired_ratio
from lmc.results.summary import summarise

MakeRow = Callable[..., dict[str, Any]]


@pytest.fixture
def rows(make_row: MakeRow) -> list[dict[str, Any]]:
    """Two prompts, twice each, on a machine that is twice as slow the second time."""
    rows = []
    for prompt_id in (0, 1):
        for repetition in (0, 1):
            slow = 1 + repetition
            place = (prompt_id, repetition)
            kl = {"kl_mean": 0.4, "kl_last": 0.4} if repetition == 0 else {}
            rows += [
                make_row("full_prefill", *place, ttft_s=8.0 * slow, cpu_s=9.0),
                make_row("full_reuse", *place, ttft_s=0.5 * slow, **kl),
                make_row("epic16", *place, ttft_s=1.0 * slow, **{k: v / 4 for k, v in kl.items()}),
            ]
    return rows


def test_ratios_are_paired(rows: list[dict[str, Any]]) -> None:
    full, reuse, epic = summarise(rows)
    assert [full.arm, reuse.arm, epic.arm] == ["full_prefill", "full_reuse", "epic16"]
    assert epic.speedup is not None
    assert (epic.speedup.low, epic.speedup.value, epic.speedup.high) == (8, 8, 8)
    assert reuse.speedup is not None
    assert reuse.speedup.value == 16
    assert epic.cpu_speedup is not None
    assert epic.cpu_speedup.value == 9
    assert epic.ttft_s == 1.5
    assert (epic.prompts, epic.measurements) == (2, 4)
    assert epic.vs_equal_rows is None


def test_quality_is_a_mean_over_prompts_measured_once(rows: list[dict[str, Any]]) -> None:
    full, reuse, epic = summarise(rows)
    assert full.kl_mean is None
    assert epic.kl_mean is not None
    assert epic.kl_mean.value == pytest.approx(0.1)
    assert epic.recovery is not None
    assert epic.recovery.value == pytest.approx(0.75)
    assert reuse.recovery is not None
    assert reuse.recovery.value == 0


def test_found_is_all_but_new(rows: list[dict[str, Any]]) -> None:
    assert summarise(rows)[2].found == pytest.approx(0.7)


def test_unpaired_measurements_do_not_count(make_row: MakeRow) -> None:
    over = [make_row("full_prefill", 0, ttft_s=4.0), make_row("full_prefill", 1, ttft_s=100.0)]
    ratio = paired_ratio(over, [make_row("epic16", 0, ttft_s=2.0)], "ttft_s")
    assert ratio is not None
    assert ratio.value == 2
    assert paired_ratio(over, [], "ttft_s") is None


def test_bootstrap_draws_prompts_not_measurements() -> None:
    one = bootstrap([[1.0, 3.0]], lambda sample: np.mean(np.concatenate(sample)))
    assert one is not None
    assert (one.low, one.value, one.high) == (2, 2, 2)
    two = bootstrap([[0.0], [1.0]], lambda sample: np.mean(np.concatenate(sample)))
    assert two is not None
    assert (two.low, two.value, two.high) == (0, 0.5, 1)


def test_tables_fit_a_narrow_terminal(rows: list[dict[str, Any]], make_row: MakeRow) -> None:
    from rich.console import Console

    rows.append(make_row("prefix_equal_rows", ttft_s=1.0))
    rows.append(make_row("epic16", 0, 2, ttft_s=1.0, reason="bad_request: spans"))
    summaries = summarise(rows)
    console = Console(width=80, record=True, file=None)
    for table in speed_and_quality(summaries):
        assert console.measure(table).maximum <= 80
        console.print(table)
    text = console.export_text()
    assert "8.0 [8.0, 8.0]" in text
    assert "0.75 [0.75, 0.75]" in text
    assert fallbacks(summaries) == ["epic16: 1 of 5 requests not blended: bad_request: spans"]
