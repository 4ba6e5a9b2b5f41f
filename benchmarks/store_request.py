"""What a request costs the threads that serve it: plan, adopt and ask, without the copies.

    python benchmarks/store_request.py

A folder holds 10,000 chunks of other prompts beside those of the one asked for, 1,616 tokens in
eight documents or cut by content. In every round each way of serving it is timed once, in another
order; printed are medians over the rounds in milliseconds. Bytes are fetched, and written, by other
threads, which are waited for outside the timing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmc.blend import STRATEGIES
from lmc.blend.plan import Plan, make_plan
from lmc.blend.strategy import Strategy
from lmc.chunking import CHUNKERS
from lmc.chunking.pieces import Piece, split
from lmc.model.layout import KVLayout
from lmc.results.rows import git_commit
from lmc.store.chunks import Chunks
from lmc.store.directory import Directory
from lmc.store.disk.tier import Disk
from lmc.store.index import Index
from lmc.store.keep import keep
from lmc.store.sections import Section, full_attention
from lmc.store.tier import Attached

LAYOUT = KVLayout(L=2, G=1, D=64, dtype="float32")  # bytes are not what is timed
NAMESPACE = b"benchmark"
OUT = Path(__file__).parent / "results" / "store_request.jsonl"
SYSTEM, DOCUMENT, QUESTION = 48, 256, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--others", type=int, default=10_000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = []
    names = ("plan, no disk", "plan, memory", "plan, disk", "adopt, ask")
    print(f"{'ms':10}{'chunks':>8}" + "".join(f"{name:>15}" for name in names))
    for name in ("documents", "cdc"):
        with tempfile.TemporaryDirectory(prefix="lmc-request-") as folder:
            disk = Disk(Path(folder) / "kv", 8 << 30, layout=LAYOUT)
            fill(disk, options.others, rng)
            chunks, *times = measured(disk, name, options.rounds, rng)
            disk.close()
        print(
            f"{name:14}{chunks:8}{times[0]:15.2f}{times[1]:14.2f}{times[2]:12.2f}{times[3]:12.2f}"
        )
        keys = ("plan_no_disk_ms", "plan_memory_ms", "plan_disk_ms", "adopt_ms")
        row = {"benchmark": "store_request", "commit": git_commit(), "cut": name, "chunks": chunks}
        rows.append(row | dict(zip(keys, times, strict=True)))
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def measured(
    disk: Disk, name: str, rounds: int, rng: np.random.Generator
) -> tuple[int, float, float, float, float]:
    """Chunks of the prompt, and milliseconds.

    They are to plan out of memory without a disk and with one behind, out of the disk, and to make
    room for what the disk has and ask for it.
    """
    documents = [rng.integers(0, 49152, DOCUMENT) for _ in range(6)]
    system, question = rng.integers(0, 49152, SYSTEM), rng.integers(0, 49152, QUESTION)
    for document in documents:
        save(disk, *pieces_of([system, document], name))
    order = rng.permutation(6)
    tokens, pieces = pieces_of([system, *(documents[i] for i in order), question], name)
    strategy = STRATEGIES.build({"name": "epic", "link_tokens": 16})
    taken: dict[str, list[float]] = {"alone": [], "memory": [], "disk": [], "adopt": []}
    chunks = Chunks(LAYOUT, 64 << 20, [Attached(disk, "through")])
    directory = Directory([disk], 60.0)
    segments: Sequence[object] = ()
    for _ in range(rounds):
        index = Index(64 << 20)
        start = time.perf_counter()
        plan = planned(tokens, pieces, index, strategy, directory)
        taken["disk"].append(time.perf_counter() - start)
        segments = plan.found
        start = time.perf_counter()
        adopted = [index.adopt(s.record) for s in plan.found]
        records = [record for record in adopted if record is not None]
        for record in records:
            index.lease(record.slot)
            chunks.expect(record)
        chunks.fetch([record.slot for record in records])
        taken["adopt"].append(time.perf_counter() - start)
        for record in records:
            if arrival := chunks.arrival(record.slot):
                arrival.wait(None, time.monotonic() + 60)
            index.acknowledge(record.slot, 0)
        start = time.perf_counter()
        planned(tokens, pieces, index, strategy, directory)
        taken["memory"].append(time.perf_counter() - start)
        start = time.perf_counter()
        make_plan(tokens, pieces, index, NAMESPACE, strategy)
        taken["alone"].append(time.perf_counter() - start)
        for record in records:
            chunks.memory.release(record.slot)
    directory.close(tiers=False)
    chunks.drain()
    medians = [1000 * float(np.median(taken[what])) for what in taken]
    return len(segments), medians[0], medians[1], medians[2], medians[3]


def planned(
    tokens: np.ndarray,
    pieces: Sequence[Piece],
    index: Index,
    strategy: Strategy,
    directory: Directory,
) -> Plan:
    """A plan, the disk asked for what it has until no question is open."""
    asked = None
    while asked is None or asked.unasked:
        asked = directory.ask(NAMESPACE, tokens, pieces, asked)
        asked.wait(asked.deadline)
        plan = make_plan(tokens, pieces, index, NAMESPACE, strategy, tiers=asked.answers)
    return plan


def pieces_of(parts: Sequence[np.ndarray], name: str) -> tuple[np.ndarray, list[Piece]]:
    tokens = np.concatenate(parts)
    ends = np.cumsum([len(part) for part in parts]).tolist()
    spans = list(zip([0, *ends], ends, strict=False)) if name == "documents" else None
    return tokens, split(tokens, CHUNKERS.build("cdc"), spans)


def save(disk: Disk, tokens: np.ndarray, pieces: Sequence[Piece]) -> None:
    kept = keep(Index(1 << 30), NAMESPACE, tokens, pieces, None, LAYOUT.bytes_per_token)
    forms = [full_attention(LAYOUT, record.T) for _, record in kept]
    items = [
        (record, [Section(form, [np.zeros(form.shape, np.uint8)])])
        for (_, record), form in zip(kept, forms, strict=True)
    ]
    assert set(disk.put(items)) <= {"stored", "known"}


def fill(disk: Disk, n: int, rng: np.random.Generator) -> None:
    """Chunks of other prompts."""
    for _ in range(0, n, 500):
        tokens = rng.integers(0, 49152, 500 * 16)
        save(disk, tokens, [Piece(i, i + 16) for i in range(0, len(tokens), 16)])


if __name__ == "__main__":
    main()
