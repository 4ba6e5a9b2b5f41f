"""The tables that a run ends with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from lmc.cli.output import table
from lmc.results.rows import Row
from lmc.results.statistics import Estimate, paired_difference, recovery_estimate
from lmc.results.summary import FULL_REUSE, ArmSummary, by_arm


def fallbacks(summaries: Sequence[ArmSummary]) -> list[str]:
    """A line for each reason why an arm's requests were not blended: such an arm shows nothing."""
    return [
        f"{s.arm}: {count} of {s.measurements} requests not blended: {reason}"
        for s in summaries
        for reason, count in s.reasons.items()
    ]


def speed_and_quality(summaries: Sequence[ArmSummary]) -> list[Table]:
    """Of a run on vLLM: speed and quality by arm, each at most 80 columns wide."""
    return [_speed(summaries), _quality(summaries)]


def hf_quality(rows: Sequence[Row]) -> Table:
    """Of a run on a Hugging Face model: what each arm computes, and how far it is off."""
    groups = by_arm(rows)
    shown = _table(
        "Quality against full prefill",
        ["rows", "FLOPs", "KL", "top-1", "top-5", "ΔNLL", "recovery [95%]"],
        "rows: row-layers of all, probe and check layers included. KL(full || arm), "
        "top-1 and top-5: over the forced answer. ΔNLL: of what truly follows, nats a token. "
        "recovery: 1 - KL / that of full_reuse.",
    )
    reuse = _kl(groups[FULL_REUSE])
    for name, group in groups.items():
        mean = {
            key: float(np.mean([row[key] for row in group]))
            for key in ("compute_fraction", "flops_fraction", "kl_mean")
        }
        shown.add_row(
            name,
            f"{mean['compute_fraction']:.1%}",
            f"{mean['flops_fraction']:.0%}",
            f"{mean['kl_mean']:.4f}" if mean["kl_mean"] > 1e-4 else f"{mean['kl_mean']:.0e}",
            f"{np.mean([row['top1_agreement'] for row in group]):.0%}",
            f"{np.mean([row['top5_overlap'] for row in group]):.0%}",
            f"{np.mean([row['delta_nll'] for row in group]):+.2f}",
            _interval(recovery_estimate(_kl(group), reuse), ".2f"),
        )
    return shown


def comparisons(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each pair of arms: the difference of their recoveries."""
    groups = by_arm(rows)
    reuse = _kl(groups[FULL_REUSE])
    lines = []
    for a, b in pairs:
        if a in groups and b in groups:
            difference = paired_difference(_kl(groups[a]), _kl(groups[b]), reuse)
            lines.append(f"recovery of {a} - {b}: {_interval(difference, '+.2f')}")
    return lines


def _kl(rows: Sequence[Row]) -> dict[int, float]:
    return {row["prompt_id"]: row["kl_mean"] for row in rows}


def _speed(summaries: Sequence[ArmSummary]) -> Table:
    shown = _table(
        "Time to first token",
        ["TTFT s", "speed-up [95%]", "by CPU", "÷ equal", "rows", "found"],
        "Speed-up over full_prefill, and ÷ equal, the ratio to prefix_equal_rows: medians of "
        "paired ratios. rows: computed, of all. found: tokens in any cache.",
    )
    for s in summaries:
        shown.add_row(
            s.arm,
            f"{s.ttft_s:.2f}",
            _interval(s.speedup),
            "–" if s.cpu_speedup is None else f"{s.cpu_speedup.value:.1f}",
            "–" if s.vs_equal_rows is None else f"{s.vs_equal_rows.value:.2f}",
            f"{s.compute_fraction:.1%}",
            f"{s.found:.1%}",
        )
    return shown


def _quality(summaries: Sequence[ArmSummary]) -> Table:
    shown = _table(
        "Quality against full_prefill",
        ["max Δlogp", "KL first", "KL answer", "greedy", "recovery [95%]"],
        "Over the whole vocabulary, in nats. max Δlogp: the greatest difference of a first "
        "token's log-probability. Recovery: 1 - KL answer / that of full_reuse.",
    )
    for s in summaries:
        shown.add_row(
            s.arm,
            _small(s.logprob_error),
            _small(s.kl_last),
            _small(s.kl_mean.value if s.kl_mean else None),
            _share(s.greedy_agreement),
            _interval(s.recovery),
        )
    return shown


def _table(title: str, columns: list[str], caption: str) -> Table:
    made = table(title, ["arm", *columns], caption=caption)
    made.padding = 0  # or it would be wider than a terminal of 80 columns
    return made


def _interval(e: Estimate | None, form: str | None = None) -> str:
    if e is None:
        return "–"
    form = form or (".1f" if e.value >= 2 else ".2f")
    return f"{e.value:{form}} [{e.low:{form}}, {e.high:{form}}]"


def _small(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
