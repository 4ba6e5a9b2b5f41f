"""`lmc sim` beside other simulators: hits on one trace of blocks, seconds and memory.

    python benchmarks/peers.py mooncake_conversation.jsonl \\
        --lmcache PYTHON --kvcache-simulator PYTHON

PYTHON are interpreters of environments with `lmcache` and with `kvcache-simulator`; what is not
given is left out. LRU at a few capacities, each tool by its own command in a process of its own
and by its own metric, and what lmc says by that same metric:

- libCacheSim: blocks held, over all blocks (`--metric object`);
- LMCache's cache simulator: tokens of the run of hits from the start, over all input tokens of the
  trace, full blocks only (`--metric prefix`); it takes one capacity a run, and the log of its own
  server, which is written from the trace here;
- kvcache-simulator: the same run, but of the last half of the requests, with the last block of a
  prompt, which is not full, and an LRU that evicts leaves only (`--policy leaf_lru`); lmc has no
  option for half a trace, so that this file adds up what lmc's replay found.

Prints a table and appends a row a tool. `-r` repetitions, the tools in turns; seconds (the median)
and peak memory (the most) are of whole processes, imports and reading the trace included;
libCacheSim, which reads no such trace, is given an array of its blocks. `all`: lmc's one pass for
every capacity, which prints some of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lmc.results.rows import cpu_name, git_commit
from lmc.sim.readers import read
from lmc.sim.replay import MISS, prefix_run, replay
from lmc.sim.trace import Accesses, accesses

OUT = Path(__file__).parent / "results" / "peers.jsonl"
CAPACITIES = [1_000, 10_000, 30_000, 50_000]  # blocks
CHUNK = 1 << 30  # bytes that LMCache is told of a block: then a capacity in GiB counts blocks
MODEL = "glm-5.2"  # any that kvcache-simulator knows: budgets are made of its bytes a block
Rates = list[float | None]


def process(command: Sequence[str]) -> tuple[str, float, float]:
    """What a command prints, its seconds and its peak memory in MiB."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        took = time.perf_counter() - start
        out.seek(0), err.seek(0)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)}: {child.returncode}\n{err.read()[-2000:]}")
        return out.read(), took, usage.ru_maxrss / 1024


def of_lmc(trace: Path, metric: str, capacity: str) -> tuple[Rates, float, float]:
    """`lmc sim` at a few capacities, each a replay, or at `all` in one pass."""
    lmc = str(Path(sys.executable).with_name("lmc"))
    asked = ["--metric", metric, "--capacity", capacity, "--json"]
    said, took, peak = process([lmc, "sim", str(trace), *asked])
    rates = {row["capacity"]: row["hit_rate"] for row in json.loads(said)}
    return [rates.get(c) for c in CAPACITIES], took, peak


def of_libcachesim(keys: Path) -> tuple[Rates, float, float]:
    """A pass for each capacity, in one process that has the keys."""
    here = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {here!r}); import numpy as np\n"
        "from stack_distances import theirs\n"
        f"keys = np.load({str(keys)!r})\n"
        f"print([theirs(keys, c)[1] for c in {CAPACITIES}])"
    )
    said, took, peak = process([sys.executable, "-c", code])
    return json.loads(said), took, peak


def of_lmcache(python: str, log: Path) -> tuple[Rates, float, float]:
    """Its command once for each capacity: seconds add up."""
    rates: Rates = []
    seconds = peaks = 0.0
    for capacity in CAPACITIES:
        said, took, peak = process([
            python, "-m", "lmcache.tools.cache_simulator.simulator", "-i", str(log),
            "--cache-capacity-gib", str(capacity), "--kv-bytes-per-chunk", str(CHUNK),
            "-o", str(log.with_suffix(".png")),
        ])  # fmt: skip
        hits, total = (
            int(number.replace(",", ""))
            for number in re.findall(r"(?:Hit|Total) tokens\s*: ([\d,]+)", said)[::-1]
        )
        rates.append(hits / total)
        seconds, peaks = seconds + took, max(peaks, peak)
    return rates, seconds, peaks


