"""Figures of a trace: hit rates, reuse, distances and times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, PercentFormatter

from lmc.plots.style import AMBER, BLUE, GREEN, ORANGE, PURPLE, SKY, log_across, tidy
from lmc.sizes import gib

if TYPE_CHECKING:
    from lmc.sim.planning import Plan
    from lmc.sim.reuse import RequestReuse
    from lmc.sim.stack import Curve

REUSE_COLOURS = {"prefix": BLUE, "moved": SKY, "repeated_within": PURPLE, "new": ORANGE}
BOUND = "belady"
MOST_LINES, MOST_TICKS = 8, 8
LINES = [
    (colour, marker)
    for marker in ("o", "s", "^")
    for colour in (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY)
]


def hit_rates(
    rows: Sequence[Mapping[str, Any]], lru: Curve | None = None, title: str = ""
) -> Figure:
    """Hit rate against capacity, by policy; Belady is the bound, dots what no store loses.

    What was replayed is points, an exact curve a staircase. More than `MOST_LINES` policies are
    drawn beside each other.

    rows: as `Outcome.row()` and `lmc sim --json` give them; layouts of tiers count as their sum.
    lru: its curve at all capacities, in the unit of the rows, drawn as a thin line.
    title: the trace, and the model where capacities are bytes.
    """
    rows = [r for r in rows if r["policy"] != "none"]
    finite = [r for r in rows if math.isfinite(_capacity(r))]
    policies = [p for p in dict.fromkeys(r["policy"] for r in finite) if p != BOUND]
    groups = [policies[i : i + MOST_LINES] for i in range(0, len(policies), MOST_LINES)] or [[]]
    figure = Figure(figsize=(8 * len(groups), 4.8), layout="constrained")
    drawn = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, group in zip(drawn, groups, strict=True):
        _hit_rates(axes, finite, group, lru)
        most = [r["hit_rate"] for r in rows if math.isinf(_capacity(r))]
        most += [lru.infinite] if lru is not None else []
        if most:
            axes.axhline(max(most), color="0.4", linestyle=":", linewidth=1.2)
            axes.annotate(
                f"nothing evicted: {max(most):.1%}", (0.01, max(most)), (0, 3),
                xycoords=("axes fraction", "data"), textcoords="offset points", fontsize="small",
            )  # fmt: skip
        axes.set_xlabel(f"capacity, {rows[0]['unit']}" if rows else "capacity")
        axes.legend(frameon=False, ncols=2, fontsize="small")
        tidy(axes)
    metric = rows[0].get("metric", "object") if rows else "object"
    drawn[0].set_ylabel(f"hit rate ({metric})")
    drawn[0].set_title(title, loc="left", fontsize="medium")
    return figure


def _hit_rates(
    axes: Axes, rows: Sequence[Mapping[str, Any]], policies: Sequence[str], lru: Curve | None
) -> None:
    """Points of each policy and of the bound, joined by faint lines, and the curve of LRU."""
    if lru is not None and len(lru.capacity):
        x = np.append(lru.capacity, 2 * lru.capacity[-1])  # what no more room adds to
        y = np.append(lru.hit_rate, lru.infinite)
        axes.step(x, y, where="post", color="0.6", linewidth=1, label="lru, exact")
    if lru is None or {r["policy"] for r in rows} != {"lru"}:
        for place, policy in enumerate([*policies, BOUND]):
            points = sorted((_capacity(r), r["hit_rate"]) for r in rows if r["policy"] == policy)
            if points:
                colour, marker = ("black", "_") if policy == BOUND else LINES[place]
                name = "belady (bound)" if policy == BOUND else policy
                axes.plot(
                    *zip(*points, strict=True), marker=marker, color=colour, markersize=6,
                    linestyle=":", linewidth=0.8, label=name, zorder=3,
                )  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(0, None)
    asked = sorted({_capacity(r) for r in rows})
    if lru is None and len(asked) <= MOST_TICKS:
        axes.set_xticks(asked)
        axes.minorticks_off()
    in_bytes = bool(rows) and rows[0]["unit"] == "bytes"
    axes.xaxis.set_major_formatter(_sized if in_bytes else EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _sized(n: float, _: float) -> str:
    """1073741824 -> 1 GiB."""
    for unit, scale in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n >= 1 << scale:
            return f"{n / (1 << scale):.3g} {unit}"
    return f"{n:.3g} B"


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
        axes.annotate(
            f"{gib(at[f'{name}_bytes'])}: {rate:.1%}", (size, rate), (7, -12),
            textcoords="offset points", color=colour, fontsize="small",
        )  # fmt: skip
    log_across(axes, "{x:,g}")
    axes.set_ylim(0, None)
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


def where_it_pays(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What of each workload is found behind the same text, and what only where it is moved.

    A stroke is what vLLM's prefix cache finds. Beside each bar: points that moving adds, and the
    memory of the prefix cache and of a store for the share of what they can find that the rows are
    of. Rows are those of `benchmarks/where_it_pays.py`.
    """
    figure = Figure(figsize=(9, 1.4 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(rows))
    prefix = np.array([row["prefix"] for row in rows])
    exact = np.array([row["prefix"] if row["exact"] is None else row["exact"] for row in rows])
    found = np.array([row["prefix"] if row["exact"] is None else row["anywhere"] for row in rows])
    axes.barh(place, exact, 0.6, color=BLUE, label="behind the same text")
    axes.barh(place, found - exact, 0.6, exact, color=SKY, label="moved")
    axes.plot(prefix, place, "k|", markersize=18, label="vLLM's prefix cache")
    for i, row in enumerate(rows):
        sizes = [f"prefix {gib(row['prefix_bytes'])}"] if row["prefix"] else []
        if row["exact"] is not None:
            sizes = [f"+{100 * (found[i] - exact[i]):.1f} points", *sizes]
            sizes.append(f"anywhere {gib(row['anywhere_bytes'])}")
        axes.annotate(
            "; ".join(sizes), (max(found[i], prefix[i]), i), (6, 0), va="center",
            textcoords="offset points", fontsize="small",
        )  # fmt: skip
    axes.set_yticks(place, [row["workload"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.75)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    target, model = rows[0]["target"], rows[0]["model"]
    axes.set_xlabel(
        f"prompt tokens found, of any size; GiB: LRU, for {target:.0%} of that, KV of {model}"
    )
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    tidy(axes)
    return figure


def reuse_over_time(done: Sequence[RequestReuse], title: str = "", width: int = 200) -> Figure:
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
    axes.set_title(title, loc="left", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=len(REUSE_COLOURS), frameon=False)
    tidy(axes)
    return figure


def reuse_distances(lru: Curve, unit: str = "blocks", title: str = "") -> Figure:
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
    log_across(axes, EngFormatter(sep=""))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(f"reuse distance, {unit} (what LRU must hold to hit)")
    axes.set_ylabel("accesses")
    axes.set_title(title, loc="left", fontsize="medium")
    tidy(axes)
    return figure


def ttft_cdf(seconds: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """The share of requests whose first token came within a time, a line for each name."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for place, (name, values) in enumerate(seconds.items()):
        colour, _ = LINES[place % len(LINES)]
        ordered = np.sort(values)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        median = float(np.median(ordered))
        axes.step(ordered, share, where="post", color=colour, label=f"{name} (p50 {median:.3g} s)")
    log_across(axes, "{x:g}")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("time to first token, waiting included, s")
    axes.set_ylabel("requests")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")
    tidy(axes)
    return figure


def token_map(
    done: RequestReuse,
    segments: Sequence[tuple[str, int, int]] = (),
    columns: int = 256,
    title: str = "",
) -> Figure:
    """Every token of one prompt as a cell, row by row, coloured by how it could be reused.

    segments: `(name, start, end)` of its messages or documents, whose starts are marked.
    """
    from matplotlib.colors import ListedColormap

    T = len(done.kinds)
    high = max(-(-T // columns), 1)
    cells = np.full(high * columns, len(REUSE_COLOURS))
    cells[:T] = done.kinds
    figure = Figure(figsize=(8, 1.5 + 0.06 * high), layout="constrained")
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
    axes.set_title(title, loc="left", fontsize="medium")
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
