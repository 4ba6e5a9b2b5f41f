"""An engine under mixed traffic that a Prometheus scrapes meanwhile."""

from __future__ import annotations

import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tests.connectors.vllm import scenarios as s
from tests.connectors.vllm.prometheus import queries, running

SAMPLES, LASTS_S = 25, 300.0  # until there are so many, at most so long


class Exposed(BaseHTTPRequestHandler):
    """As vLLM's server does; that of prometheus_client writes `:` in names as `_` if not asked."""

    def do_GET(self) -> None:
        body = generate_latest()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def scraped(session: s.Session) -> dict[str, Any]:
    """What Prometheus answers to each query of the dashboard, over all of that time."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Exposed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    with TemporaryDirectory() as folder, running(Path(folder), port) as prometheus:
        start = time.time()
        held = 'count_over_time(vllm:lmc_host_memory_bytes{state="used"}[10m])'
        rng = random.Random(0)
        while time.time() < start + LASTS_S:
            traffic(session, rng)
            got = prometheus.get("api/v1/query", query=held)["result"]
            if got and float(got[0]["value"][1]) >= SAMPLES:
                break
        end = time.time()
        answers = {e: prometheus.over_time(e, start, end, 1.0) for _, _, e in queries()}
        targets = prometheus.get("api/v1/targets")["activeTargets"]
    server.shutdown()
    server.server_close()
    health = [target["health"] for target in targets]
    return {"answers": answers, "targets": health, "start": start, "end": end}


def traffic(session: s.Session, rng: random.Random) -> None:
    """Documents in any order, by all strategies, beside long answers; more than memory holds."""
    blends: list[Any] = [s.EPIC, "all_by_deviation", "all_by_query", "full_reuse", "prefix"]
    documents = [s.text(i, 60 + i) for i in range(12)]
    for blend in rng.sample(blends, 3):
        parts = [s.SYSTEM, *rng.sample(documents, 3), s.text(rng.randrange(1 << 30), 12)]
        session.add(parts, blend, tokens=rng.randint(2, 40))
    if rng.random() < 0.5:
        session.add([s.text(rng.randrange(1 << 30), 30)], enabled=False, tokens=30)
    session.finish()
    if rng.random() < 0.3:
        session.llm.reset_prefix_cache()
