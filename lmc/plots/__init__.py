"""Figures, one function each: of measured runs, and of traces. All return a matplotlib Figure."""

from lmc.plots.explain import explained
from lmc.plots.pareto import deviation_map, pareto, quality_by_position
from lmc.plots.runs import kinds, ttft, ttft_quality
from lmc.plots.traces import (
    hit_rates,
    memory_curves,
    reuse_distances,
    reuse_over_time,
    token_map,
    ttft_cdf,
    where_it_pays,
)

__all__ = [
    "deviation_map",
    "explained",
    "hit_rates",
    "kinds",
    "memory_curves",
    "pareto",
    "quality_by_position",
    "reuse_distances",
    "reuse_over_time",
    "token_map",
    "ttft",
    "ttft_cdf",
    "ttft_quality",
    "where_it_pays",
]
