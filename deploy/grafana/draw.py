"""The dashboard's panels as one picture, out of what a Prometheus answers: no Grafana is needed.

python deploy/grafana/draw.py http://localhost:9090 --minutes 30 --out dashboard.png
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DASHBOARD = Path(__file__).with_name("lmc.json")
COLUMNS = 3
UNITS = {"s": "s", "bytes": "bytes", "Bps": "bytes/s", "percentunit": "share", "short": ""}


def answers(url: str, expression: str, start: float, end: float) -> list[Any]:
    """Time series of one query, in a hundred steps."""
    asked = {"query": expression, "start": start, "end": end, "step": max(1.0, (end - start) / 100)}
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{urllib.parse.urlencode(asked)}") as got:
        series: list[Any] = json.loads(got.read())["data"]["result"]
        return series


def draw(url: str, minutes: float, out: Path) -> None:
    panels = [p for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] == "timeseries"]
    end = time.time()
    start = end - 60 * minutes
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(16, 2.6 * rows), layout="constrained")
    for panel, ax in zip(panels, axes.flat, strict=False):
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "30s")
            for series in answers(url, expression.replace("$model_name", ".*"), start, end):
                label = re.sub(
                    r"{{(\w+)}}",
                    lambda m, s=series: s["metric"].get(m[1], ""),
                    target["legendFormat"],
                )
                points = [((t - start) / 60, float(value)) for t, value in series["values"]]
                if any(value for _, value in points):
                    ax.plot(*zip(*points, strict=True), lw=1, label=label)
        ax.set_title(panel["title"], fontsize=9)
        ax.set_ylabel(UNITS[panel["fieldConfig"]["defaults"]["unit"]], fontsize=7)
        ax.tick_params(labelsize=7)
        ax.set_xlim(0, minutes)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=6, ncols=2, loc="upper left", framealpha=0.6)
        else:
            ax.text(0.5, 0.5, "nothing, or 0", transform=ax.transAxes, ha="center", fontsize=8)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.supxlabel("minutes", fontsize=8)
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the Prometheus")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw(arguments.url.rstrip("/"), arguments.minutes, arguments.out)
