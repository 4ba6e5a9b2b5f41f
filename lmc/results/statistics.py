"""Estimates and their intervals: bootstrap over prompts, paired where arms are compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmc.quality.metrics import recovery
from lmc.results.rows import Row

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval, by bootstrap over prompts."""

    value: float
    low: float
    high: float


def bootstrap(
    groups: Sequence[Sequence[Any]], statistic: Callable[[list[Any]], Any]
) -> Estimate | None:
    """`statistic(groups)`, with the 2.5 and 97.5 percentiles of it over resampled groups.

    A group is a prompt: repetitions of it are not independent, so they are drawn together. The
    draws are seeded, so that the same rows always give the same interval.
    """
    if not groups:
        return None
    arrays = [np.asarray(group, np.float64) for group in groups]
    rng = np.random.default_rng(0)
    draws = [
        statistic([arrays[i] for i in rng.integers(len(arrays), size=len(arrays))])
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(statistic(arrays)), float(low), float(high))


def paired_ratio(over: Sequence[Row], under: Sequence[Row], column: str) -> Estimate | None:
    """Median of `over[column] / under[column]` over the prompts and repetitions both have."""
    known = {(r["prompt_id"], r["repetition"]): r[column] for r in under}
    ratios: dict[int, list[float]] = defaultdict(list)
    for row in over:
        if other := known.get((row["prompt_id"], row["repetition"])):
            ratios[row["prompt_id"]].append(row[column] / other)
    return bootstrap(list(ratios.values()), lambda sample: np.median(np.concatenate(sample)))


def recovery_estimate(arm: Mapping[Any, float], reuse: Mapping[Any, float]) -> Estimate | None:
    """Recovery of an arm, over the prompts that both have; prompt -> KL. None without a loss."""
    pairs = [(kl, reuse[prompt]) for prompt, kl in arm.items() if prompt in reuse]
    if not pairs or not any(reference for _, reference in pairs):
        return None
    return bootstrap(pairs, lambda sample: recovery(*np.transpose(sample)))


def paired_difference(
    a: Mapping[Any, float], b: Mapping[Any, float], reuse: Mapping[Any, float]
) -> Estimate:
    """recovery(a) - recovery(b), over the prompts all three have; prompt -> KL.

    Each bootstrap draw takes the same prompts for both arms: how hard a prompt is then cancels,
    which two separate intervals would count twice. Raises ValueError where no prompt is common
    or full_reuse loses nothing.
    """
    common = [p for p in a if p in b and p in reuse]
    estimate = bootstrap([(a[p], b[p], reuse[p]) for p in common], _difference)
    if estimate is None or np.isnan(estimate.value):
        raise ValueError(
            f"paired difference: got {len(common)} prompts that both arms and full_reuse have, "
            "want at least one, and one where full_reuse has KL above 0"
        )
    return estimate


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, value) points that no other dominates, in ascending order of cost.

    A point dominates another if it costs no more, is worth no less, and is better in one of the
    two; of equal points all stay. Raises ValueError for NaN, which has no order.
    """
    if np.isnan(np.asarray(points, float)).any():
        raise ValueError(f"points: got NaN among {list(points)}, want (cost, value) numbers")
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def _difference(sample: list[Any]) -> float:
    a, b, reuse = np.transpose(sample)
    return recovery(a, reuse) - recovery(b, reuse)
