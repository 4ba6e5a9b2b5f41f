"""A folder of very many records: to open it, to make its index again, to put, to evict, to look up.

    python benchmarks/store_scale.py --records 100000

prints a line for each and appends them to benchmarks/results/store_scale.jsonl. Records are as
small as they get, 8 KiB of 64 tokens, since what is measured is what each of them costs, not their
bytes. Nothing beside runs in the same process; a million takes minutes.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmc.chunking.pieces import Piece
from lmc.model.layout import KVLayout
from lmc.results.rows import cpu_name, git_commit
from lmc.store import Index, Record
from lmc.store.disk.room import OCCUPANCY
from lmc.store.disk.tier import Disk
from lmc.store.keep import keep
from lmc.store.sections import Section, full_attention
from lmc.store.store import Store

LAYOUT = KVLayout(L=1, G=1, D=4, dtype="float32")
NAMESPACE = b"benchmark"
T = 64  # tokens of a chunk
RECORD_BYTES = 8 << 10
BATCH = 500  # chunks of a prompt, put together
PROMPT = 2000  # chunks of the prompt that is looked up: 128,000 tokens
FORM = full_attention(LAYOUT, T)
ROWS = Section(FORM, [np.zeros(FORM.shape, np.uint8)])
OUT = Path(__file__).parent / "results" / "store_scale.jsonl"
Line = tuple[str, float, str]  # what, how much, of what


def tokens(seed: int, chunks: int) -> np.ndarray:
    """A prompt that no other seed gives."""
    return np.random.default_rng(seed).integers(0, 150_000, chunks * T)


def records(ids: np.ndarray) -> list[Record]:
    """The chunks of a prompt."""
    pieces = [Piece(i, i + T) for i in range(0, len(ids), T)]
    kept = keep(Index(1 << 50), NAMESPACE, ids, pieces, None, LAYOUT.bytes_per_token)
    return [record for _, record in kept]


def put(disk: Disk, ids: np.ndarray) -> float:
    """Seconds to put a prompt's chunks."""
    new = [(record, [ROWS]) for record in records(ids)]
    start = time.perf_counter()
    disk.put(new)
    return time.perf_counter() - start


def memory_mib() -> float:
    """Of this process, now, without the pages of files that it has mapped."""
    resident, shared = (int(n) for n in Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * resource.getpagesize() / 2**20


def measured(folder: Path, n: int) -> Iterator[Line]:
    """The lines of a folder of `n` records."""
    capacity = int((n + 5 * BATCH) * RECORD_BYTES / OCCUPANCY) + (1 << 20)
    before = memory_mib()
    disk = Disk(folder, capacity, layout=LAYOUT)
    took = [put(disk, tokens(1, PROMPT))]
    took += [put(disk, tokens(2 + i, BATCH)) for i in range((n - PROMPT) // BATCH)]
    held = len(disk.folder.catalog)
    yield "records", held, ""
    yield "put", 1e6 * sum(took) / held, "us a record"
    yield "memory, all put by this process", memory_mib() - before, "MiB"
    disk.close()
    yield "index", (folder / "index" / "data.mdb").stat().st_size / held, "bytes a record"

    start = time.perf_counter()
    disk = Disk(folder, capacity, layout=LAYOUT)
    yield "open after a clean end", time.perf_counter() - start, "s"
    disk.close()

    store = Store(
        LAYOUT, NAMESPACE, memory_bytes=1 << 30, chunker={"name": "fixed", "n": T},
        tiers=[{"name": "disk", "path": str(folder), "capacity": capacity}],
    )  # fmt: skip
    for what, seed, there in (("all on disk", 1, PROMPT), ("none known", 0, 0)):
        ids, best = tokens(seed, PROMPT), float("inf")
        for _ in range(3):
            start = time.perf_counter()
            found = store.lookup(ids)
            best = min(best, time.perf_counter() - start)
            assert len(found) == there
        yield f"lookup of {len(ids):,} tokens, {what}", 1000 * best, "ms"
    store.close()

    disk = Disk(folder, capacity, layout=LAYOUT)
    before, i = memory_mib(), 1 << 30
    first = 0.0
    while not disk.counts["evicted"]:
        first = put(disk, tokens(i := i + 1, BATCH))
    yield "the put that evicts first", first, "s"
    yield (
        "the worst put of 20 more",
        max(put(disk, tokens(i + j, BATCH)) for j in range(1, 21)),
        "s",
    )
    yield "memory for eviction", memory_mib() - before, "MiB"
    yield "put failed", sum(v for k, v in disk.counts.items() if k.startswith("put_failed")), ""
    disk.close()

    (folder / "index" / "seal").unlink()
    start = time.perf_counter()
    disk = Disk(folder, capacity, layout=LAYOUT)
    yield "open after a crash", time.perf_counter() - start, "s"
    found = all_found(disk, tokens(i, BATCH))
    yield "until all of one prompt is found", time.perf_counter() - start, "s"
    assert found
    disk.close()


def all_found(disk: Disk, ids: np.ndarray) -> bool:
    """Whether all chunks of a prompt are found before long: an index may still be in the making."""
    wanted, until = records(ids), time.monotonic() + 600
    while not all(disk.contains(wanted)):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_argument("--records", type=int, default=100_000)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="lmc-scale-", dir=options.folder) as work:
        for what, value, unit in measured(Path(work) / "kv", options.records):
            print(f"{what:44} {value:12,.2f} {unit}", flush=True)
            rows.append({"what": what, "value": value, "unit": unit})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{'memory at most, pages of files too':44} {peak:12,.2f} MiB")
    rows.append({"what": "memory at most, pages of files too", "value": peak, "unit": "MiB"})
    where = {"benchmark": "store_scale", "records": options.records, "time": time.time()}
    where |= {"cpu": cpu_name(), "commit": git_commit()}
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as file:
        file.writelines(json.dumps(where | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
