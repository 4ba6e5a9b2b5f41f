"""A Prometheus that scrapes one server, and what it answers to the queries of a dashboard."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lmc.experiment.vllm.servers import free_port

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "lmc.json"


def binary() -> str | None:
    """Prometheus, by LMC_PROMETHEUS or on the path."""
    return os.environ.get("LMC_PROMETHEUS") or shutil.which("prometheus")


def queries() -> list[tuple[str, str, str]]:
    """(panel, legend, expression) of the dashboard, over half a minute and of every model."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = (
                target["expr"].replace("$__rate_interval", "30s").replace("$model_name", ".*")
            )
            assert "$" not in re.sub(r'"[^"]*"', "", expression), expression
            found.append((panel["title"], target["legendFormat"], expression))
    return found


class Prometheus:
    """One that runs, at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: Any) -> Any:
        """What its HTTP interface answers; raises what it refuses."""
        with urllib.request.urlopen(f"{self.url}/{path}?{urllib.parse.urlencode(query)}") as got:
            answer = json.loads(got.read())
        assert answer["status"] == "success", answer
        return answer["data"]

    def over_time(self, expression: str, start: float, end: float, step: float) -> list[Any]:
        """Time series, each with its labels and its values that are numbers."""
        asked = {"query": expression, "start": start, "end": end, "step": step}
        series = self.get("api/v1/query_range", **asked)["result"]
        for one in series:
            one["values"] = [(t, float(v)) for t, v in one["values"] if v not in ("NaN", "+Inf")]
        return [one for one in series if one["values"]]


@contextmanager
def running(folder: Path, port: int) -> Iterator[Prometheus]:
    """A Prometheus with lmc's config, which scrapes what answers at `port` each second."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"]["scrape_interval"] = "1s"
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    listen = f"127.0.0.1:{free_port()}"
    command = [
        binary() or "", f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={listen}", "--log.level=error",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://{listen}/-/ready").close()
                break
            except OSError:
                assert child.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield Prometheus(f"http://{listen}")
    finally:
        child.terminate()
        child.wait(30)
