"""A document that only another engine has seen: time to first token out of what they share.

    python benchmarks/shared.py --tiers redis s3 nixl disk

Two engines, each a process of its own, and between them a real server on the loopback (for `disk`
a folder, for `nixl` the first one's memory). The first one is asked each document of a prompt
alone; the second one the prompt, its documents in another order, with 16 rows at each boundary
recomputed (`epic`): out of the tier, then once more out of its own host memory, and without lmc.
vLLM's own cache is empty each time. Prompts are new to both in every round, and the arms turn; the
tier comes before memory, which has nothing until then. Prints medians and the ratios with bootstrap
intervals, and appends a row an answer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lmc.experiment.vllm.config import EngineConfig
from lmc.experiment.vllm.engines import Engine, Request
from lmc.model import exports
from lmc.results.rows import cpu_name, git_commit
from lmc.results.statistics import bootstrap
from tests.store.remote.servers import seaweedfs, valkey

OUT = Path(__file__).parent / "results" / "shared.jsonl"
SETTLES_S = 3.0
SYSTEM, DOCUMENTS, DOCUMENT, QUESTION = 48, 6, 256, 24  # tokens of each, and how many

PLAIN = {"enabled": False}
BLENDED = {"blend": {"name": "epic", "link_tokens": 16}, "save": False}


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    tiers = ("redis", "s3", "nixl", "disk")
    parser.add_argument("--tiers", nargs="+", default=tiers, choices=tiers)
    parser.add_argument("--rounds", type=int, default=10, help="of each tier")
    options = parser.parse_args()
    where = {"benchmark": "shared", "time": time.time(), "cpu": cpu_name(), "commit": git_commit()}
    for tier in options.tiers:
        rows = measured(tier, options.model, options.rounds)
        show(tier, rows)
        OUT.parent.mkdir(exist_ok=True)
        with OUT.open("a") as out:
            out.writelines(json.dumps(where | row) + "\n" for row in rows)


def settings(tier: str, folder: Path) -> dict[str, Any]:
    """A tier as a config names it, on a server that runs."""
    if tier == "redis":
        return {"name": tier, "url": valkey().url, "prefix": folder.name}
    if tier == "s3":
        server = seaweedfs()
        return {"name": tier, "url": f"s3://lmc/{folder.name}", "endpoint": server.endpoint}
    if tier == "nixl":
        return {"name": tier, "capacity": "1GiB", "directory": valkey().url, "prefix": folder.name}
    return {"name": tier, "path": str(folder / "disk"), "capacity": "4GiB"}


def measured(tier: str, name: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of one tier; the first round warms up and is left out."""
    model = exports.resolve(name)
    config = EngineConfig(dtype="float32", threads=1, kv_cache_memory_bytes=1 << 29)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lmc-shared-") as made, ExitStack() as stack:
        folder = Path(made)
        lmc = {"memory_bytes": 2 << 30, "min_recovery": None, "fetch_patience_s": 10.0,
               "tiers": [settings(tier, folder)]}  # fmt: skip
        first, second = (
            stack.enter_context(Engine(model, config, lmc, folder / f"{which}.log"))
            for which in ("first", "second")
        )
        first.wait()
        second.wait()
        for i in range(-1, rounds):
            rng = np.random.default_rng([i + 1, *tier.encode()])
            system, *documents, question = (
                rng.integers(1000, 40_000, n).tolist()
                for n in (SYSTEM, *[DOCUMENT] * DOCUMENTS, QUESTION)
            )
            for document in documents:
                first.ask(request([system, document]))
            first.drain()
            time.sleep(SETTLES_S)  # an object store takes a while to have what was put
            parts = [system, *documents[::-1], question]
            order = ["tier", "memory"]
            order.insert(i % 3, "recompute")
            for arm in order:
                said: dict[str, Any] = {"blend": {"name": "epic", "link_tokens": 16}, "save": False}
                answer = second.ask(
                    request(parts, {"enabled": False} if arm == "recompute" else said)
                )
                report = answer.report or {}
                row = {
                    "tier": tier, "round": i, "arm": arm, "ttft_s": answer.wall_s,
                    "cpu_s": answer.cpu_s, "kinds": report.get("kinds"),
                    "bytes": report.get("bytes"), "device": second.device,
                }  # fmt: skip
                if arm == "tier":
                    assert report["kinds"]["moved"] and report["bytes"][tier], report
                rows += [row] if i >= 0 else []
    return rows


def request(parts: list[list[int]], said: dict[str, Any] | None = None) -> Request:
    """One with its spans told, nothing of it in vLLM's own cache."""
    ends = np.cumsum([len(part) for part in parts]).tolist()
    spans = [list(span) for span in zip([0, *ends[:-1]], ends, strict=True)]
    tokens = [token for part in parts for token in part]
    return Request(tokens, "", lmc={"chunks": spans} | (said or {}), reset=True)


def show(tier: str, rows: list[dict[str, Any]]) -> None:
    """Medians of one tier, and how many times sooner, paired by round."""
    of = {(row["arm"], row["round"]): row["ttft_s"] for row in rows}
    every = sorted({row["round"] for row in rows})
    T = SYSTEM + DOCUMENTS * DOCUMENT + QUESTION
    moved = next(row["kinds"]["moved"] for row in rows if row["arm"] == "tier")
    medians = {arm: float(np.median([of[arm, i] for i in every])) for arm, _ in of}
    print(f"{tier}: {T} tokens, {moved} moved; "
          + ", ".join(f"{arm} {s:.3f} s" for arm, s in medians.items()))  # fmt: skip
    for slow, fast in (("recompute", "tier"), ("recompute", "memory"), ("tier", "memory")):
        ratios = [[of[slow, i] / of[fast, i]] for i in every]
        e = bootstrap(ratios, lambda sample: float(np.median(np.concatenate(sample))))
        assert e is not None
        print(f"  {fast} is {e.value:.2f} [{e.low:.2f}, {e.high:.2f}] times sooner than {slow}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
