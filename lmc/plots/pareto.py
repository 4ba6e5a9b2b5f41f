"""Figures of strategies: recovery against compute, and where KV deviates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from lmc.plots.runs import FLOOR, Rows, interval_bars, kl_label, rows_of
from lmc.plots.style import BLUE, ORANGE, tidy
from lmc.plots.traces import LINES
from lmc.results.statistics import Estimate, pareto_front, recovery_estimate
from lmc.results.summary import FULL_PREFILL, FULL_REUSE

OURS, OTHERS = ORANGE, BLUE
OWN_STRATEGY = "lmc"
TICKS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 2)

Point = tuple[str, float, Estimate]  # arm, compute fraction, recovery


def pareto(rows: Rows, title: str | None = None) -> Figure:
    """Recovery of every arm against its compute fraction; left and up is better.

    x: mean compute fraction, logarithmic, since most arms lie below 0.3. y: recovery, 1 being
    full prefill and 0 full_reuse; lines: 95% intervals. Filled markers and the step line: arms
    that no other dominates, values alone compared. Arms without a KL are left out, save full
    prefill, whose KL to itself is 0. Raises ValueError without a KL of full_reuse.
    """
    rows = rows_of(rows)
    points = _points(rows)
    front = pareto_front([(cost, value.value) for _, cost, value in points])
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for y in (0, 1):
        axes.axhline(y, color="0.75", linewidth=1, zorder=1)
    axes.step(
        [points[i][1] for i in front],
        [points[i][2].value for i in front],
        where="post",
        color="0.5",
        linewidth=1.2,
        zorder=2,
        label="Pareto front",
    )
    for i, (arm, cost, value) in enumerate(points):
        axes.errorbar(
            cost,
            value.value,
            yerr=interval_bars(value),
            fmt="o",
            color=_colour(arm),
            markerfacecolor=_colour(arm) if i in front else "white",
            markersize=7,
            elinewidth=1,
            zorder=3,
            label=arm,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.12, y=0.1)
    axes.set_xlabel("compute fraction: row-layers computed, of those of full_prefill")
    axes.set_ylabel("recovery: 1 full_prefill, 0 full_reuse")
    prompts = len(_column(rows, "kl_mean")[FULL_REUSE])
    about = f"{prompts} prompts; lines: 95% intervals"
    axes.set_title(f"{title}: {about}" if title else about, fontsize="medium", loc="left")
    figure.legend(handles=_handles(points), loc="outside upper right", ncols=3, frameon=False)
    tidy(axes)
    _label_points(figure, axes, points, front)
    return figure


def deviation_map(
    deviation: np.ndarray,
    chunk_starts: Sequence[int],
    rows_by_layer: Sequence[np.ndarray] | None = None,
) -> Figure:
    """Deviation `[L, T]` of K or of V as a heat map, layer 0 at the bottom.

    chunk_starts: first tokens of the chunks, drawn as thin lines.
    rows_by_layer: per layer the positions `[M]` that a strategy recomputes there.
    Raises ValueError for positions outside T and for another number of layers.
    """
    L, T = deviation.shape
    if rows_by_layer is not None and len(rows_by_layer) != L:
        raise ValueError(f"rows_by_layer: got {len(rows_by_layer)} layers, want {L}")
    drawn = np.concatenate([chunk_starts, *(rows_by_layer or ())])
    if len(drawn) and not (drawn.min() >= 0 and drawn.max() < T):
        raise ValueError(
            f"positions: got {drawn.min():g} to {drawn.max():g}, allowed: 0 to {T - 1}"
        )
    figure = Figure(figsize=(10, 1.6 + 0.11 * L), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(deviation, cmap="viridis", aspect="auto", origin="lower", vmin=0)
    figure.colorbar(image, ax=axes, label="deviation from full_prefill", pad=0.01)
    axes.vlines(np.array(chunk_starts) - 0.5, -0.5, L - 0.5, color="white", linewidth=0.6)
    for layer, rows in enumerate(rows_by_layer or ()):
        axes.hlines([layer] * len(rows), rows - 0.5, rows + 0.5, color=OURS, linewidth=2.5)
    axes.set_xlabel("token; white lines: where chunks start")
    axes.set_ylabel("layer")
    if rows_by_layer is not None:
        handle = Line2D([], [], color=OURS, linewidth=2.5, label="recomputed")
        figure.legend(handles=[handle], loc="outside upper right", frameon=False)
    return figure


def quality_by_position(rows: Rows) -> Figure:
    """Mean KL of each answer position, a line an arm: whether an error grows while decoding.

    Answers may differ in length; a position's mean is over the prompts that reach it.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for place, (arm, found) in enumerate(_column(rows_of(rows), "kl_by_position").items()):
        padded = np.full((len(found), max(map(len, found.values()))), np.nan)
        for row, kl in zip(padded, found.values(), strict=True):
            row[: len(kl)] = kl
        mean = np.maximum(np.nanmean(padded, 0), FLOOR)
        colour, marker = LINES[place % len(LINES)]
        axes.plot(mean, marker=marker, markersize=4, color=colour, label=arm)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(kl_label))
    axes.set_xlabel("position in the answer")
    axes.set_ylabel("mean KL to full_prefill, nats")
    figure.legend(loc="outside right upper", frameon=False)
    tidy(axes)
    return figure


