"""Two servers that share a folder are asked for the same text at once: is it computed once?

    python benchmarks/single_flight.py

Two `lmc serve` of one machine, each bound to one half of the cores, with the same disk tier. A
prompt that nobody has is sent to the first, and a moment later to the second; each round in two
ways, on a text of its own: `shared` (the second waits for what the first computes) and `apart` (the
first is told to store nothing, so that there is nothing to wait for). Prints, as medians over
rounds with bootstrap intervals, how many tokens both computed as a share of the prompt, how long it
took until the second and until both had answered, and how the second got its tokens; appends a row
a round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from openai import AsyncOpenAI

from lmc.experiment.vllm.servers import lmc_serve, running
from lmc.model import exports
from lmc.results.rows import cpu_name, git_commit
from lmc.results.statistics import bootstrap

OUT = Path(__file__).parent / "results" / "single_flight.jsonl"
ARMS = ("shared", "apart")
FLAGS = ("--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "2048")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


async def round_of(
    clients: list[AsyncOpenAI], model: str, arm: str, ids: list[int], later_s: float
) -> dict[str, Any]:
    """One text, asked for twice."""
    begun = time.perf_counter()

    async def ask(client: AsyncOpenAI, save: bool) -> tuple[float, dict[str, int]]:
        answer = await client.completions.create(
            model=model, prompt=ids, max_tokens=1, temperature=0,
            extra_body={"kv_transfer_params": {"lmc": {"save": save}}},
        )  # fmt: skip
        kinds = answer.kv_transfer_params["lmc"]["kinds"]  # type: ignore[attr-defined]
        return time.perf_counter() - begun, kinds

    first = asyncio.create_task(ask(clients[0], arm == "shared"))
    await asyncio.sleep(later_s)
    second_s, second = await ask(clients[1], True)
    first_s, kinds = await first
    return {
        "arm": arm, "tokens": len(ids), "second_s": second_s, "both_s": max(first_s, second_s),
        "computed": (kinds["new"] + second["new"]) / len(ids), "second": second,
    }  # fmt: skip


async def measure(urls: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all rounds; the first one of each arm warms up."""
    clients = [
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        for url in urls
    ]
    model = (await clients[0].models.list()).data[0].id
    rng = np.random.default_rng(options.seed)
    rows: list[dict[str, Any]] = []
    for number in range(-1, options.rounds):
        for arm in ARMS if number % 2 else ARMS[::-1]:
            ids = rng.integers(1000, 40_000, options.tokens).tolist()
            row = await round_of(clients, model, arm, ids, options.later)
            rows += [{"round": number} | row] if number >= 0 else []
            await asyncio.sleep(1.0)  # what is stored is not the next round's
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """One line an arm."""
    print("arm     tokens computed        second answered s      both answered s")
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        cells = []
        for column in ("computed", "second_s", "both_s"):
            e = bootstrap([[row[column]] for row in own],
                          lambda sample: float(np.median(np.concatenate(sample))))  # fmt: skip
            assert e is not None
            cells.append(f"{e.value:6.2f} [{e.low:.2f}, {e.high:.2f}]".ljust(22))
        kinds = sum((Counter(row["second"]) for row in own), Counter[str]())
        print(f"{arm:7}", *cells, dict(kinds))


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--later", type=float, default=0.3, help="seconds, for the second one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        tier = {"name": "disk", "path": f"{work}/kv", "capacity": "8GiB"}
        config = Path(work) / "lmc.json"
        config.write_text(json.dumps({"memory_bytes": 1 << 30, "tiers": [tier]}))
        command = lmc_serve(exports.resolve(options.model), config)
        urls = []
        for name, bound in (("first", cores[:half]), ("second", cores[-half:])):
            bind = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, bound))}
            log = Path(work) / f"{name}.log"
            server = stack.enter_context(running([*command, *FLAGS], log, ENVIRONMENT | bind))
            urls.append(server.url)
        rows = asyncio.run(measure(urls, options))
    show(rows)
    where = {"benchmark": "single_flight", "time": time.time(), "cpu": cpu_name()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(where | {"commit": git_commit()} | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
