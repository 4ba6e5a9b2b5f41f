"""Rows to numbers: the one place where tables, figures and notebooks get them from.

A timing is compared with another of the same prompt and repetition, taken moments apart, and
medians are of those ratios: the speed of a shared machine drifts by more than most effects.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmc.results.rows import Row
from lmc.results.statistics import Estimate, bootstrap, paired_ratio, recovery_estimate

FULL_PREFILL = "full_prefill"
EQUAL_ROWS = "prefix_equal_rows"
FULL_REUSE = "full_reuse"


@dataclass(frozen=True)
class ArmSummary:
    """One arm over all its prompts and repetitions; None where it was not measured.

    blends: whether it ran on lmc.
    ttft_s: median seconds.
    speedup, cpu_speedup: median of full prefill's TTFT (CPU seconds) over the arm's, paired.
    vs_equal_rows: median of the arm's TTFT over that of vLLM's prefix cache when it computes an
        equal number of rows, paired.
    compute_fraction, flops_fraction: means.
    kinds: mean share of the prompt by kind; found: all kinds but `new`.
    logprob_error: the greatest over all prompts.
    kl_last to greedy_agreement: means (lmc.quality.metrics.AnswerQuality).
    recovery: 1 - mean kl_mean / that of full_reuse, over the same prompts.
    reasons: why requests were not blended -> how many.
    """

    arm: str
    blends: bool
    prompts: int
    measurements: int
    ttft_s: float
    speedup: Estimate | None
    cpu_speedup: Estimate | None
    vs_equal_rows: Estimate | None
    compute_fraction: float
    flops_fraction: float
    kinds: dict[str, float]
    found: float
    logprob_error: float | None
    kl_last: float | None
    kl_mean: Estimate | None
    top1_agreement: float | None
    delta_nll: float | None
    greedy_agreement: float | None
    recovery: Estimate | None
    reasons: dict[str, int]


def summarise(rows: Sequence[Row]) -> list[ArmSummary]:
    """One summary an arm, in the order of the experiment."""
    groups = by_arm(rows)
    return [_summary(arm, groups) for arm in groups]


def by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each arm that was measured, in the order of the experiment."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["arm"]].append(row)
    order = list(rows[-1]["config"]["arms"]) if rows else []
    return {name: groups[name] for name in order if name in groups}


def _summary(arm: str, groups: dict[str, list[Row]]) -> ArmSummary:
    rows = groups[arm]
    full, equal = groups.get(FULL_PREFILL, []), groups.get(EQUAL_ROWS, [])
    kinds = {
        kind: float(np.mean([row["kinds"][kind] / row["prompt_tokens"] for row in rows]))
        for kind in rows[0]["kinds"]
    }
    reasons: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["reason"] is not None:
            reasons[row["reason"]] += 1
    kl = _by_prompt(rows, "kl_mean")
    return ArmSummary(
        arm=arm,
        blends="blend" in rows[0]["config"]["arms"][arm],
        prompts=len({row["prompt_id"] for row in rows}),
        measurements=len(rows),
        ttft_s=float(np.median([row["ttft_s"] for row in rows])),
        speedup=paired_ratio(full, rows, "ttft_s"),
        cpu_speedup=paired_ratio(full, rows, "cpu_s"),
        vs_equal_rows=paired_ratio(rows, equal, "ttft_s"),
        compute_fraction=float(np.mean([row["compute_fraction"] for row in rows])),
        flops_fraction=float(np.mean([row["flops_fraction"] for row in rows])),
        kinds=kinds,
        found=1 - kinds["new"],
        logprob_error=max(_by_prompt(rows, "logprob_error").values(), default=None),
        kl_last=_mean(rows, "kl_last"),
        kl_mean=bootstrap([[v] for v in kl.values()], np.mean),
        top1_agreement=_mean(rows, "top1_agreement"),
        delta_nll=_mean(rows, "delta_nll"),
        greedy_agreement=_mean(rows, "greedy_agreement"),
        recovery=recovery_estimate(kl, _by_prompt(groups.get(FULL_REUSE, []), "kl_mean")),
        reasons=dict(reasons),
    )


def _by_prompt(rows: Sequence[Row], column: str) -> dict[int, float]:
    """Quality is measured once a prompt; other repetitions hold null."""
    return {row["prompt_id"]: row[column] for row in rows if row[column] is not None}


def _mean(rows: Sequence[Row], column: str) -> float | None:
    values = list(_by_prompt(rows, column).values())
    return float(np.mean(values)) if values else None
