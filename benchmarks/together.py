"""What it gains that claims of one step go through the layers together.

    python benchmarks/together.py

One engine in this process, whose workers compute rows as for claims that were admitted in one step:
of N requests, each a prompt of 512 tokens of which some rows, spread in runs of 16, are computed,
all in one pass or one request after another, in turn. Prints the ratio of one after another to
together, medians of pairs with bootstrap intervals, and appends a row a pair to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from engine import started

from lmc.results.rows import git_commit
from lmc.results.statistics import bootstrap

OUT = Path(__file__).parent / "results" / "together.jsonl"
T, RUN, BLOCK = 512, 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rows", type=int, nargs="*", default=[32, 128, 256], help="of a claim")
    parser.add_argument("--claims", type=int, nargs="*", default=[1, 2, 4, 8])
    options = parser.parse_args()
    _llm, worker = engine_of(options.model, max(options.claims))
    measured = []
    for rows in options.rows:
        for claims in options.claims:
            for pair in range(-1, options.pairs):  # the first one warms up
                seconds = timed(worker, claims, rows, first=pair % 2 == 0)
                if pair >= 0:
                    measured.append(
                        {"benchmark": "together", "commit": git_commit(), "claims": claims,
                         "rows": rows, "pair": pair, **seconds}
                    )  # fmt: skip
            show(measured, claims, rows)
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in measured)


def engine_of(model: str, claims: int) -> tuple[Any, Any]:
    """An engine whose pages hold so many prompts, and its worker's side."""
    llm = started(
        model, {"memory_bytes": 1 << 26, "min_recovery": None}, enforce_eager=True,
        max_model_len=2048, block_size=BLOCK, max_num_batched_tokens=4096, max_num_seqs=8,
        kv_cache_memory_bytes=(claims * T // BLOCK + 64) * BLOCK * 46080,
    )  # fmt: skip
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return llm, get_kv_transfer_group().worker


def timed(worker: Any, claims: int, rows: int, first: bool) -> dict[str, float]:
    """Seconds of both ways, wall and processor; `first`: whether together comes first."""
    from lmc.connectors.vllm.adapter import Forward, run_together

    starts = np.linspace(0, T - RUN, rows // RUN).astype(np.int64)
    chosen = np.unique((starts[:, None] + np.arange(RUN)).ravel())
    rng = np.random.default_rng(claims)

    def forwards() -> list[Any]:
        return [
            Forward(worker._adapter(rng.integers(1000, 40_000, T), blocks(i), chosen), chosen)
            for i in range(claims)
        ]

    def apart() -> None:
        for forward in forwards():
            run_together([forward])

    ways: dict[str, Callable[[], Any]] = {"together": lambda: run_together(forwards())}
    ways["apart"] = apart
    seconds = {}
    for way in list(ways) if first else reversed(ways):
        wall, processor = time.perf_counter(), time.process_time()
        ways[way]()
        seconds[f"{way}_s"] = time.perf_counter() - wall
        seconds[f"{way}_cpu_s"] = time.process_time() - processor
    return seconds


def blocks(i: int) -> list[int]:
    """Blocks of the i-th prompt; block 0 is vLLM's null block."""
    n = T // BLOCK
    return list(range(1 + i * n, 1 + (i + 1) * n))


def show(measured: list[dict[str, Any]], claims: int, rows: int) -> None:
    of = [m for m in measured if m["claims"] == claims and m["rows"] == rows]
    line = f"{claims} claims of {rows:3} rows"
    for column, name in (("_s", "wall"), ("_cpu_s", "CPU")):
        pairs = [m[f"apart{column}"] / m[f"together{column}"] for m in of]
        e = bootstrap(pairs, lambda sample: float(np.median(sample)))
        assert e is not None
        line += f"   {name} {e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"
    print(line, flush=True)


if __name__ == "__main__":
    main()
