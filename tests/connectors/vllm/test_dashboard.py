"""Documents and dashboard say what the table of metrics says, and Prometheus answers them."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmc.connectors.vllm.metrics import METRICS
from tests.connectors.vllm.engine import run_scenario
from tests.connectors.vllm.prometheus import (
    CONFIG,
    DASHBOARD,
    ROOT,
    binary,
    queries,
)
from tests.connectors.vllm.test_persistent import disk

ENDS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
SHOWN = {metric.name + end for metric in METRICS for end in ENDS[metric.kind]}


def names_in(text: str) -> set[str]:
    return set(re.findall(r"vllm:\w+[a-z]\b", text))


def test_the_document_has_every_metric_and_no_other() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    table = dict(re.findall(r"^\| `(vllm:lmc_\w+)` \| (.*) \|$", text, re.M))
    said = {}
    for metric in METRICS:
        name = metric.name + ("_total" if metric.kind == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        said[name] = f"{metric.kind} | {labels} | {metric.help}"
    assert table == said
    ours = {name for name in names_in(text) if name.startswith("vllm:lmc_")}
    assert ours <= SHOWN | set(said), ours - SHOWN


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    asked = set().union(*(names_in(expression) for _, _, expression in queries()))
    ours = {name for name in asked if name.startswith("vllm:lmc_")}
    assert ours <= SHOWN, ours - SHOWN
    import vllm.v1.metrics.loggers as loggers

    theirs = Path(loggers.__file__).read_text()
    for name in asked - ours:
        assert f'"{name.removesuffix("_bucket")}"' in theirs, name
    stems = {metric.name for metric in METRICS}
    unseen = {stem for stem in stems if not any(name.startswith(stem) for name in ours)}
    assert not unseen, f"no panel shows {unseen}"


def test_the_dashboard_uses_labels_that_the_metrics_have() -> None:
    labels = {m.name + end: {*m.labels, "model_name"} for m in METRICS for end in ENDS[m.kind]}
    for title, legend, expression in queries():
        name = next(iter(sorted(names_in(expression), key=lambda n: n not in labels)))
        if name in labels:
            used = set(re.findall(r"{{(\w+)}}", legend))
            for group in re.findall(r"by \(([^)]*)\)", expression):
                used |= {label.strip() for label in group.split(",")} - {"le"}
            assert used <= labels[name], (title, used, labels[name])


def test_panels_are_told_apart_and_do_not_lie_on_each_other() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert (
        len({panel["id"] for panel in panels}) == len({p["title"] for p in panels}) == len(panels)
    )
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_the_config_of_prometheus_scrapes_where_vllm_answers() -> None:
    (job,) = yaml.safe_load(CONFIG.read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["localhost:8000"]}]  # vLLM's port


# What nothing happens to in an engine that is well, and what it does not have.
QUIET = {
    "Not loaded, not saved, not written": {"not written: {{tier}} {{outcome}}"},
}


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.skipif(
    binary() is None,
    reason="no Prometheus: put it on the path, or its path into LMC_PROMETHEUS",
)
def test_prometheus_answers_every_panel(tiny_llama_dir: Path, tmp_path: Path) -> None:
    prometheus = binary()
    assert prometheus
    promtool = Path(prometheus).with_name("promtool")
    if promtool.exists():
        subprocess.run([promtool, "check", "config", "--lint-fatal", CONFIG], check=True)
    got: dict[str, Any] = run_scenario(
        "tests.connectors.vllm.scraped:scraped", tiny_llama_dir, tmp_path,
        lmc=disk(tmp_path / "kv", capacity="2MiB") | {"memory_bytes": 1000 * 1536},
        disable_log_stats=False,
    )  # fmt: skip
    assert got["targets"] == ["up"]
    for title, legend, expression in queries():
        series = got["answers"][expression]
        if legend not in QUIET.get(title, ()):
            assert series, f"{title}, {legend}: no data for {expression}"
            assert all(value >= 0 for one in series for _, value in one["values"]), title
    something = [one for series in got["answers"].values() for one in series]
    moving = [one for one in something if any(value > 0 for _, value in one["values"])]
    assert len(moving) > 40 and time.time() > got["end"]
