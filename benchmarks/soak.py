"""lmc serve under load while its disk is damaged, filled and hung: nothing fails, nothing is wrong.

    python benchmarks/soak.py --minutes 30 --clients 8

Two servers with the same flags: `lmc serve` with little host memory before a disk tier that is
small, so that chunks are evicted from both all the time, and plain vLLM as the reference, each on
one half of the cores. Clients (the `openai` package) ask in a closed loop: retrieval with documents
in ever other orders, which say where those are; conversations, streamed and not; prompts that come
again; two sampled answers; log-probabilities; and some hang up. Meanwhile the disk goes through
phases, over and over:

corrupt   bytes of half of its segment files are changed every five seconds; once a byte of every
          header in its index
full      no byte is left, and what the server frees is taken from it
hung      no read, write or sync returns for half a minute; every other time the file system is
          frozen as well, so that nothing in it can be changed; then ten seconds of nothing
calm      nothing

Behind each the load stops; each client asks one retrieval prompt more, all at once; then the last
blended prompts are asked again, alone.

What is checked, and what makes the exit status 1: a request that fails; an answer that is not what
`soak_checks.Checks` says it must be; something that was done to the disk of which no counter in
/metrics tells; a disk that is not asked again when it is well; and, in runs of ten minutes and
more, memory of lmc's processes that grows by more than 2 MiB a minute in the second half. Needs
root, for the disk (`soak_disk.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from openai import AsyncOpenAI
from soak_checks import TIE, Checks
from soak_disk import SickDisk, sick_disk
from soak_load import TIMEOUT_S, Load
from soak_watch import TRACES, Memory, counters, level, moved, slope, tenths, traces, waits
from transformers import AutoTokenizer

from lmc.experiment.vllm.servers import Server, lmc_serve, running, vllm_serve
from lmc.model import exports
from lmc.results.rows import cpu_name, git_commit

OUT = Path(__file__).parent / "results" / "soak.jsonl"
MEMORY_BYTES, DISK_BYTES, IMAGE_BYTES = 256 << 20, 512 << 20, 1 << 30
PHASES = {"corrupt": 30.0, "full": 30.0, "hung": 40.0, "calm": 30.0}  # seconds of load
AT_ONCE = ("full", "hung")  # phases that are noticed while they last
HUNG_S = 30.0
AGAIN_S = 8.0  # behind each phase, for blended prompts that are asked again
AT_LEAST_S = 600.0  # of load, or memory is not judged
GROWTH = 2.0  # MiB a minute
MOST_FAILURES = 20
FLAGS = (
    "--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "2048",
    "--max-num-seqs", "16",
)  # fmt: skip
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    # oneDNN keeps a kernel for each number of rows that it has seen, of 1,024 by default: memory of
    # both servers would grow for hours, whoever asks.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
}  # fmt: skip


async def treat(disk: SickDisk, phase: str, cycle: int, seconds: float, pid: int) -> bool:
    """One phase of the disk, so many seconds; whether a server met it: a disk that hangs is met by
    those who want something of it, and else by nobody."""
    loop = asyncio.get_running_loop()
    until, met = loop.time() + seconds, True
    if phase == "corrupt":
        disk.flip_index()
        while loop.time() < until:
            await asyncio.to_thread(disk.flip)
            await asyncio.sleep(min(5.0, max(0.0, until - loop.time())))
    elif phase == "full":
        while loop.time() < until:
            await asyncio.to_thread(disk.fill)
            await asyncio.sleep(min(0.5, max(0.0, until - loop.time())))
    elif phase == "hung":
        try:
            await asyncio.to_thread(disk.hang, cycle % 2 == 1)
            await asyncio.sleep(min(HUNG_S, seconds))
            met = waits(pid)
        finally:
            disk.let_go()
    await asyncio.sleep(max(0.0, until - loop.time()))
    return met


async def soak(
    servers: dict[str, Server], disk: SickDisk, tokenizer: Any, options: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """What happened, and what should not have."""
    clients = {
        name: AsyncOpenAI(base_url=f"{s.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
        for name, s in servers.items()
    }
    models = {name: json.loads(s.get("/v1/models"))["data"][0]["id"] for name, s in servers.items()}
    checks = Checks(clients["lmc"], clients["plain"], models)
    load = Load(
        clients["lmc"], models["lmc"], tokenizer, options.clients, options.seed, checks.heard
    )
    memory = Memory(servers)
    await load.warm_up()
    asking, *aside = [asyncio.create_task(some.run()) for some in (load, checks, memory)]
    phases: list[dict[str, Any]] = []
    faults: list[str] = []
    unmet: set[tuple[int, str]] = set()
    loaded, cycle = 0.0, 0
    while loaded < options.minutes * 60 and len(load.failures) <= MOST_FAILURES:
        first = await asyncio.to_thread(counters, servers["lmc"])
        before = first
        grown: dict[str, dict[str, float]] = {}
        for phase, seconds in PHASES.items():
            load.phase = phase
            load.go_on()
            if not await treat(disk, phase, cycle, seconds, servers["lmc"].pid):
                unmet.add((cycle, phase))
                disk.done["hung_met_by_nobody"] += 1
            await load.pause()
            await load.burst()
            await checks.again(servers["lmc"].url, AGAIN_S)
            disk.empty()
            after = await asyncio.to_thread(counters, servers["lmc"])
            grown[phase], before = moved(before, after), after
            loaded += seconds
            print(
                f"{loaded / 60:5.1f} min  {phase:8} {len(load.failures)} failed, "
                f"{len(checks.wrong)} wrong; compared {checks.seen['exact_compared']} exact, "
                f"{checks.seen['blended_compared']} blended; {checks.waiting} wait",
                flush=True,
            )
        if not level(servers["lmc"], "tier_answers"):
            faults.append(f"cycle {cycle}: the disk is well, and left alone")
        for phase in TRACES:
            # What was damaged is noticed when it is read, which may be later.
            told = traces(phase, grown[phase] if phase in AT_ONCE else moved(first, before))
            if not told and (cycle, phase) not in unmet:
                faults.append(f"cycle {cycle}: {phase}, and no counter tells of it")
            phases.append({"cycle": cycle, "phase": phase, "told": told})
        cycle += 1
    await load.end()
    await asking
    await checks.done()
    for task in aside:
        task.cancel()
    faults += [f"failed: {line}" for line in load.failures]
    faults += [f"wrong: {line}" for line in checks.wrong]
    growth = slope(memory.samples["lmc"])
    if loaded >= AT_LEAST_S and growth > GROWTH:
        faults.append(f"memory grows by {growth:.2f} MiB a minute")
    return {
        "load_s": loaded, "cycles": cycle, "clients": options.clients, "seed": options.seed,
        "asked": [[*key, n] for key, n in sorted(load.asked.items())],
        "cancelled": load.cancelled, "failed": len(load.failures), "wrong": len(checks.wrong),
        "seconds": {
            phase: [float(np.percentile(s, q)) for q in (50, 95)]
            for phase, s in load.seconds.items()
        },
        "seen": dict(checks.seen), "furthest": checks.furthest, "tie": TIE, "done": disk.done,
        "phases": phases,
        "memory": {
            name: {
                "slope": slope(s), "own_mib": tenths(s, 1), "files_mib": tenths(s, 2),
                "descriptors": tenths(s, 3), "threads": tenths(s, 4),
                "samples": [[round(x, 1) for x in row] for row in s[:: max(1, len(s) // 60)]],
            }
            for name, s in memory.samples.items()
        },
    }, faults  # fmt: skip


def table(got: dict[str, Any]) -> None:
    """Print what happened."""
    print(f"\n{got['clients']} clients, {got['load_s'] / 60:.1f} minutes of load, "
          f"{got['cycles']} cycles")  # fmt: skip
    print("\nphase     requests  p50 s  p95 s  compared: exact  blended")
    asked: Counter[str] = Counter()
    for phase, _, n in got["asked"]:
        asked[phase] += n
    for phase in PHASES:
        p50, p95 = got["seconds"].get(phase, (0.0, 0.0))
        exact, blended = (got["seen"].get(f"{c}_compared:{phase}", 0) for c in ("exact", "blended"))
        print(f"{phase:8}  {asked[phase]:8}  {p50:5.1f}  {p95:5.1f}  {exact:15}  {blended:7}")
    kinds: Counter[str] = Counter()
    for _, kind, n in got["asked"]:
        kinds[kind] += n
    print("\nasked    ", ", ".join(f"{kind} {n}" for kind, n in kinds.items()))
    print(f"cancelled {got['cancelled']}, failed {got['failed']}, wrong {got['wrong']}")
    seen = got["seen"]
    print(f"exact     {seen.get('exact_compared', 0)} compared with plain vLLM")
    print(f"blended   {seen.get('blended', 0)}, asked again alone "
          f"{seen.get('blended_compared', 0) + seen.get('blended_not_comparable', 0)}, of the same "
          f"plan and compared {seen.get('blended_compared', 0)}")  # fmt: skip
    parted = (f"{k[5:]} {n}" for k, n in seen.items() if k.startswith("plan:"))
    print("          plans of the others part at", "; ".join(parted) or "nothing")
    print(f"ties      {seen.get('ties', 0)} answers took another token that was less than "
          f"{got['tie']} away; log-probabilities at most {got['furthest']:.1e} apart")  # fmt: skip
    print("\ndone to the disk:", ", ".join(f"{what} {n}" for what, n in got["done"].items()))
    told: dict[str, Counter[str]] = {phase: Counter() for phase in TRACES}
    for row in got["phases"]:
        told[row["phase"]].update(row["told"])
    for phase, counts in told.items():
        print(f"{phase}, in /metrics:")
        for name, n in sorted(counts.items()):
            print(f"    {name} {n:g}")
    print("\nserver  own memory MiB   a minute  mapped files MiB   descriptors   threads")
    for name, m in got["memory"].items():
        cells = (f"{a:.0f} to {b:.0f}" for a, b in (m["files_mib"], m["descriptors"], m["threads"]))
        a, b = m["own_mib"]
        own = f"{a:.0f} to {b:.0f}"
        print(f"{name:6}  {own:15}  {m['slope']:+8.2f}", *(f"{cell:>14}" for cell in cells))
    print("first and last tenth of the samples, medians; a minute: over the second half")


def main() -> None:
    """Soak, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=30.0, help="of load, in whole cycles")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="a folder for the logs of the servers")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the disk is let go
    model = exports.resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        logs = options.logs or Path(work)
        logs.mkdir(parents=True, exist_ok=True)
        disk = stack.enter_context(sick_disk(Path(work), IMAGE_BYTES, options.seed))
        tier = {"name": "disk", "path": str(disk.store), "capacity": DISK_BYTES}
        config = Path(work) / "lmc.json"
        config.write_text(json.dumps({"memory_bytes": MEMORY_BYTES, "tiers": [tier]}))
        cores = sorted(os.sched_getaffinity(0))
        half = len(cores) // 2
        commands = {"plain": vllm_serve(model), "lmc": disk.beneath(lmc_serve(model, config))}
        bound = {"plain": cores[half:], "lmc": cores[:half] or cores}
        servers = {}
        for name, command in commands.items():
            bind = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, bound[name]))}
            servers[name] = stack.enter_context(
                running([*command, *FLAGS], logs / f"{name}.log", ENVIRONMENT | bind)
            )
        got, faults = asyncio.run(soak(servers, disk, tokenizer, options))
        # Told before servers and disk are put away, which may fail.
        table(got)
        verdict(faults)
        where = {"time": time.time(), "cpu": cpu_name(), "commit": git_commit()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as out:
            out.write(json.dumps({"benchmark": "soak"} | where | got | {"faults": faults}) + "\n")
    sys.exit(bool(faults))


def verdict(faults: Sequence[str]) -> None:
    """Print what should not have happened."""
    print("\nnothing failed, nothing was wrong" if not faults else f"\n{len(faults)} faults:")
    for fault in faults:
        print(f"  {fault}")


if __name__ == "__main__":
    main()
