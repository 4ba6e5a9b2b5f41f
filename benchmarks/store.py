"""The disk tier beside memcpy, checksum and raw file I/O: speed, readers and churn.

    python benchmarks/store.py --plot store.png

prints a table and appends a row for each line to benchmarks/results/store.jsonl. In every round
each arm does the same chunks once, in another order each round; what is compared are the ratios
within a round, with a bootstrap interval over the rounds. The best raw method is the one of the
lowest median time. Above 1 the tier is faster than what it is compared with.

Sections of a MiB have digests of their own. Layers are those of SmolLM2-135M in float32 (2 of them
for the smallest chunks, where 30 would make a token larger than the chunk).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from store_arms import (
    OUT,
    READER_CHUNK,
    READERS,
    SIZES,
    Arm,
    Chunks,
    Item,
    Raw,
    line,
    record,
    rounds,
    seconds,
)
from xxhash import xxh3_128_digest

from lmc.results.rows import cpu_name, git_commit
from lmc.store.disk.header import padded
from lmc.store.disk.segments import aligned
from lmc.store.disk.tier import Disk
from lmc.store.record import Record
from lmc.store.sections import Section
from lmc.store.writer import TOGETHER


def drop(disk: Disk, folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    disk.folder.segments.close()  # what is mapped would stay
    for path in folder.rglob("*"):
        if path.suffix in (".seg", ".raw"):
            fd = os.open(path, os.O_RDONLY)
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def cold(disk: Disk, folder: Path, call: Callable[[], object]) -> float:
    """Seconds of a call that finds nothing in the page cache."""
    drop(disk, folder)
    return seconds(call)


def warm(disk: Disk, items: Sequence[Item]) -> list[np.ndarray]:
    """Bring what is stored into the page cache; the bytes of each chunk there.

    Raises:
        RuntimeError: the machine takes them out of it again.
    """
    for _ in range(5):
        for path in (disk.folder.root / "segments").iterdir():
            path.read_bytes()
        views = []
        for item in items:
            found = disk.get(item[0])
            assert found is not None
            (rows,), (put,) = found[0].parts, item[1][0].parts
            assert np.array_equal(rows, put)
            views.append(rows.reshape(-1))
        if not any(view.flags.writeable for view in views):  # else it is a copy
            return views
    raise RuntimeError("the page cache does not keep what was read")


def stored(disk: Disk, items: Sequence[Item]) -> bool:
    """Whether all chunks are stored that are put."""
    return set(disk.put(items)) == {"stored"}


def get_all(disk: Disk, items: Sequence[Item], into: np.ndarray | None = None) -> None:
    """Get every chunk, as views or to its own place in `into`."""
    for i, (rec, ((form, _),)) in enumerate(items):
        place = None
        if into is not None:
            place = [Section(form, [into[i, : rec.nbytes].reshape(form.shape)])]
        assert disk.get(rec, place) is not None


def reads(chunks: Chunks, folder: Path, n: int) -> Iterator[dict[str, Any]]:
    """Warm and cold gets of one chunk size."""
    disk = Disk(folder / "store", 1 << 30, layout=chunks.layout)
    items = chunks.items(0)
    for i in range(0, len(items), TOGETHER):
        assert stored(disk, items[i : i + TOGETHER])
    # What one request asks for was stored by many others.
    order = np.random.default_rng(0).permutation(len(items)).tolist()
    items = [items[i] for i in order]
    into = aligned(chunks.pages.nbytes).reshape(chunks.pages.shape)

    raws = {
        "O_DIRECT pread": Raw(folder / "direct.raw", direct=True),
        "buffered pread": Raw(folder / "buffered.raw", direct=False),
    }
    for raw in raws.values():
        raw.append([chunks.pages])

    arms: dict[str, Arm] = {
        name: partial(cold, disk, folder, partial(raw.read, into, order))
        for name, raw in raws.items()
    }
    arms["get"] = partial(cold, disk, folder, partial(get_all, disk, items, into))
    yield line("cold get into", "get", list(raws), rounds(arms, n), chunks, len(items), 0.8)

    views = warm(disk, items)

    def copied(check: bool) -> None:
        for view, place in zip(views, into, strict=True):
            np.copyto(place[: view.nbytes], view)
            if check:
                xxh3_128_digest(place[: view.nbytes].data)

    def checked() -> None:
        for view in views:
            xxh3_128_digest(view.data)

    calls = {
        "checksum": checked,
        "memcpy": partial(copied, False),
        "memcpy, checksum": partial(copied, True),
        "get": partial(get_all, disk, items),
        "get into": partial(get_all, disk, items, into),
    }
    times = rounds({name: partial(seconds, call) for name, call in calls.items()}, 2 * n)
    yield line("warm get", "get", ["checksum"], times, chunks, len(items), 0.8)
    yield line("warm get into", "get into", ["memcpy, checksum"], times, chunks, len(items))
    disk.close()


def put(disk: Disk, chunks: Chunks, size: int, count: int, seeds: Iterator[int]) -> float:
    """Seconds of putting `count` chunks in groups, as new ones."""
    items = chunks.items(next(seeds), count)
    groups = [items[i : i + size] for i in range(0, count, size)]
    start = time.perf_counter()
    for group in groups:
        assert stored(disk, group)
    return time.perf_counter() - start


def puts(chunks: Chunks, folder: Path, n: int) -> Iterator[dict[str, Any]]:
    """Durable puts of one chunk size, in groups and alone."""
    for size in (min(TOGETHER, len(chunks.pages)), 1):
        count = (
            len(chunks.pages)
            if size > 1
            else min(len(chunks.pages), max(8, len(chunks.pages) // 8))
        )
        groups = [chunks.pages[i : i + size] for i in range(0, count, size)]
        allocated = (n + 1) * chunks.pages.nbytes
        place = folder / f"by{size}"
        place.mkdir()
        disk = Disk(place / "store", 16 << 30, layout=chunks.layout)
        raws = {
            "O_DIRECT pwritev": Raw(place / "a.raw", direct=True),
            "O_DIRECT pwritev, allocated": Raw(place / "b.raw", direct=True, allocated=allocated),
            "buffered pwritev": Raw(place / "c.raw", direct=False),
            "buffered pwritev, allocated": Raw(place / "d.raw", direct=False, allocated=allocated),
        }
        arms: dict[str, Arm] = {
            name: partial(seconds, partial(raw.append, groups)) for name, raw in raws.items()
        }
        arms["put"] = partial(put, disk, chunks, size, count, iter(range(1, n + 2)))
        kind = f"durable put by {size}"
        target = 0.8 if size > 1 else None
        times = rounds(arms, n)
        yield line(kind, "put", list(raws), times, chunks, count, target, group=size)
        disk.close()
        shutil.rmtree(place)


def reader(folder: Path, chunks: Chunks, mine: Sequence[Item], pipe: Connection) -> None:
    """A process that reads its chunks whenever it is told how."""
    disk = Disk(folder, 1 << 30, layout=chunks.layout)
    into = aligned(len(mine) * chunks.pages.shape[1]).reshape(len(mine), -1)
    while (how := pipe.recv()) != "end":
        if how == "forget":
            disk.folder.segments.close()
        else:
            get_all(disk, mine, into if how == "cold" else None)
        pipe.send(how)
    disk.close()


def readers(folder: Path, n: int) -> Iterator[dict[str, Any]]:
    """One, two and four threads and processes, each with its share of the chunks."""
    chunks = Chunks.of(READER_CHUNK)
    items = chunks.items(0)
    store = folder / "store"
    disk = Disk(store, 1 << 30, layout=chunks.layout)
    assert stored(disk, items)
    disk.close()
    fork = multiprocessing.get_context("fork")
    # For each number of readers its own processes, forked before the store is open here.
    pipes: dict[int, list[Connection]] = {}
    processes = []
    for k in READERS:
        pipes[k] = []
        for i in range(k):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=reader, args=(store, chunks, items[i::k], theirs))
            process.start()
            processes.append(process)
            pipes[k].append(ours)
    disk = Disk(store, 1 << 30, layout=chunks.layout)
    into = aligned(chunks.pages.nbytes).reshape(chunks.pages.shape)

    def tell(to: Sequence[Connection], what: str) -> None:
        for pipe in to:
            pipe.send(what)
        for pipe in to:
            pipe.recv()

    def by_threads(pool: ThreadPoolExecutor, k: int, how: str) -> None:
        places = [into[i::k] if how == "cold" else None for i in range(k)]
        list(pool.map(lambda i: get_all(disk, items[i::k], places[i]), range(k)))

    def timed(how: str, call: Callable[[], object]) -> float:
        if how == "warm":
            return seconds(call)
        tell(every, "forget")
        return cold(disk, store, call)

    pools = {k: ThreadPoolExecutor(k) for k in READERS}
    every = [pipe for some in pipes.values() for pipe in some]
    for how in ("cold", "warm"):
        if how == "warm":
            warm(disk, items)

        arms: dict[str, Arm] = {}
        for k in READERS:
            arms[f"{k} threads"] = partial(timed, how, partial(by_threads, pools[k], k, how))
            arms[f"{k} processes"] = partial(timed, how, partial(tell, pipes[k], how))
        times = rounds(arms, n)
        for unit in ("threads", "processes"):
            for k in READERS[1:]:
                kind = f"{how}, {k} {unit}"
                yield line(kind, f"{k} {unit}", [f"1 {unit}"], times, chunks, len(items))
    for pipe in every:
        pipe.send("end")
    for process in processes:
        process.join()
    disk.close()


def churn(folder: Path, how: str) -> dict[str, Any]:
    """Bytes written per byte put, in a folder that is as full as it gets.

    how: `lru`, where half of the gets go to any chunk that is held, or `random`, where chunks
        that leave are drawn before each put.
    """
    chunks = Chunks.of(256 << 10)
    capacity = 96 << 20
    disk = Disk(folder / how, capacity, layout=chunks.layout)
    rng = np.random.default_rng(0)
    held: list[Record] = []
    before = disk.counts.copy()
    took: list[float] = []
    settled = 3 * capacity // chunks.nbytes
    for i in range(2 * settled):
        if i == settled:
            before = disk.counts.copy()
            took.clear()
        new = record(rng, chunks.T, chunks.nbytes)
        if how == "random":
            while disk.room.limit < (len(held) + 1) * (chunks.nbytes + 2 * padded(1)):
                disk.evict([held.pop(int(rng.integers(len(held))))])
        elif held:
            disk.get(held[int(rng.integers(len(held)))])
        took.append(seconds(partial(disk.put, [(new, chunks.sections(chunks.pages[i % 64]))])))
        held.append(new)
        if how == "lru" and i % 16 == 0:
            held = [r for r, there in zip(held, disk.contains(held), strict=True) if there]
    counts = {name: disk.counts[name] - before[name] for name in disk.counts}
    live = sum(use.live for use in disk.folder.catalog.segments().values())
    row = {
        "kind": "churn", "how": how, "capacity": capacity, "chunk_bytes": chunks.nbytes,
        "puts": counts["puts"], "written_per_byte_put":
            1 + counts.get("bytes_compacted", 0) / counts["bytes_written"],
        "occupancy": live / capacity, "counts": counts, "seconds": took,
    }  # fmt: skip
    print(
        f"churn, {how:6}: {row['written_per_byte_put']:.2f} bytes written a byte put, at "
        f"{row['occupancy']:.0%} occupancy; put median {np.median(took) * 1e3:.1f} ms, "
        f"99% {np.percentile(took, 99) * 1e3:.1f} ms"
    )
    disk.close()
    return row


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Ratios over chunk size, a panel for reads and writes each."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    reads_ = ["warm get", "warm get into", "cold get into"]
    panels = (reads_, ["durable put by"])
    for axis, kinds in zip(axes, panels, strict=True):
        for kind in kinds:
            alone = [r for r in rows if r["kind"] == kind]
            together = [r for r in rows if r["kind"].startswith(kind) and r.get("group", 0) > 1]
            single = [r for r in rows if r.get("group") == 1 and r["kind"].startswith(kind)]
            for name, found in ((kind, alone), ("put, groups", together), ("put, alone", single)):
                if found:
                    values = np.array([r["ratio"] for r in found])
                    error = np.abs(values[:, 1:] - values[:, :1]).T
                    sizes = [r["chunk_bytes"] for r in found]
                    axis.errorbar(sizes, values[:, 0], error, marker="o", capsize=2, label=name)
        axis.axhline(0.8, color="grey", linestyle=":")
        axis.set(xlabel="bytes of a chunk", ylim=(0, None))
        axis.semilogx(base=2)
        axis.legend()
    axes[0].set_ylabel("speed over what it is compared with")
    figure.savefig(file)


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("                          KiB  us/chunk   GiB/s  beside  ratio  95%")
    with tempfile.TemporaryDirectory(prefix="lmc-store-", dir=options.folder) as name:
        folder = Path(name)
        for size in options.sizes:
            for part in (reads, puts):
                here = folder / f"{part.__name__}-{size}"
                here.mkdir()
                rows += part(Chunks.of(size), here, options.rounds)
                shutil.rmtree(here)
        here = folder / "readers"
        here.mkdir()
        rows += readers(here, options.rounds)
        rows += [churn(folder, how) for how in ("lru", "random")]
    if options.plot:
        draw(rows, options.plot)
    where = {"time": time.time(), "cpu": cpu_name(), "commit": git_commit()}
    where |= {name: version(name) for name in ("numpy", "xxhash", "lmdb")}
    where["load"] = os.getloadavg()
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as file:
        file.writelines(json.dumps(row | where) + "\n" for row in rows)


if __name__ == "__main__":
    main()
