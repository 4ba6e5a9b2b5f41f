"""LRU at all capacities: time and memory over trace lengths, beside libCacheSim; and chunking.

    python benchmarks/stack_distances.py --plot stack_distances.png

prints tables and appends a row for each line to benchmarks/results/stack_distances.jsonl. Traces
are synthetic: 60% of the accesses go to new keys, as in Mooncake's conversation trace, the others
to any earlier key, the older the more popular (Zipf with exponent 1).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lmc.chunking.cdc import Cdc
from lmc.results.rows import cpu_name, git_commit
from lmc.sim.stack import Curve, hit_curve, stack_distances

LENGTHS = [300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000]
OUT = Path(__file__).parent / "results" / "stack_distances.jsonl"
ROUNDS = 5


def synthetic(n: int, seed: int = 0) -> np.ndarray:
    """Keys [n], made in parts so that their making does not show in the peak memory."""
    rng = np.random.default_rng(seed)
    keys = np.empty(n, dtype=np.int64)
    known = 0
    for part in np.array_split(keys, -(-n // 1_000_000)):
        new = rng.random(len(part)) < 0.6
        new[0] |= known == 0
        so_far = known + np.cumsum(new)
        part[:] = np.where(new, so_far, (so_far ** rng.random(len(part))).astype(np.int64)) - 1
        known = int(so_far[-1])
    return keys


def curve_of(keys: np.ndarray) -> Curve:
    """What is measured: the hit rate at all capacities."""
    return hit_curve(stack_distances(keys))


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def scaling(n: int) -> dict[str, Any]:
    """One row, of a process that does nothing else."""
    curve_of(synthetic(1000))  # compiles
    keys = synthetic(n)
    times = [seconds(lambda: stack_distances(keys)) for _ in range(ROUNDS)]
    curve_times = [seconds(lambda: curve_of(keys)) for _ in range(ROUNDS)]
    return {
        "kind": "scaling",
        "accesses": n,
        "unique": int(keys.max()) + 1,
        "distances_s": times,
        "curve_s": curve_times,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def alone(n: int) -> dict[str, Any]:
    """The row of `scaling` from a new interpreter, because ru_maxrss never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(scaling, (n,))


def theirs(keys: np.ndarray, capacity: int) -> tuple[float, float]:
    """Seconds and hit rate of one pass of libCacheSim's LRU over keys [n]."""
    import libcachesim

    n = len(keys)
    # Their binary format for ids and sizes, the fastest to read that they have.
    fields = [("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")]
    records = np.zeros(n, dtype=fields)
    records["id"], records["size"], records["next"] = keys + 1, 1, -1
    with tempfile.NamedTemporaryFile(suffix=".oracleGeneral") as file:
        records.tofile(file.name)
        reader = libcachesim.TraceReader(file.name, libcachesim.TraceType.ORACLE_GENERAL_TRACE)
        # By default they spread the trace over 2^24 places, and touching those takes longer than
        # the accesses do.
        cache = libcachesim.LRU(capacity, hashpower=n.bit_length() - 1)
        start = time.perf_counter()
        miss_rate, _ = cache.process_trace(reader)
        return time.perf_counter() - start, 1 - miss_rate


def beside_libcachesim(n: int) -> dict[str, Any]:
    """One row: all capacities here, four capacities there, in turns; hit rates must agree."""
    keys = synthetic(n)
    capacities = [n // 300, n // 30, n // 10, n // 6]
    found = [theirs(keys, c)[1] for c in capacities]
    ours = curve_of(keys).at(capacities)
    np.testing.assert_allclose(ours, found, rtol=0, atol=0.5 / n)
    rounds = [
        (seconds(lambda: curve_of(keys)), sum(theirs(keys, c)[0] for c in capacities))
        for _ in range(ROUNDS)
    ]
    return {
        "kind": "libcachesim",
        "accesses": n,
        "capacities": capacities,
        "hit_rates": ours.tolist(),
        "ours_s": [a for a, _ in rounds],
        "theirs_s": [b for _, b in rounds],
        "libcachesim": version("libcachesim"),
    }


def chunking(prompts: int = 32, T: int = 32_768) -> dict[str, Any]:
    """One row: prompts of T random ids cut on one core."""
    tokens = np.random.default_rng(0).integers(0, 50_000, (prompts, T))
    chunker = Cdc(64)
    times = [seconds(lambda: [chunker.cuts(t) for t in tokens]) for _ in range(ROUNDS)]
    return {"kind": "cdc", "tokens": prompts * T, "window": chunker.window, "seconds": times}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Two panels in which what the method promises, O(n log n) and O(n), is a flat line."""
    import matplotlib.pyplot as plt

    n = [r["accesses"] for r in rows]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, name, label in (
        (axes[0], "ns_each", "ns / (n log2 n)"),
        (axes[1], "bytes_each", "peak bytes / n, above an empty run"),
    ):
        values = [r[name] for r in rows]
        axis.plot(n, values, marker="o")
        axis.set(xlabel="accesses n", ylabel=label, ylim=(0, 1.2 * max(values)))
        axis.semilogx()
    figure.suptitle("The LRU hit curve of all capacities")
    figure.savefig(file)


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory over n")
    options = parser.parse_args()
    empty = alone(1000)["peak_bytes"]
    rows = []
    print("  accesses     unique  distances s  all capacities s  ns/(n log2 n)  bytes/n  peak MiB")
    for n in options.lengths:
        row = alone(n)
        row["ns_each"] = np.median(row["curve_s"]) / (n * np.log2(n)) * 1e9
        row["bytes_each"] = (row["peak_bytes"] - empty) / n
        rows.append(row)
        print(
            f"{n:10,} {row['unique']:10,} {np.median(row['distances_s']):12.3f} "
            f"{np.median(row['curve_s']):17.3f} {row['ns_each']:14.2f} {row['bytes_each']:8.1f} "
            f"{row['peak_bytes'] / 2**20:9.0f}"
        )
    if options.plot:
        draw(rows, options.plot)
    if find_spec("libcachesim"):
        row = beside_libcachesim(288_500)
        ratios = np.array(row["theirs_s"]) / row["ours_s"]
        print(
            f"libCacheSim LRU, 4 capacities: {np.median(row['theirs_s']):.3f} s; "
            f"all capacities here: {np.median(row['ours_s']):.3f} s; "
            f"{np.median(ratios):.1f} times faster ({ratios.min():.1f} to {ratios.max():.1f})"
        )
        rows.append(row)
    row = chunking()
    speeds = row["tokens"] / np.array(row["seconds"]) / 1e6
    print(
        f"cdc, window 32: {np.median(speeds):.1f} million tokens/s "
        f"({speeds.min():.1f} to {speeds.max():.1f})"
    )
    rows.append(row)
    where = {"time": time.time(), "cpu": cpu_name(), "commit": git_commit()}
    where |= {name: version(name) for name in ("numpy", "numba")}
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as file:
        file.writelines(json.dumps(row | where) + "\n" for row in rows)


if __name__ == "__main__":
    main()