def _column(rows: Sequence[dict[str, Any]], column: str) -> dict[str, dict[int, Any]]:
    """arm -> prompt -> value, in the order of the experiment; null and missing are left out."""
    found: dict[str, dict[int, Any]] = {arm: {} for arm in rows[-1]["config"]["arms"]}
    for row in rows:
        if row.get(column) is not None:
            found[row["arm"]][row["prompt_id"]] = row[column]
    return {arm: values for arm, values in found.items() if values}


def _points(rows: Sequence[dict[str, Any]]) -> list[Point]:
    kl, cost = _column(rows, "kl_mean"), _column(rows, "compute_fraction")
    reuse = kl.get(FULL_REUSE, {})
    if not any(reuse.values()):
        raise ValueError(
            f"pareto: got no KL above 0 of the arm {FULL_REUSE}, which recovery is relative to; "
            f"arms with one: {', '.join(kl) or 'none'}"
        )
    if FULL_PREFILL in cost:
        kl.setdefault(FULL_PREFILL, dict.fromkeys(cost[FULL_PREFILL], 0.0))
    points = []
    for arm in cost:
        estimate = recovery_estimate(kl.get(arm, {}), reuse)
        if estimate is not None:
            points.append((arm, float(np.mean(list(cost[arm].values()))), estimate))
    return points


def _colour(arm: str) -> str:
    return OURS if arm.partition("@")[0] == OWN_STRATEGY else OTHERS


def _handles(points: Sequence[Point]) -> list[Line2D]:
    own = any(_colour(arm) == OURS for arm, _, _ in points)
    dots = [(OURS, "lmc")] * own + [(OTHERS, "other strategies")]
    return [
        *(Line2D([], [], linestyle="", marker="o", color=c, label=label) for c, label in dots),
        Line2D([], [], color="0.5", marker="o", linewidth=1.2, label="Pareto front (filled)"),
    ]


def _label_points(
    figure: Figure, axes: Axes, points: Sequence[Point], front: Sequence[int]
) -> None:
    """Write each arm's name at the nearest place to its point where nothing else stands."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # settles where the axes are
    taken = []

    def stands(ax: float, ay: float, bx: float, by: float, margin: float = 1) -> None:
        (x0, y0), (x1, y1) = axes.transData.transform([(ax, ay), (bx, by)])
        taken.append(Bbox.from_extents(x0 - margin, y0 - margin, x1 + margin, y1 + margin))

    for _, cost, value in points:
        stands(cost, value.value, cost, value.value, margin=6)
        stands(cost, value.low, cost, value.high)
    for (_, ax, a), (_, bx, b) in pairwise(points[i] for i in front):
        stands(ax, a.value, bx, a.value)
        stands(bx, a.value, bx, b.value)
    for arm, cost, value in sorted(points, key=lambda p: (_colour(p[0]) != OURS, p[1])):
        text = axes.annotate(
            arm,
            (cost, value.value),
            (0, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            color=_colour(arm),
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkB": 4},
        )
        for x, y in _offsets():
            text.set_position((x, y))
            text.set_horizontalalignment("left" if x >= 0 else "right")
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # the annotation's own has the line in it
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            inside = inside and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def _offsets() -> Iterator[tuple[float, float]]:
    """Where a label may stand, in points from its point, the nearest first."""
    for distance in range(10, 240, 8):
        for angle in np.radians([0, 180, 25, -25, 155, -155, 50, -50, 130, -130, 75, -75]):
            yield float(distance * np.cos(angle)), float(distance * np.sin(angle))
