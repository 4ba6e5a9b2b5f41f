"""How soon a folder of 10,000 chunks is indexed and served again, in a new process.

    python benchmarks/store_reopen.py

After a clean end the index is compared with its digest; after a crash it is made anew from the
headers of the records. In every round both are done once, each in a process of its own, and every
chunk is looked up and read as a verified view. The page cache has the files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lmc.chunking.pieces import Piece
from lmc.model.layout import KVLayout
from lmc.results.rows import git_commit
from lmc.store import Index, Record
from lmc.store.disk.tier import Disk
from lmc.store.keep import keep
from lmc.store.sections import Section, full_attention

LAYOUT = KVLayout(L=2, G=1, D=64, dtype="float32")  # 1 KiB a token
NAMESPACE = b"benchmark"
OUT = Path(__file__).parent / "results" / "store_reopen.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=16, help="of a chunk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--again", type=Path, help="what the new process does; not for people")
    options = parser.parse_args()
    if options.again:
        print(json.dumps(again(options)))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="lmc-reopen-", dir=Path(__file__).parent) as work:
        folder = Path(work) / "kv"
        disk = opened(folder)
        for batch in records(options):
            form = full_attention(LAYOUT, options.tokens)
            items = [
                (record, [Section(form, [np.full(form.shape, i % 251, np.uint8)])])
                for i, record in enumerate(batch)
            ]
            assert set(disk.put(items)) == {"stored"}
        disk.close()
        for segment in (folder / "segments").iterdir():
            segment.read_bytes()
        for _ in range(options.rounds):
            for crashed in (False, True):
                if crashed:
                    (folder / "index" / "seal").unlink()
                command = [sys.executable, __file__, "--again", str(folder)]
                command += ["--chunks", str(options.chunks), "--tokens", str(options.tokens)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.append({"crashed": crashed, **json.loads(done.stdout)})
    print(f"{options.chunks} chunks of {options.tokens} KiB; medians and extremes in seconds")
    for crashed in (False, True):
        name = "after a crash" if crashed else "clean"
        of = [row for row in rows if row["crashed"] == crashed]
        cells = []
        for what in ("open_s", "serve_s", "total_s"):
            all_ = [row[what] for row in of]
            cells.append(f"{what[:-2]} {np.median(all_):.2f} [{min(all_):.2f}, {max(all_):.2f}]")
        print(f"{name:14}" + "   ".join(cells))
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        head = {"benchmark": "store_reopen", "commit": git_commit(), "chunks": options.chunks}
        out.writelines(json.dumps({**head, **row}) + "\n" for row in rows)


def again(options: argparse.Namespace) -> dict[str, float]:
    """Open, find and read everything."""
    wanted = [record for batch in records(options) for record in batch]
    start = time.perf_counter()
    disk = opened(options.again)
    opened_s = time.perf_counter() - start
    until = time.monotonic() + 600
    for record in wanted:
        ((found,),), _ = disk.lookup_many(NAMESPACE, [record.key], [], until)
        assert disk.get(found) is not None
    total_s = time.perf_counter() - start
    disk.close()
    return {"open_s": opened_s, "serve_s": total_s - opened_s, "total_s": total_s}


def opened(folder: Path) -> Disk:
    return Disk(folder, 4 << 30, layout=LAYOUT)


def records(options: argparse.Namespace) -> list[list[Record]]:
    """In batches of 500; the same ones in every process."""
    rng, T = np.random.default_rng(0), options.tokens
    batches = []
    for first in range(0, options.chunks, 500):
        n = min(500, options.chunks - first)
        pieces = [Piece(i * T, (i + 1) * T) for i in range(n)]
        ids = rng.integers(0, 49152, n * T)
        kept = keep(Index(1 << 40), NAMESPACE, ids, pieces, None, LAYOUT.bytes_per_token)
        batches.append([record for _, record in kept])
    return batches


if __name__ == "__main__":
    main()
