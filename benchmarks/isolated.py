"""What it costs that an engine computes new spans once more, alone (`context: isolated`).

    python benchmarks/isolated.py

Two engines, one with `context: any`, are asked the same prompts in turn, each of documents that
nobody has seen: the worst case, since a document that comes back costs nothing more. `together` is
a stream: the next request comes at once, and what is left to compute alone is done beside it.
`idle` waits until all is done, as an engine does that has nothing to do. Prints the ratio of
isolated to any, of all prompts together, with bootstrap intervals, and appends a row a request to
benchmarks/results.
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
from lmc.results.rows import git_commit
from lmc.results.statistics import bootstrap

OUT = Path(__file__).parent / "results" / "isolated.jsonl"
SYSTEM, DOCUMENTS, DOCUMENT, QUESTION = 48, 4, 200, 32  # tokens of each, and how many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=8, help="of each phase")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    model = exports.resolve(options.model)
    config = EngineConfig(dtype="float32", threads=options.threads, kv_cache_memory_bytes=1 << 29)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        engines = {
            context: stack.enter_context(
                Engine(model, config, settings(context), Path(folder, f"{context}.log"))
            )
            for context in ("isolated", "any")
        }
        for engine in engines.values():
            engine.wait()
        for phase in ("warm-up", "together", "idle"):
            for i in range(2 if phase == "warm-up" else options.prompts):
                tokens, spans = prompt(f"{phase}{i}")
                order = list(engines) if i % 2 else list(reversed(engines))
                for context in order:
                    engine = engines[context]
                    start = time.perf_counter()
                    lmc = {"blend": {"name": "epic", "link_tokens": 16}, "chunks": spans}
                    answer = engine.ask(Request(tokens, "", lmc=lmc))
                    if phase != "together":
                        engine.drain()
                    rows.append(
                        {
                            "benchmark": "isolated", "commit": git_commit(),
                            "device": engine.device, "phase": phase, "prompt": i,
                            "context": context, "ttft_s": answer.wall_s,
                            "done_s": time.perf_counter() - start,
                        }
                    )  # fmt: skip
            for engine in engines.values():
                engine.drain()
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    show(rows)


def settings(context: str) -> dict[str, Any]:
    return {"memory_bytes": 1 << 30, "min_recovery": None, "context": context}


def prompt(name: str) -> tuple[list[int], list[list[int]]]:
    """New documents behind the same system text, and where they are."""
    rng = np.random.default_rng([*name.encode()])
    system = np.random.default_rng(0).integers(1000, 40_000, SYSTEM)
    lengths = [DOCUMENT] * DOCUMENTS + [QUESTION]
    parts = [system, *(rng.integers(1000, 40_000, n) for n in lengths)]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    spans = [list(span) for span in zip([0, *ends[:-2]], ends[:-1], strict=True)]
    return np.concatenate(parts).tolist(), spans


def show(rows: list[dict[str, Any]]) -> None:
    print("isolated / any, seconds of all prompts together [95%]")
    for phase, column in (("together", "ttft_s"), ("idle", "ttft_s"), ("idle", "done_s")):
        of = {(r["context"], r["prompt"]): r[column] for r in rows if r["phase"] == phase}
        pairs = [(of["isolated", i], t) for (c, i), t in of.items() if c == "any"]
        e = bootstrap(pairs, lambda sample: float(np.divide(*np.sum(sample, axis=0))))
        assert e is not None
        print(f"{phase:10}{column:8}{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]")


if __name__ == "__main__":
    main()
