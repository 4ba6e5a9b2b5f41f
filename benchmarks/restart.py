"""vLLM restarted: the first token of a prompt whose documents lie on disk, beside host memory.

    python benchmarks/restart.py

An engine stores documents and ends; a second one on the same folder, whose pages are dropped from
the page cache, is asked one prompt after another: first with nothing in host memory (`disk`), then
again (`memory`), and again (`memory_again`, which shows the noise), each with an empty prefix cache
of vLLM's own. Every prompt has a cache salt, so that no other has its documents. Prints a table of
paired ratios with bootstrap intervals, and appends a row a request to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import AutoTokenizer

from lmc.chunking.prompt import Prompt
from lmc.experiment.vllm.config import EngineConfig
from lmc.experiment.vllm.engines import Answer, Engine, Request
from lmc.model import exports
from lmc.results.rows import git_commit
from lmc.results.statistics import bootstrap
from lmc.workloads.rag_reorder import RagReorder

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "results" / "restart.jsonl"
BLENDS: dict[str, Any] = {
    "prefix": {"name": "prefix"},
    "full_reuse": {"name": "full_reuse"},
    "epic16": {"name": "epic", "link_tokens": 16},
    "lmc": {"name": "lmc", "compute": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=4, help="of each blend")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compression", default="none")
    parser.add_argument("--cached", action="store_true", help="leave the page cache as it is")
    options = parser.parse_args()
    model = exports.resolve(options.model)
    demo = yaml.safe_load((ROOT / "experiments" / "demo.yaml").read_text())
    engine = EngineConfig(**{**demo["engine"], "threads": options.threads})
    fields = {k: v for k, v in demo["workload"].items() if k != "name"}
    workload = RagReorder(**{**fields, "prompts": options.prompts + 1})
    samples = workload.samples(AutoTokenizer.from_pretrained(model))
    # The last one warms the engines up.
    *prompts, extra = (sample.prompt for sample in samples)
    asked = [(f"{blend}-{i}", blend, p) for i, p in enumerate(prompts) for blend in BLENDS]
    with tempfile.TemporaryDirectory(prefix="lmc-restart-", dir=ROOT / "benchmarks") as work:
        folder = Path(work)
        lmc = {
            "memory_bytes": 2 << 30,
            "min_recovery": None,
            "context": "any",  # documents are moved as they were sent
            "tiers": [
                {
                    "name": "disk",
                    "path": str(folder / "kv"),
                    "capacity": "16GiB",
                    "compression": options.compression,
                }
            ],
            "write_queue_bytes": 1 << 30,
            "fetch_patience_s": 30.0,
        }
        with Engine(model, engine, lmc, folder / "first.log") as first:
            first.wait()
            for salt, blend, p in [*asked, ("warm", "epic16", extra)]:
                store(first, salt, blend, p)
            first.drain()
        if not options.cached:
            drop_cached(folder / "kv")
        rows = []
        with Engine(model, engine, lmc, folder / "second.log") as second:
            second.wait()
            for _ in range(2):
                ask(second, "warm", "epic16", extra)
            for salt, blend, p in asked:
                for arm in ("disk", "memory", "memory_again"):
                    answer = ask(second, salt, blend, p)
                    rows.append(row_of(options, second.device, blend, salt, arm, answer))
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    show(rows)


def store(engine: Engine, salt: str, blend: str, p: Prompt) -> None:
    """Have every document of a prompt computed behind the system prompt; of `prefix` all of it."""
    system, *documents, _ = [p.token_ids[start:end] for start, end in p.spans]
    parts = [[system, *documents]] if blend == "prefix" else [[system, d] for d in documents]
    for part in parts:
        ends = np.cumsum([len(tokens) for tokens in part]).tolist()
        spans = [list(span) for span in zip([0, *ends], ends, strict=False)]
        tokens = [token for some in part for token in some]
        engine.ask(Request(tokens, salt, lmc={"chunks": spans, "blend": "prefix"}))


def ask(engine: Engine, salt: str, blend: str, p: Prompt) -> Answer:
    spans = [list(span) for span in p.spans]
    lmc = {"chunks": spans, "blend": BLENDS[blend], "save": False}
    return engine.ask(Request(p.token_ids, salt, lmc=lmc, reset=True))


def drop_cached(folder: Path) -> None:
    """Have the page cache forget the files of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def row_of(
    options: argparse.Namespace, device: str, blend: str, salt: str, arm: str, answer: Answer
) -> dict[str, Any]:
    assert answer.report is not None
    return {
        "benchmark": "restart",
        "commit": git_commit(),
        "device": device,
        "compression": options.compression,
        "cached": options.cached,
        "blend": blend,
        "prompt": salt,
        "arm": arm,
        "ttft_s": answer.wall_s,
        "kinds": answer.report["kinds"],
        "bytes": answer.report["bytes"],
        "reason": answer.report["reason"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    print("TTFT after a restart, medians of paired ratios to host memory [95%]")
    print(f"{'blend':12}{'MB':>6}{'memory s':>10}{'disk / memory':>22}{'again / memory':>22}")
    for blend in BLENDS:
        of = {
            arm: {r["prompt"]: r for r in rows if r["blend"] == blend and r["arm"] == arm}
            for arm in ("disk", "memory", "memory_again")
        }
        memory = {p: r["ttft_s"] for p, r in of["memory"].items()}
        cells = []
        for arm in ("disk", "memory_again"):
            ratios = [[r["ttft_s"] / memory[p]] for p, r in of[arm].items()]
            e = bootstrap(ratios, lambda sample: np.median(np.concatenate(sample)))
            assert e is not None
            cells.append(f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]")
        from_disk = np.median([r["bytes"].get("disk", 0) for r in of["disk"].values()]) / 1e6
        seconds = np.median(list(memory.values()))
        print(f"{blend:12}{from_disk:6.0f}{seconds:10.3f}{cells[0]:>22}{cells[1]:>22}")


if __name__ == "__main__":
    main()
