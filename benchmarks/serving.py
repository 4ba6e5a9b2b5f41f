"""lmc serve beside plain vLLM under load: time to first token, time a token, throughput.

    python benchmarks/serving.py --out benchmarks/results/serving.jsonl

Servers with the same flags, vLLM's prefix cache on in both, are sent the same prompts in
alternating blocks: one arm is asked all of a block, then the next, in turned order every other
block. Nothing is shared between blocks and arms: each has a cache salt of its own.

What is asked, fixed before a run: `rag`, documents of a corpus in ever other orders, all of them
sent alone once before (not counted); `chat` and `agents`, sessions whose turns come one after the
other, of which the first turns are told apart (`first`), since there is nothing to find; `nothing`,
prompts that have no text in common. Load is `N` clients that each wait for their answer, or
`poisson`: arrivals at 0.7 of the rate at which plain vLLM answered one client. Servers are started
anew for each block, since of two that do the very same one may be a twentieth slower for as long as
it runs, by where its memory came to lie. Four requests of each workload warm them up and are left
out; nothing else is. A request that fails ends the run.

Both compute on the same cores; servers that do not end the run. What a server goes on to compute
when its requests are answered, texts alone that clients told of, would be paid for by the other
arm: each block begins when no server has used a processor for a second, and what it took until
then is told apart (`idle s`, processor seconds a request, of no answer's time).

Arms: `plain`; `lmc`, clients that know of nothing; `spans`, clients that say where documents are;
in `nothing` also `idle`, vLLM with a connector that does nothing, since having one at all costs;
and `off`, the server of lmc told to leave a request alone (`enabled: false`): beside it, what lmc
does costs what it costs within one process. Prints medians and 95th percentiles by workload, load
and arm, and the ratios plain / arm, and off / arm, with a bootstrap interval over prompts, paired;
appends a row a request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from openai import AsyncOpenAI
from transformers import AutoTokenizer

from lmc.chunking.prompt import Prompt
from lmc.experiment.vllm.servers import Server, lmc_serve, running, vllm_serve
from lmc.model import exports
from lmc.results.rows import cpu_name, git_commit
from lmc.results.statistics import bootstrap
from lmc.workloads.library import sources
from lmc.workloads.rag_reorder import RagReorder
from lmc.workloads.sample import Sample, corpus_of
from lmc.workloads.sessions import Agents, Chat

OUT = Path(__file__).parent / "results" / "serving.jsonl"
ARMS = ("plain", "idle", "off", "lmc", "spans")
BARE = ("plain", "idle")  # servers of vLLM alone
WORKLOADS = ("rag", "chat", "agents", "nothing")
LOADS = ("1", "4", "8", "poisson")
SESSIONS = 4  # of a block, where there are sessions
REQUESTS = 12  # of a block, where there are none
ANSWER = 16  # tokens
PART = 12_000  # characters, which are 1,600 tokens or more
REST = 0.2  # processor seconds a second that a server at rest uses: it polls
BUSY = 0.7  # of the rate at which plain vLLM answers one client
FLAGS = (
    "--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "2048",
    "--max-num-seqs", "16",
)  # fmt: skip
HERE = str(Path(__file__).parent)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    # By itself vLLM keeps a core free, and another one beside a connector: where there are two, a
    # plain server computes on one of them and one with a connector on both.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "PYTHONPATH": os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")])),
}  # fmt: skip
IDLE = {
    "kv_connector": "IdleConnector", "kv_connector_module_path": "idle_connector",
    "kv_role": "kv_both",
}  # fmt: skip
BOUND = re.compile(r"local_rank=\d+, core ids=\[[\d, ]*\]")


@dataclass(frozen=True)
class Ask:
    """One request: its place in the block, and the one that must be answered before it."""

    sample: Sample
    number: int
    behind: int | None
    first: bool


def block_of(workload: str, seed: int, tokenizer: Any) -> tuple[list[Ask], list[Prompt]]:
    """What a block asks, and what is sent before it."""
    if workload == "rag":
        rag = RagReorder(seed=seed, documents=8, documents_per_prompt=6, prompts=REQUESTS)
        samples = rag.samples(tokenizer)
        before = corpus_of(rag, samples, tokenizer)
        return [Ask(s, i, None, False) for i, s in enumerate(samples)], before
    if workload == "nothing":
        return [Ask(s, i, None, False) for i, s in enumerate(strangers(seed, tokenizer))], []
    make = Chat if workload == "chat" else Agents
    samples = make(seed=seed, sessions=SESSIONS, turns=4).samples(tokenizer)
    return [
        Ask(s, i, i - SESSIONS if i >= SESSIONS else None, i < SESSIONS)
        for i, s in enumerate(samples)
    ], []


def strangers(seed: int, tokenizer: Any) -> list[Sample]:
    """Prompts of 1,600 tokens, none of which has a part of another's text."""
    texts = sources()
    parts = [(name, at) for name in sorted(texts) for at in range(0, len(texts[name]), PART)]
    random.Random(seed).shuffle(parts)
    samples: list[Sample] = []
    for name, at in parts:
        ids = tokenizer.encode(f"{seed} {name} {at}\n" + texts[name][at : at + PART])
        if len(ids) >= 1600:
            samples.append(Sample(ids[:40], [ids[40:1568]], ids[1568:1600], []))
        if len(samples) == REQUESTS:
            return samples
    raise RuntimeError(f"the corpus has {len(samples)} texts of 1,600 tokens, want {REQUESTS}")


