"""Figures of a trace: hit rates, reuse, distances and times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, PercentFormatter

from lmc.plots.style import AMBER, BLUE, GREEN, ORANGE, PURPLE, SKY, tidy

if TYPE_CHECKING:
    from lmc.sim.planning import Plan
    from lmc.sim.reuse import RequestReuse
    from lmc.sim.stack import Curve

REUSE_COLOURS = {"prefix": BLUE, "moved": SKY, "repeated_within": PURPLE, "new": ORANGE}
BOUND = "belady"
LINES = [
    (colour, marker)
    for marker in ("o", "s", "^")
    for colour in (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY)
]


def hit_rates(rows: Sequence[Mapping[str, Any]], lru: Curve | None = None) -> Figure:
    """Hit rate against capacity, a line a policy; Belady is the bound, dots what no store loses.

    rows: as `Outcome.row()` and `lmc sim --json` give them; layouts of tiers count as their sum.
    lru: its curve at all capacities, in the unit of the rows, drawn as a thin line.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    rows = [r for r in rows if r["policy"] != "none"]
    finite = [r for r in rows if math.isfinite(_capacity(r))]
    for place, policy in enumerate(dict.fromkeys(r["policy"] for r in finite)):
        points = sorted((_capacity(r), r["hit_rate"]) for r in finite if r["policy"] == policy)
        x, y = zip(*points, strict=True)
        if policy == BOUND:
            axes.plot(x, y, "k--", marker="_", linewidth=1.2, label="belady (bound)", zorder=4)
        else:
            colour, marker = LINES[place % len(LINES)]
            axes.plot(x, y, marker=marker, color=colour, markersize=5, label=policy, zorder=3)
    if lru is not None and len(lru.capacity):
        axes.step(
            lru.capacity, lru.hit_rate, where="post", color="0.6", linewidth=1, label="lru, all"
        )
    most = [r["hit_rate"] for r in rows if math.isinf(_capacity(r))]
    most += [lru.infinite] if lru is not None else []
    if most:
        axes.axhline(max(most), color="0.4", linestyle=":", linewidth=1.2, label="nothing evicted")
    axes.set_xscale("log")
    axes.set_ylim(0, None)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(f"capacity, {rows[0]['unit']}" if rows else "capacity")
    metric = rows[0].get("metric", "object") if rows else "object"
    axes.set_ylabel(f"hit rate ({metric})")
    axes.legend(frameon=False, ncols=2, fontsize="small")
    tidy(axes)
    return figure


