"""The two tables that a run ends with."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from lmc.results.summary import ArmSummary, Estimate


def fallbacks(summaries: Sequence[ArmSummary]) -> list[str]:
    """A line for each reason why an arm's requests were not blended: such an arm shows nothing."""
    return [
        f"{s.arm}: {count} of {s.measurements} requests not blended: {reason}"
        for s in summaries
        for reason, count in s.reasons.items()
    ]


def tables(summaries: Sequence[ArmSummary]) -> list[Table]:
    """Speed and quality by arm, each at most 80 columns wide."""
    return [_speed(summaries), _quality(summaries)]


def _speed(summaries: Sequence[ArmSummary]) -> Table:
    table = _table(
        "Time to first token",
        ["TTFT s", "speed-up [95%]", "by CPU", "÷ equal", "rows", "found"],
        "Speed-up over full_prefill, and ÷ equal, the ratio to prefix_equal_rows: medians of "
        "paired ratios. rows: computed, of all. found: tokens in any cache.",
    )
    for s in summaries:
        table.add_row(
            s.arm,
            f"{s.ttft_s:.2f}",
            _interval(s.speedup),
            "–" if s.cpu_speedup is None else f"{s.cpu_speedup.value:.1f}",
            "–" if s.vs_equal_rows is None else f"{s.vs_equal_rows.value:.2f}",
            f"{s.compute_fraction:.1%}",
            f"{s.found:.1%}",
        )
    return table


def _quality(summaries: Sequence[ArmSummary]) -> Table:
    table = _table(
        "Quality against full_prefill",
        ["max Δlogp", "KL first", "KL answer", "greedy", "recovery [95%]"],
        "Over the whole vocabulary, in nats. max Δlogp: the greatest difference of a first "
        "token's log-probability. Recovery: 1 - KL answer / that of full_reuse.",
    )
    for s in summaries:
        table.add_row(
            s.arm,
            _small(s.logprob_error),
            _small(s.kl_last),
            _small(s.kl_mean.value if s.kl_mean else None),
            _share(s.greedy_agreement),
            _interval(s.recovery),
        )
    return table


def _table(title: str, columns: list[str], caption: str) -> Table:
    table = Table(title=title, caption=caption, caption_justify="left", title_justify="left")
    table.box, table.show_edge, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, False, 0
    table.add_column("arm", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _interval(e: Estimate | None) -> str:
    if e is None:
        return "–"
    form = ".1f" if e.value >= 2 else ".2f"
    return f"{e.value:{form}} [{e.low:{form}}, {e.high:{form}}]"


def _small(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