async def ask(
    client: AsyncOpenAI,
    model: str,
    ids: Sequence[int],
    extra: Mapping[str, Any],
    tokens: int = ANSWER,
) -> tuple[float, float, int]:
    """Seconds to the first token, and of the whole answer; tokens of it."""
    begun = time.perf_counter()
    stream = await client.completions.create(
        model=model, prompt=list(ids), max_tokens=tokens, temperature=0, stream=True,
        extra_body={**extra, "ignore_eos": True},
    )  # fmt: skip
    first, pieces = 0.0, 0
    async for piece in stream:
        if piece.choices:
            pieces += 1
            first = first or time.perf_counter() - begun
    return first, time.perf_counter() - begun, pieces


async def run_block(
    servers: Mapping[str, Server], server: str, client: AsyncOpenAI, model: str, arm: str,
    salt: str, asks: Sequence[Ask], before: Sequence[Prompt], load: str, rate: float,
    rng: random.Random,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of all requests of a block, which `server` of the servers is asked."""
    extra: dict[str, Any] = {"cache_salt": salt}
    for document in before:
        said = {"lmc": {"chunks": [list(s) for s in document.spans]}} if arm == "spans" else {}
        more = {"kv_transfer_params": said} if said else {}
        await ask(client, model, document.token_ids, extra | more)
    done = [asyncio.Event() for _ in asks]
    places = asyncio.Semaphore(len(asks) if load == "poisson" else int(load))
    rows: list[dict[str, Any]] = []

    async def one(item: Ask) -> None:
        if item.behind is not None:
            await done[item.behind].wait()
        async with places:
            prompt = item.sample.prompt
            lmc: dict[str, Any] = {"enabled": False} if arm == "off" else {}
            if arm == "spans":
                lmc = {"chunks": [list(s) for s in item.sample.reusable]}
            more = {"kv_transfer_params": {"lmc": lmc}} if arm not in BARE else {}
            ttft, wall, tokens = await ask(client, model, prompt.token_ids, extra | more)
        done[item.number].set()
        rows.append({
            "number": item.number, "first": item.first, "ttft_s": ttft, "wall_s": wall,
            "tpot_s": (wall - ttft) / max(1, tokens - 1), "prompt_tokens": len(prompt.token_ids),
        })  # fmt: skip

    await at_rest(servers)
    before_s = busy_s(servers[server])
    begun = time.perf_counter()
    tasks = []
    for item in asks:
        tasks.append(asyncio.create_task(one(item)))
        await asyncio.sleep(rng.expovariate(rate) if load == "poisson" else 0)
    await asyncio.gather(*tasks)
    took, answered_s = time.perf_counter() - begun, busy_s(servers[server])
    await at_rest(servers)
    block = {
        "block_s": took, "block_requests": len(asks), "cpu_s": answered_s - before_s,
        "idle_cpu_s": busy_s(servers[server]) - answered_s,
    }  # fmt: skip
    return [row | block for row in rows]


def busy_s(server: Server) -> float:
    """Processor seconds that a server and all that it started have used."""
    used = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == server.pid:  # the session, which each server begins
                used += int(fields[11]) + int(fields[12])
    return used / os.sysconf("SC_CLK_TCK")


async def at_rest(servers: Mapping[str, Server]) -> None:
    """Wait until no server has computed anything for a second."""
    while True:
        before = [busy_s(s) for s in servers.values()]
        await asyncio.sleep(1.0)
        after = [busy_s(s) for s in servers.values()]
        if max(b - a for a, b in zip(before, after, strict=True)) < REST:
            return


async def measure(
    servers: dict[str, Server], models: dict[str, str], tokenizer: Any,
    options: argparse.Namespace, block: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one block of everything that was asked for."""
    clients = {
        name: AsyncOpenAI(base_url=f"{s.url}/v1", api_key="none", max_retries=0, timeout=600)
        for name, s in servers.items()
    }
    rows: list[dict[str, Any]] = []
    for workload in options.workloads:
        rate = 0.1
        kinds = [a for a in ARMS if a in ("plain", *options.arms)]
        kinds = [a for a in kinds if a not in ("idle", "off") or workload == "nothing"]
        for load in options.loads:
            # One warms up for all loads.
            for number in [0, block] if load == options.loads[0] else [block]:
                asks, before = block_of(workload, LOADS.index(load) * 64 + number, tokenizer)
                asks = asks if number else asks[:SESSIONS]
                for arm in kinds if block % 2 else kinds[::-1]:
                    server = arm if arm in BARE else "lmc"
                    salt = f"{workload} {load} {number} {arm}"
                    found = await run_block(
                        servers, server, clients[server], models[server], arm, salt, asks, before,
                        load, rate, random.Random(salt.rpartition(" ")[0]),
                    )  # fmt: skip
                    where = {"workload": workload, "load": load, "block": number, "arm": arm}
                    rows += [where | row for row in found if number]
            if load == "1":
                alone = [r for r in rows if (r["workload"], r["load"]) == (workload, load)]
                plain = [r["wall_s"] for r in alone if r["arm"] == "plain"]
                rate = BUSY / float(np.mean(plain))
            print(f"# {workload} {load}, start {block}: asked", file=sys.stderr, flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Print one workload at one load."""
    by_arm: dict[str, dict[Any, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_arm[row["arm"]][row["block"], row["number"]] = row
    for arm, found in by_arm.items():
        again = {k: r for k, r in found.items() if not r["first"]}
        ttft = np.array([r["ttft_s"] for r in again.values()])
        cells = [f"{rows[0]['workload']:8} {rows[0]['load']:8} {arm:6} {len(again):4}"]
        cells.append(f"{np.median(ttft):7.3f} {np.percentile(ttft, 95):7.3f}")
        cells.append(f"{np.median([r['tpot_s'] for r in found.values()]) * 1e3:7.1f}")
        blocks = {r["block"]: r["block_s"] / r["block_requests"] for r in found.values()}
        cells.append(f"{np.mean(list(blocks.values())):7.3f}")
        idle = {r["block"]: r["idle_cpu_s"] / r["block_requests"] for r in found.values()}
        cells.append(f"{np.mean(list(idle.values())):6.2f}")
        for beside in ("plain", "off") if "off" in by_arm else ("plain",):
            for column, some in (("ttft_s", again), ("wall_s", found)):
                ratios = [[by_arm[beside][k][column] / r[column]] for k, r in some.items()]
                ratio = bootstrap(ratios, lambda sample: np.median(np.concatenate(sample)))
                assert ratio is not None
                cells.append(f"{ratio.value:6.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
        print("  ".join(cells), flush=True)


def append(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Keep rows, with what they were measured on."""
    where = {"time": time.time(), "cpu": cpu_name(), "commit": git_commit()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.writelines(json.dumps({"benchmark": "serving"} | where | row) + "\n" for row in rows)


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--loads", nargs="+", default=LOADS, choices=LOADS)
    parser.add_argument("--arms", nargs="+", default=ARMS[1:], choices=ARMS[1:])
    parser.add_argument("--starts", type=int, default=3, help="of the servers, a block each")
    parser.add_argument("--set", default="{}", help="more settings of lmc, JSON")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    model = exports.resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: list[dict[str, Any]] = []
    for block in range(1, options.starts + 1):
        with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
            config = Path(work) / "lmc.json"
            config.write_text(json.dumps({"memory_bytes": 4 << 30} | json.loads(options.set)))
            commands = {"plain": vllm_serve(model), "lmc": lmc_serve(model, config)}
            if "idle" in options.arms:
                commands["idle"] = [*vllm_serve(model), "--kv-transfer-config", json.dumps(IDLE)]
            names = list(commands) if block % 2 else list(commands)[::-1]
            servers = {
                name: stack.enter_context(
                    running([*commands[name], *FLAGS], Path(work) / f"{name}.log", ENVIRONMENT)
                )
                for name in names
            }
            cores = {name: BOUND.findall(s.log.read_text()) for name, s in servers.items()}
            if any(found != cores["plain"] for found in cores.values()):
                raise RuntimeError(f"the servers cannot be compared: they compute on {cores}")
            models = {
                name: json.loads(s.get("/v1/models"))["data"][0]["id"]
                for name, s in servers.items()
            }
            asked = asyncio.run(measure(servers, models, tokenizer, options, block))
        append(options.out, asked)
        rows += asked
    print("workload load     arm       n  TTFT p50     p95  ms/token  s/answer  idle s  "
          "sooner [95%]        whole answer [95%]    beside off, where there is one")  # fmt: skip
    for workload in options.workloads:
        for load in options.loads:
            table([r for r in rows if (r["workload"], r["load"]) == (workload, load)])


if __name__ == "__main__":
    main()
