"""Tiers on servers beside what their own clients reach: puts and gets by chunk size.

    python benchmarks/remote.py --out benchmarks/results/remote.jsonl

A real Valkey and a real SeaweedFS are started on the loopback. In every round each arm moves the
same bytes, eight chunks a call, the arms in turned order: `client`, what the server's client
library does with bare values (redis-py: pipelines of SET and of GET; obstore: eight threads that
put and get); `tier`, puts and gets of lmc's tier, which names, checks and files them too; `memcpy`.
The first round of a size is left out. Prints medians of the rates and the ratio tier / client with
a bootstrap interval over rounds; appends a row a round.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import redis

from lmc.model.layout import KVLayout
from lmc.results.rows import cpu_name, git_commit
from lmc.results.statistics import bootstrap
from lmc.store.record import Record
from lmc.store.remote.keyed import Keyed
from lmc.store.remote.redis import RedisConfig
from lmc.store.remote.s3 import S3Config
from lmc.store.remote.s3_server import store_of
from lmc.store.sections import Section, full_attention
from lmc.store.tier import Wanted
from tests.store.remote.servers import seaweedfs, valkey

OUT = Path(__file__).parent / "results" / "remote.jsonl"
LAYOUT = KVLayout(L=32, G=8, D=128, dtype="bfloat16")  # 128 KiB a token: an 8B model
SIZES = (1, 8, 32, 128)  # tokens: 128 KiB, 1, 4 and 16 MiB
ROUND_BYTES = 64 << 20
TOGETHER = 8  # chunks of one call

Arm = tuple[Callable[[range], Any], Callable[[range], Any]]  # put and get of some chunks


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiers", nargs="+", default=("redis", "s3"), choices=("redis", "s3"))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="tokens of a chunk")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = [row for name in options.tiers for T in options.sizes
            for row in measured(name, T, options.rounds)]  # fmt: skip
    where = {"time": time.time(), "cpu": cpu_name(), "commit": git_commit()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as out:
        out.writelines(json.dumps({"benchmark": "remote"} | where | row) + "\n" for row in rows)


def measured(name: str, T: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one tier at one size; the first round is not among them."""
    nbytes, rows = T * LAYOUT.bytes_per_token, []
    n = max(2, ROUND_BYTES // nbytes)
    chunks = np.random.default_rng(T).integers(0, 256, (n, nbytes), dtype=np.uint8)
    for round_ in range(rounds + 1):
        arms = {"client": client(name, chunks), "tier": tier(name, chunks, T, round_),
                "memcpy": memcpy(chunks)}  # fmt: skip
        order = [*arms] if round_ % 2 else [*arms][::-1]
        for what in (0, 1):
            for arm in order:
                begun = time.perf_counter()
                for i in range(0, n, TOGETHER):
                    arms[arm][what](range(i, min(n, i + TOGETHER)))
                rate = n * nbytes / (time.perf_counter() - begun) / 2**30
                rows.append({"tier": name, "tokens": T, "nbytes": nbytes, "round": round_,
                             "arm": arm, "what": ("put", "get")[what], "gib_s": rate})  # fmt: skip
    rows = [row for row in rows if row["round"]]
    for what in ("put", "get"):
        told = [f"{name:6} {nbytes / 2**20:7.3f} MiB  {what}"]
        rates = {arm: by_round(rows, arm, what) for arm in ("client", "tier", "memcpy")}
        told += [f"{arm} {np.median(list(of.values())):6.2f} GiB/s" for arm, of in rates.items()]
        ratios = [[rates["tier"][r] / rates["client"][r]] for r in rates["tier"]]
        ratio = bootstrap(ratios, lambda sample: np.median(np.concatenate(sample)))
        assert ratio is not None
        told.append(f"tier/client {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
        print("  ".join(told), flush=True)
    return rows


def by_round(rows: list[dict[str, Any]], arm: str, what: str) -> dict[int, float]:
    """Rates by round."""
    return {r["round"]: r["gib_s"] for r in rows if (r["arm"], r["what"]) == (arm, what)}


def memcpy(chunks: np.ndarray) -> Arm:
    """From one piece of memory to another."""
    out = np.empty_like(chunks)

    def copy(some: range) -> None:
        for i in some:
            np.copyto(out[i], chunks[i])

    return copy, copy


def client(name: str, chunks: np.ndarray) -> Arm:
    """What the library does by itself, into memory that it makes."""
    if name == "redis":
        server = redis.Redis.from_url(valkey().url)

        def put(some: range) -> None:
            pipe = server.pipeline(transaction=False)
            for i in some:
                pipe.set(f"bare:{i}", chunks[i].data)
            pipe.execute()

        def get(some: range) -> None:
            pipe = server.pipeline(transaction=False)
            for i in some:
                pipe.get(f"bare:{i}")
            assert all(pipe.execute())

        return put, get
    store = store_of("lmc", "bare", seaweedfs().endpoint, 60.0)
    threads = ThreadPoolExecutor(TOGETHER)

    def put_one(i: int) -> None:
        obstore.put(store, str(i), chunks[i].tobytes())

    def get_one(i: int) -> None:
        assert obstore.get(store, str(i)).bytes()

    return (lambda some: all(threads.map(put_one, some)) or None,
            lambda some: all(threads.map(get_one, some)) or None)  # fmt: skip


def tier(name: str, chunks: np.ndarray, T: int, round_: int) -> Arm:
    """Puts and gets as workers make them, to where they are wanted."""
    config: Any = RedisConfig(valkey().url, timeout_s=60.0)
    if name == "s3":
        config = S3Config("s3://lmc/tier", seaweedfs().endpoint, valkey().url, timeout_s=60.0)
    opened: Keyed = config.open(LAYOUT)
    form = full_attention(LAYOUT, T)
    records = [record_of(i, T, round_) for i in range(len(chunks))]
    into = np.empty((TOGETHER, *form.shape), np.uint8)
    news = threading.Event()

    def put(some: range) -> None:
        items = [(records[i], [Section(form, [chunks[i].reshape(form.shape)])]) for i in some]
        outcomes = opened.put(items)
        assert outcomes == ["stored"] * len(some), (outcomes, opened.counts)

    def get(some: range) -> None:
        until = time.monotonic() + 60
        wanted = [Wanted(records[i], [Section(form, [into[i % TOGETHER]])], until, news.set)
                  for i in some]  # fmt: skip
        handles = opened.get_many(wanted)
        while not all(handle.poll().over for handle in handles):
            news.wait(0.001)
            news.clear()
        assert {handle.poll().over for handle in handles} == {"here"}, opened.counts

    return put, get


def record_of(i: int, T: int, round_: int) -> Record:
    """Another one for every round."""
    ids = np.full(T, i, "<i8")
    key, context = (bytes([i % 251, T % 251, round_, what]) * 8 for what in (1, 2))
    return Record(-1, b"bench", key, ids.tobytes(), 0, context, context, "exact", 0)


if __name__ == "__main__":
    main()
