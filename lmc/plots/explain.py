"""The token map of one request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lmc.plots.runs import KIND_COLOURS
from lmc.plots.style import tidy

if TYPE_CHECKING:
    from lmc.sim.explain import Report


def explained(report: Report, columns: int = 256) -> Figure:
    """Every token of a prompt as a cell, row by row, coloured by kind; below, tokens by cause."""
    T, kinds = report.prompt_tokens, list(KIND_COLOURS)
    high = -(-T // columns)
    cells = np.full(high * columns, len(kinds))
    by_cause: dict[tuple[str, str], int] = {}
    for start, end, kind, _, cause in report.map:
        cells[start:end] = kinds.index(kind)
        if cause is not None:
            by_cause[cause, kind] = by_cause.get((cause, kind), 0) + end - start
    heights = [0.4 + 0.06 * high, 0.4 + 0.25 * max(len(by_cause), 1)]
    figure = Figure(figsize=(8, 1.4 + sum(heights)), layout="constrained")
    axes, bars = figure.subplots(2, height_ratios=heights)
    axes.imshow(
        cells.reshape(high, columns),
        cmap=ListedColormap([*KIND_COLOURS.values(), "white"]),
        vmin=0,
        vmax=len(kinds),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_xlabel(f"tokens, {columns} a row")
    axes.set_yticks([0, high - 1] if high > 1 else [0], ["0", f"{(high - 1) * columns:,}"][:high])
    ordered = sorted(by_cause.items(), key=lambda item: item[1])
    for place, ((_, kind), n) in enumerate(ordered):
        bars.barh(place, n, color=KIND_COLOURS[kind])
        bars.annotate(f" {n:,}", (n, place), va="center", fontsize="small")
    bars.set_yticks(range(len(ordered)), [cause.replace("_", " ") for (cause, _), _ in ordered])
    bars.set_xlabel("tokens that were computed, by cause")
    bars.margins(x=0.12)
    tidy(bars)
    handles = [
        Patch(color=KIND_COLOURS[kind], label=f"{kind.replace('_', ' ')} {n / T:.0%}")
        for kind, n in report.kinds.items()
        if n
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure
