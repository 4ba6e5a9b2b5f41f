"""Figures of a run, one function each; all take rows (or a results folder) and return a Figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from lmc.plots.style import BLUE, GREY, ORANGE, PURPLE, SKY, YELLOW, tidy
from lmc.results.rows import read_rows
from lmc.results.statistics import Estimate
from lmc.results.summary import ArmSummary, summarise

Rows = Sequence[dict[str, Any]] | Path | str
Point = tuple[ArmSummary, Estimate, Estimate]

STOCK, BLENDS = ORANGE, BLUE
KIND_COLOURS = {
    "local": GREY,
    "local_blended": PURPLE,
    "exact": BLUE,
    "moved": SKY,
    "recomputed": YELLOW,
    "new": ORANGE,
}
# Two full prefills in float32 whose rows were batched otherwise differ by about 1e-11 nats. What
# lies below the floor is rounding, not quality, and is drawn on it.
FLOOR = 1e-4


def ttft_quality(rows: Rows) -> Figure:
    """Speed-up of the first token against KL to full prefill; right and down is better.

    x: median of paired ratios. y: mean KL over the forced answer, in nats. Lines: 95% intervals.
    """
    summaries = _summaries(rows)
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    points: list[Point] = []
    for s in summaries:
        if s.speedup is None or s.kl_mean is None:
            continue
        kl = Estimate(*(max(v, FLOOR) for v in (s.kl_mean.value, s.kl_mean.low, s.kl_mean.high)))
        axes.errorbar(
            s.speedup.value,
            kl.value,
            xerr=interval_bars(s.speedup),
            yerr=interval_bars(kl),
            fmt=_marker(s),
            color=_colour(s),
            markersize=7,
            elinewidth=1,
            zorder=3,
        )
        points.append((s, s.speedup, kl))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.set_ylim(FLOOR / 6, 3)
    axes.yaxis.set_major_formatter(FuncFormatter(kl_label))
    axes.axhline(FLOOR, color="0.75", linewidth=1, zorder=1)
    axes.margins(x=0.15)
    axes.set_xlabel("time to first token: how many times shorter than full_prefill")
    axes.set_ylabel("mean KL to full_prefill, nats")
    axes.set_title(_title(summaries), fontsize="medium", loc="left")
    axes.text(0.99, 0.02, "better ↘", transform=axes.transAxes, ha="right", color="0.4")
    _legend(axes, summaries)
    tidy(axes)
    _label_points(figure, axes, points)
    return figure


def ttft(rows: Rows) -> Figure:
    """Time to first token of every request, and the median of each arm."""
    rows = rows_of(rows)
    summaries = summarise(rows)
    figure = Figure(figsize=(8, 0.6 + 0.42 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    for place, s in enumerate(summaries):
        times = [row["ttft_s"] for row in rows if row["arm"] == s.arm]
        axes.plot(times, [place] * len(times), "o", color=_colour(s), alpha=0.35, markersize=6)
        axes.plot(s.ttft_s, place, "|", color=_colour(s), markersize=20, markeredgewidth=2.5)
        label = f"{s.ttft_s:.2f} s"
        end = (max(times), place)
        axes.annotate(label, end, (8, 0), textcoords="offset points", va="center")
    _arms_down(axes, summaries)
    axes.set_xlim(0, None)
    axes.set_xlabel("time to first token, s (bar: median)")
    tidy(axes)
    return figure


def kinds(rows: Rows) -> Figure:
    """Where the tokens of a prompt came from, mean share by arm."""
    summaries = _summaries(rows)
    figure = Figure(figsize=(8, 1.0 + 0.4 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    for kind, colour in KIND_COLOURS.items():
        shares = np.array([s.kinds[kind] for s in summaries])
        before = [sum(s.kinds[k] for k in list(KIND_COLOURS)[: _place(kind)]) for s in summaries]
        if shares.any():
            label = kind.replace("_", " ")
            axes.barh(range(len(summaries)), shares, 0.7, before, color=colour, label=label)
    _arms_down(axes, summaries)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("tokens of the prompt")
    figure.legend(loc="outside upper center", ncols=len(KIND_COLOURS), frameon=False)
    tidy(axes)
    return figure


def rows_of(rows: Rows) -> Sequence[dict[str, Any]]:
    """The rows themselves, of a folder or a file of them."""
    return read_rows(rows) if isinstance(rows, str | Path) else rows


def _summaries(rows: Rows) -> list[ArmSummary]:
    return summarise(rows_of(rows))


def _place(kind: str) -> int:
    return list(KIND_COLOURS).index(kind)


def _colour(summary: ArmSummary) -> str:
    return BLENDS if summary.blends else STOCK


def _marker(summary: ArmSummary) -> str:
    return "o" if summary.blends else "s"


def interval_bars(e: Estimate) -> list[list[float]]:
    """How far an interval reaches below and above its value, as matplotlib's error bars want it."""
    return [[max(e.value - e.low, 0)], [max(e.high - e.value, 0)]]


def kl_label(kl: float, _: int) -> str:
    """A tick of a logarithmic axis of KL, whose lowest stands for all below."""
    return f"≤ {kl:g}" if np.isclose(kl, FLOOR) else f"{kl:g}" if kl > FLOOR else ""


def _title(summaries: Sequence[ArmSummary]) -> str:
    prompts = max((s.prompts for s in summaries), default=0)
    measured = max((s.measurements for s in summaries), default=0)
    return f"{prompts} prompts, {measured} measurements an arm; lines: 95% intervals"


def _legend(axes: Axes, summaries: Sequence[ArmSummary]) -> None:
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=label)
        for blends, marker, colour, label in (
            (False, "s", STOCK, "stock vLLM"),
            (True, "o", BLENDS, "vLLM with lmc"),
        )
        if any(s.blends == blends for s in summaries)
    ]
    axes.legend(handles=handles, loc="upper left", frameon=False)


def _arms_down(axes: Axes, summaries: Sequence[ArmSummary]) -> None:
    axes.set_yticks(range(len(summaries)), [s.arm for s in summaries])
    axes.set_ylim(len(summaries) - 0.4, -0.7)


def _label_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each arm's name at the first place beside its point where nothing else stands."""
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # settles where the axes are
    taken = []
    for _, x, y in points:
        corners = [(x.value, y.value), (x.low, y.value), (x.high, y.value)]
        corners += [(x.value, y.low), (x.value, y.high)]
        (cx, cy), left, right, low, high = axes.transData.transform(corners)
        taken.append(Bbox.from_extents(left[0], cy - 2, right[0], cy + 2))
        taken.append(Bbox.from_extents(cx - 2, low[1], cx + 2, high[1]))
        taken.append(Bbox.from_extents(cx - 8, cy - 8, cx + 8, cy + 8))
    for s, x, y in sorted(points, key=lambda point: point[1].value):
        text = axes.annotate(
            s.arm, (x.value, y.value), (0, 0), textcoords="offset points", color=_colour(s)
        )
        for offset, horizontal in _offsets():
            text.set_position(offset)
            text.set_horizontalalignment(horizontal)
            box = text.get_window_extent(canvas.get_renderer())
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def _offsets() -> Iterator[tuple[tuple[float, float], Literal["left", "right"]]]:
    """Where a label may stand, in points from its point, the best place first."""
    for height in (5, -13, 19, 33, 47, 61, 75, 89):
        yield (9, height), "left"
        yield (-9, height), "right"
