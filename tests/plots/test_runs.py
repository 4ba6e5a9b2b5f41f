"""Figures are drawn from rows, from a folder, and from incomplete runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmc import plots
from lmc.chunking import CHUNKERS
from lmc.sim.kinds import KINDS, NEW
from lmc.sim.reuse import analyse
from lmc.sim.stack import NEVER, hit_curve
from lmc.sim.trace import Request

ARMS = {
    "full_prefill": {"cache": "none"},
    "prefix_caching": {"cache": "shared"},
    "full_reuse": {"blend": {"name": "full_reuse"}},
    "epic16": {"blend": {"name": "epic"}},
}


def _rows(arms: list[str], kl: bool = True) -> list[dict[str, Any]]:
    rows = []
    for place, arm in enumerate(arms):
        for prompt_id in range(3):
            row = {"arm": arm, "prompt_id": prompt_id, "repetition": 0, "config": {"arms": ARMS}}
            row |= {"ttft_s": 4.0 / (1 + place + 0.1 * prompt_id), "cpu_s": 1.0}
            row |= {"prompt_tokens": 100, "compute_fraction": 0.3, "flops_fraction": 0.3}
            row["kinds"] = {"local": 0, "local_blended": 0, "exact": 10, "moved": 50}
            row["kinds"] |= {"recomputed": 10, "new": 30}
            row |= {
                "logprob_error": 0.1,
                "kl_last": 0.1,
                "kl_mean": 0.1 * place if kl else None,
                "reason": None,
            }
            row |= {"top1_agreement": 1.0, "delta_nll": 0.0, "greedy_agreement": 1.0}
            rows.append(row)
    return rows


@pytest.mark.parametrize("figure", [plots.ttft_quality, plots.ttft, plots.kinds])
@pytest.mark.parametrize(
    "rows", [_rows(list(ARMS)), _rows(["full_prefill"]), _rows(["epic16"], kl=False)]
)
def test_draws(figure: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure(rows).savefig(tmp_path / "rows.png")
    figure(tmp_path).savefig(tmp_path / "folder.png")
    assert (tmp_path / "rows.png").read_bytes() == (tmp_path / "folder.png").read_bytes()


def test_every_arm_is_named_and_no_two_names_overlap() -> None:
    rows = _rows(list(ARMS))
    figure = plots.ttft_quality(rows)
    (axes,) = figure.axes
    labels = [text for text in axes.texts if text.get_text() in ARMS]
    assert {text.get_text() for text in labels} == set(ARMS)
    boxes = [text.get_window_extent() for text in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


HIT_ROWS = [
    {"policy": p, "capacity": c, "unit": "blocks", "metric": "object", "hit_rate": r}
    for p, c, r in [
        ("lru", 10, 0.1),
        ("lru", 100, 0.3),
        ("belady", 10, 0.2),
        ("belady", "inf", 0.4),
        ("fifo", [10, 90], 0.25),
        ("none", 0, 0.0),
    ]
]


def test_hit_rates_are_points_and_curves_the_bound_and_what_nothing_evicted_gives() -> None:
    figure = plots.hit_rates(HIT_ROWS, hit_curve(np.array([5, 50, 500, NEVER])))
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    named = [name for name in lines if not str(name).startswith("_")]
    assert named == ["lru, exact", "lru", "fifo", "belady (bound)"]
    assert lines["fifo"].get_xdata().tolist() == [100.0]
    assert {lines[name].get_marker() for name in ("lru", "fifo")} == {"o"}
    assert lines["lru, exact"].get_ydata().tolist() == [0.25, 0.5, 0.75, 0.75]
    assert [text.get_text() for text in axes.texts] == ["nothing evicted: 75.0%"]


def test_many_policies_are_drawn_beside_each_other() -> None:
    rows = [HIT_ROWS[0] | {"policy": f"p{i}"} for i in range(20)]
    figure = plots.hit_rates([*rows, HIT_ROWS[2]], title="a trace")
    drawn = [[str(line.get_label()) for line in axes.get_lines()] for axes in figure.axes]
    assert [len(labels) for labels in drawn] == [9, 9, 5]
    assert all("belady (bound)" in labels for labels in drawn)
    assert figure.axes[0].get_title(loc="left") == "a trace"


def test_ticks_are_the_capacities_that_were_asked_for() -> None:
    one = HIT_ROWS[0] | {"unit": "bytes"}
    rows = [one | {"capacity": c << 30, "hit_rate": c / 100} for c in (1, 3, 64)]
    (axes,) = plots.hit_rates(rows).axes
    axes.figure.draw_without_rendering()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["1 GiB", "3 GiB", "64 GiB"]


def test_the_figures_of_a_trace_draw(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    document = rng.integers(0, 99, 300).astype(np.int32)
    prompts = [np.concatenate([rng.integers(0, 99, 9), document]).astype(np.int32)] * 2
    requests = [
        Request(float(i), "s", len(p), 1, tokens=p, segments=[("system", 0, 9), ("doc", 9, 309)])
        for i, p in enumerate(prompts)
    ]
    done = list(analyse(requests, CHUNKERS.build("cdc:64")))
    plots.reuse_over_time(done).savefig(tmp_path / "time.png")
    plots.reuse_over_time([]).savefig(tmp_path / "nothing.png")
    plots.reuse_over_time(done * 300).savefig(tmp_path / "many.png")
    figures = [
        plots.token_map(done[1], requests[1].segments, title="a trace"),
        plots.reuse_distances(hit_curve(np.array([1, 2, NEVER])), title="a trace"),
        plots.ttft_cdf({"a": np.array([1.0, 2.0]), "b": np.array([3.0])}, "a trace"),
    ]
    for figure in figures:
        assert figure.axes[0].get_title(loc="left") == "a trace"
        figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize(("values", "most"), [([1.2, 3.9], 10), ([1e-3, 1e4], 10), ([7.0], 10)])
def test_times_are_labelled_in_plain_numbers(values: list[float], most: int) -> None:
    """Within a decade, over many, and for one time alone."""
    figure = plots.ttft_cdf({"a": np.array(values)})
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    ticks = zip(figure.axes[0].get_xticks(), figure.axes[0].get_xticklabels(), strict=True)
    labels = [label.get_text() for x, label in ticks if low <= x <= high]
    assert 1 <= len(labels) <= most
    assert all(float(label) > 0 for label in labels)


def test_the_bars_of_a_request_add_up() -> None:
    tokens = np.arange(200, dtype=np.int32)
    done = list(analyse([Request(0.0, "s", 200, 1, tokens=tokens)] * 2, CHUNKERS.build("fixed:64")))
    (axes,) = plots.reuse_over_time(done).axes
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches]
    assert sorted(tops)[-2:] == pytest.approx([1, 1])


def test_the_map_has_a_cell_a_token() -> None:
    tokens = np.arange(300, dtype=np.int32)
    (done,) = analyse([Request(0.0, "s", 300, 1, tokens=tokens)], CHUNKERS.build("fixed:64"))
    (axes,) = plots.token_map(done, columns=64).axes
    cells = axes.get_images()[0].get_array()
    assert cells.shape == (5, 64)
    assert (np.asarray(cells).ravel()[:300] == NEW).all()
    assert (np.asarray(cells).ravel()[300:] == len(KINDS)).all()


def test_where_it_pays_has_a_bar_a_workload_and_its_memory() -> None:
    rows = [
        {"workload": "skills", "prefix": 0.0, "exact": 0.05, "anywhere": 0.85, "prefix_bytes": 0,
         "anywhere_bytes": 3 << 30, "target": 0.8, "model": "m"},
        {"workload": "blocks", "prefix": 0.4, "exact": None, "anywhere": None,
         "prefix_bytes": 9 << 30, "target": 0.8, "model": "m"},
    ]  # fmt: skip
    (axes,) = plots.where_it_pays(rows).axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([0.05, 0.4, 0.8, 0.0])
    labels = " ".join(text.get_text() for text in axes.texts)
    assert "+80.0 points" in labels and "3 GiB" in labels and "9 GiB" in labels
