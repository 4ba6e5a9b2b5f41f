"""Figures of strategies hold what the rows say: read back from their axes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from lmc import plots
from lmc.plots.style import BLUE, ORANGE

Row = dict[str, Any]

# arm -> compute fraction, KL as a share of that of full_reuse; as close together as in a real run
ARMS: dict[str, tuple[float, float]] = {
    "full_prefill": (1.0, 0.0),
    "full_prefill_split": (1.0, 1e-9),
    "full_reuse": (0.03, 1.0),
    "mepic@16": (0.09, 0.8),
    "epic@16": (0.09, 0.75),
    "epic@32": (0.14, 0.7),
    "cacheblend_k@0.15": (0.2, 0.58),
    "cacheblend_v@0.15": (0.2, 0.62),
    "cacheblend_k@0.35": (0.4, 0.38),
    "query@0.05": (0.08, 0.65),
    "query@0.15": (0.18, 0.5),
    "random@0.15": (0.18, 0.9),
    "uniform@0.15": (0.18, 0.9),
    "tail@16": (0.09, 1.02),
    "lmc@0.10": (0.1, 0.55),
    "lmc@0.20": (0.2, 0.33),
    "oracle_deviation@0.15": (1.15, 0.4),
    "cachecraft@0.15": (0.17, 0.67),
    "ape": (0.03, 1.15),
    "union_epic_query@0.10": (0.12, 0.6),
}
FRONT = {"full_reuse", "query@0.05", "lmc@0.10", "query@0.15", "lmc@0.20", "full_prefill"}


def _rows(arms: list[str], prompts: int = 8) -> list[Row]:
    """Prompt p has a KL of 0.1 (p + 1) with full_reuse, and noise of mean 1 with other arms."""
    rng = np.random.default_rng(0)
    rows = []
    for arm in arms:
        compute, share = ARMS[arm]
        noise = rng.uniform(0.5, 1.5, prompts) if 0 < share != 1 else np.ones(prompts)
        reuse = 0.1 * np.arange(1, prompts + 1)
        noise *= reuse.sum() / (reuse * noise).sum()
        for p in range(prompts):
            kl = float(share * reuse[p] * noise[p])
            row = {"arm": arm, "prompt_id": p, "repetition": 0, "config": {"arms": dict(ARMS)}}
            row |= {"compute_fraction": compute * (0.9 if p % 2 else 1.1), "kl_mean": kl}
            rows.append(row | {"kl_by_position": [kl, 2 * kl] if p else [kl, 2 * kl, 3 * kl]})
    return rows


def _drawn(figure: Figure) -> dict[str, Any]:
    """arm -> its marker line and the ends of its interval."""
    (axes,) = figure.axes
    drawn = {}
    for container in axes.containers:
        marker, _, (bar,) = container.lines
        ((low, high),) = [segment[:, 1] for segment in bar.get_segments()]
        drawn[container.get_label()] = (marker, low, high)
    return drawn


def test_points_are_mean_compute_and_recovery() -> None:
    drawn = _drawn(plots.pareto(_rows(list(ARMS))))
    assert list(drawn) == list(ARMS)
    for arm, (compute, share) in ARMS.items():
        marker, low, high = drawn[arm]
        assert marker.get_xdata()[0] == pytest.approx(compute), arm
        assert marker.get_ydata()[0] == pytest.approx(1 - share), arm
        assert low <= 1 - share + 1e-9 and 1 - share - 1e-9 <= high, arm
        assert to_hex(marker.get_color()).upper() == (ORANGE if arm[:3] == "lmc" else BLUE), arm
    assert drawn["full_reuse"][1:] == (0, 0)
    assert drawn["full_prefill"][1:] == (1, 1)
    assert drawn["random@0.15"][1] < 0.1 < drawn["random@0.15"][2]


def test_the_front_is_drawn_and_its_arms_are_filled() -> None:
    figure = plots.pareto(_rows(list(ARMS)))
    filled = {
        arm
        for arm, (marker, _, _) in _drawn(figure).items()
        if marker.get_markerfacecolor() == marker.get_color()
    }
    assert filled == FRONT
    (step,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "Pareto front"]
    assert step.get_drawstyle() == "steps-post"
    corners = sorted((ARMS[arm][0], 1 - ARMS[arm][1]) for arm in FRONT)
    assert step.get_xydata() == pytest.approx(np.array(corners))


def test_labels_overlap_neither_each_other_nor_a_point() -> None:
    figure = plots.pareto(_rows(list(ARMS)))
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    (axes,) = figure.axes
    boxes = {}
    for text in axes.texts:
        text.update_positions(renderer)
        boxes[text.get_text()] = Text.get_window_extent(text, renderer)
    assert set(boxes) == set(ARMS)
    names = list(boxes)
    for i, name in enumerate(names):
        box = boxes[name]
        assert axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1), name
        assert not [other for other in names[:i] if box.overlaps(boxes[other])], name
        for arm, (marker, _, _) in _drawn(figure).items():
            point = axes.transData.transform((marker.get_xdata()[0], marker.get_ydata()[0]))
            assert not box.contains(*point), (name, arm)


def test_rows_of_a_folder_and_repetitions_without_quality(tmp_path: Path) -> None:
    rows = _rows(["full_reuse", "lmc@0.10"])
    again = [row | {"repetition": 1, "kl_mean": None, "kl_by_position": None} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows + again))
    figure = plots.pareto(tmp_path, title="pydoc")
    assert list(_drawn(figure)) == ["full_reuse", "lmc@0.10"]
    assert figure.axes[0].get_title(loc="left") == "pydoc: 8 prompts; lines: 95% intervals"


def test_full_prefill_is_1_without_having_been_measured() -> None:
    rows = _rows(["full_prefill", "full_reuse", "epic@16"])
    for row in rows:
        if row["arm"] == "full_prefill":
            row["kl_mean"] = None
        if row["arm"] == "epic@16" and row["prompt_id"] > 5:
            row["kl_mean"] = None
    marker, low, high = _drawn(plots.pareto(rows))["full_prefill"]
    assert (marker.get_ydata()[0], low, high) == (1, 1, 1)


def test_recovery_needs_full_reuse() -> None:
    with pytest.raises(ValueError, match=r"of the arm full_reuse.* arms with one: epic@16"):
        plots.pareto(_rows(["epic@16"]))


def test_map_holds_the_deviation_the_borders_and_the_rows() -> None:
    deviation = np.random.default_rng(0).uniform(0, 2, (3, 50))
    chosen = [np.array([0, 1, 2, 20]), np.array([20]), np.array([], int)]
    figure = plots.deviation_map(deviation, [0, 20, 35], chosen)
    axes, scale = figure.axes
    (image,) = axes.get_images()
    assert np.array_equal(image.get_array(), deviation)
    assert image.origin == "lower"
    assert scale.get_ylim() == (0, deviation.max())
    borders, *layers = [c.get_segments() for c in axes.collections]
    assert [segment[:, 0].tolist() for segment in borders] == [[-0.5] * 2, [19.5] * 2, [34.5] * 2]
    for layer, (segments, rows) in enumerate(zip(layers, chosen, strict=True)):
        assert [s[:, 0].tolist() for s in segments] == [[r - 0.5, r + 0.5] for r in rows]
        assert all((s[:, 1] == layer).all() for s in segments)
    assert len(plots.deviation_map(deviation, []).axes[0].collections) == 1


@pytest.mark.parametrize(
    ("starts", "rows", "words"),
    [
        ([0, 50], None, "got 0 to 50, allowed: 0 to 49"),
        ([-1], None, "got -1 to -1, allowed: 0 to 49"),
        ([0], [np.array([3]), np.array([77])], "got 0 to 77"),
        ([0], [np.array([3])], "got 1 layers, want 2"),
    ],
)
def test_positions_outside_the_map_are_refused(
    starts: list[int], rows: list[np.ndarray] | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        plots.deviation_map(np.zeros((2, 50)), starts, rows)


def test_kl_by_position_is_a_mean_over_the_prompts_that_reach_it() -> None:
    arms = ["full_prefill_split", "full_reuse", "epic@16"]
    (axes,) = plots.quality_by_position(_rows(arms)).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == arms
    # KL 0.1 to 0.8, twice that at the second position; only the first prompt has a third.
    assert lines["full_reuse"].get_ydata() == pytest.approx([0.45, 0.9, 0.3])
    assert set(lines["full_prefill_split"].get_ydata()) == {1e-4}  # rounding, drawn at the floor