def of_kvcache_simulator(python: str, trace: Path, block: int) -> tuple[Rates, float, float]:
    """Its command with a budget for each capacity."""
    command = [python, "-m", "kvcache_sim", "run", "--trace", str(trace), "--model", MODEL]
    command += ["--block-size", str(block), "--policies", "lru", "--format", "json"]
    said, _, _ = process([*command, "--budgets-gib", "1"])  # the size depends on the prompts
    size = json.loads(said)["metadata"]["bytesPerBlock"]
    budgets = ",".join(str((c + 0.5) * size / 2**30) for c in CAPACITIES)
    said, took, peak = process([*command, "--budgets-gib", budgets])
    points = {p["cacheBlocks"]: p["results"]["lru"]["hitRate"] for p in json.loads(said)["points"]}
    return [points.get(c) for c in CAPACITIES], took, peak


def last_half(trace: Accesses) -> Rates:
    """By kvcache-simulator's metric, what lmc's replay of `leaf_lru` finds."""
    begin = trace.offsets[trace.requests // 2]
    whole = trace.tokens[begin:].sum()
    rates: Rates = []
    for capacity in CAPACITIES:
        run = prefix_run(replay(trace, [capacity], "leaf_lru").tier != MISS, trace)
        rates.append(float(trace.tokens[begin:][run[begin:]].sum() / whole))
    return rates


def log_of(trace: Accesses, file: Path) -> None:
    """The trace as LMCache's server logs lookups."""
    full = trace.full_blocks()
    bounds = zip(full.offsets[:-1].tolist(), full.offsets[1:].tolist(), strict=True)
    with file.open("w") as lines:
        for i, (a, b) in enumerate(bounds):
            event = {
                "timestamp": i,
                "chunk_hashes": [str(key) for key in full.keys[a:b].tolist()],
                "seq_len": int(full.input_tokens[i]),
                "chunk_size": full.block_tokens,
            }
            lines.write(json.dumps(event) + "\n")


def main() -> None:
    """Run, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="of blocks, as Mooncake's")
    parser.add_argument("--lmcache", metavar="PYTHON")
    parser.add_argument("--kvcache-simulator", metavar="PYTHON")
    parser.add_argument("-r", "--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    trace = accesses(read(options.trace))
    few = ",".join(map(str, CAPACITIES))
    with tempfile.TemporaryDirectory() as made:
        keys, log = Path(made, "keys.npy"), Path(made, "lookups.jsonl")
        np.save(keys, trace.keys)
        log_of(trace, log)
        tools: dict[str, Callable[[], tuple[Rates, float, float]]] = {
            "lmc, object": lambda: of_lmc(options.trace, "object", few),
            "lmc, object, all": lambda: of_lmc(options.trace, "object", "all"),
            "libCacheSim": lambda: of_libcachesim(keys),
            "lmc, prefix": lambda: of_lmc(options.trace, "prefix", few),
            "lmc, prefix, all": lambda: of_lmc(options.trace, "prefix", "all"),
        }
        if options.lmcache:
            tools["LMCache"] = lambda: of_lmcache(options.lmcache, log)
        if options.kvcache_simulator:
            block = trace.block_tokens
            tools["kvcache-simulator"] = lambda: of_kvcache_simulator(
                options.kvcache_simulator, options.trace, block
            )
        measured: dict[str, list[tuple[Rates, float, float]]] = {name: [] for name in tools}
        for _ in range(options.repeat):
            for name, run in tools.items():
                measured[name].append(run())
    rows = [
        {
            "tool": name,
            "rates": runs[0][0],
            "seconds": [took for _, took, _ in runs],
            "peak_mib": max(peak for *_, peak in runs),
        }
        for name, runs in measured.items()
    ]
    if options.kvcache_simulator:
        rows.append({"tool": "lmc, last half", "rates": last_half(trace), "seconds": []})
    print(f"{'':18}" + "".join(f"{c:>9,}" for c in CAPACITIES) + "   seconds  peak MiB")
    for row in rows:
        rates = "".join("        -" if rate is None else f"{rate:9.2%}" for rate in row["rates"])
        took = f"{statistics.median(row['seconds']):10.2f}" if row["seconds"] else f"{'-':>10}"
        peak = f"{row['peak_mib']:10.0f}" if row["seconds"] else f"{'-':>10}"
        print(f"{row['tool']:18}{rates}{took}{peak}")
    where = {
        "trace": options.trace.name,
        "capacities": CAPACITIES,
        "time": time.time(),
        "cpu": cpu_name(),
        "commit": git_commit(),
    }
    with options.out.open("a") as file:
        file.writelines(json.dumps(row | where) + "\n" for row in rows)


if __name__ == "__main__":
    main()