def memory_curves(plan: Plan, title: str = "") -> Figure:
    """What is found against memory in GiB: by a prefix cache, and at any position.

    A point on each curve is where it finds the share that was asked for, and says how much is kept
    there.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    at = next(row for row in plan.targets if row["share"] == plan.target)
    curves = [("prefix", "prefix cache", plan.reach.prefix, BLUE, "o")]
    if plan.reach.anywhere is not None:
        curves.append(("anywhere", "at any position", plan.reach.anywhere, ORANGE, "s"))
    for name, label, curve, colour, marker in curves:
        if not len(curve.capacity):
            continue
        # The last step goes on to the right: what no memory adds to.
        x = np.append(curve.capacity, 2 * curve.capacity[-1]) / 2**30
        y = np.append(curve.hit_rate, curve.infinite)
        axes.step(x, y, where="post", color=colour, linewidth=1.5, label=label)
        size, rate = at[f"{name}_bytes"] / 2**30, at[f"{name}_rate"]
        axes.plot(size, rate, marker=marker, color=colour, markersize=7, zorder=4)
        amount = f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
        axes.annotate(
            f"{amount} GiB: {rate:.1%}", (size, rate), (7, -12),
            textcoords="offset points", color=colour, fontsize="small",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(0, None)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(f"memory for the KV of {plan.model}, GiB (LRU)")
    axes.set_ylabel("prompt tokens found")
    axes.set_title(
        f"{title}: {plan.requests:,} requests, points at {plan.target:.0%} of all that can be found"
        .lstrip(": "),
        loc="left", fontsize="medium",
    )  # fmt: skip
    axes.legend(frameon=False, loc="upper left")
    tidy(axes)
    return figure


def reuse_over_time(done: Sequence[RequestReuse], width: int = 200) -> Figure:
    """Where tokens came from, request after request in order of arrival.

    Traces of more than `width` requests are drawn as the means of runs of them.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(done, key=lambda r: r.timestamp)
    step = max(-(-len(ordered) // width), 1)
    groups = [range(i, min(i + step, len(ordered))) for i in range(0, len(ordered), step)]
    shares = np.zeros((len(REUSE_COLOURS), len(groups)))
    for place, group in enumerate(groups):
        tokens = np.sum([list(ordered[i].tokens().values()) for i in group], axis=0)
        shares[:, place] = tokens / max(tokens.sum(), 1)
    left = [group.start for group in groups]
    wide = [len(group) for group in groups]
    bottom = np.zeros(len(groups))
    for (kind, colour), share in zip(REUSE_COLOURS.items(), shares, strict=True):
        label = kind.replace("_", " ")
        axes.bar(left, share, wide, bottom, align="edge", color=colour, label=label)
        bottom += share
    axes.set_xlim(0, max(len(ordered), 1))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("requests, in order of arrival")
    axes.set_ylabel("tokens of the prompt")
    figure.legend(loc="outside upper center", ncols=len(REUSE_COLOURS), frameon=False)
    tidy(axes)
    return figure


def reuse_distances(lru: Curve, unit: str = "blocks") -> Figure:
    """How much else was used between two uses of the same block: the CDF of stack distances.

    It ends at the share of accesses that come again at all.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.step(lru.capacity, lru.hit_rate, where="post", color=BLUE)
    axes.axhline(lru.infinite, color="0.4", linestyle=":", linewidth=1.2)
    axes.annotate(
        f"{1 - lru.infinite:.1%} are first accesses",
        (0.99, lru.infinite),
        (0, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
    )
    axes.set_xscale("log")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(f"reuse distance, {unit} (what LRU must hold to hit)")
    axes.set_ylabel("accesses")
    tidy(axes)
    return figure


def ttft_cdf(seconds: Mapping[str, np.ndarray]) -> Figure:
    """The share of requests whose first token came within a time, a line for each name."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for place, (name, values) in enumerate(seconds.items()):
        colour, _ = LINES[place % len(LINES)]
        ordered = np.sort(values)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        median = float(np.median(ordered))
        axes.step(ordered, share, where="post", color=colour, label=f"{name} (p50 {median:.3g} s)")
    axes.set_xscale("log")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("time to first token, waiting included, s")
    axes.set_ylabel("requests")
    axes.legend(frameon=False, fontsize="small")
    tidy(axes)
    return figure


def token_map(
    done: RequestReuse, segments: Sequence[tuple[str, int, int]] = (), columns: int = 256
) -> Figure:
    """Every token of one prompt as a cell, row by row, coloured by how it could be reused.

    segments: `(name, start, end)` of its messages or documents, whose starts are marked.
    """
    from matplotlib.colors import ListedColormap

    T = len(done.kinds)
    high = max(-(-T // columns), 1)
    cells = np.full(high * columns, len(REUSE_COLOURS))
    cells[:T] = done.kinds
    figure = Figure(figsize=(8, 1.2 + 0.06 * high), layout="constrained")
    axes = figure.subplots()
    colours = ListedColormap([*REUSE_COLOURS.values(), "white"])
    axes.imshow(
        cells.reshape(high, columns),
        cmap=colours,
        vmin=0,
        vmax=len(REUSE_COLOURS),
        aspect="auto",
        interpolation="nearest",
    )
    for _, start, _ in segments:
        row, column = divmod(start, columns)
        axes.plot([column - 0.5] * 2, [row - 0.5, row + 0.5], color="black", linewidth=1)
    axes.set_xlabel(
        f"tokens, {columns} a row; bars: where messages start" if segments else "tokens"
    )
    axes.set_yticks([0, high - 1], ["0", f"{(high - 1) * columns:,}"])
    shares = {kind: n / max(T, 1) for kind, n in done.tokens().items()}
    handles = [
        Patch(color=colour, label=f"{kind.replace('_', ' ')} {shares[kind]:.0%}")
        for kind, colour in REUSE_COLOURS.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _capacity(row: Mapping[str, Any]) -> float:
    capacity = row["capacity"]
    return sum(map(float, capacity)) if isinstance(capacity, list) else float(capacity)
