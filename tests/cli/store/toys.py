"""Small stores for the tests of `lmc store`, and what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np

from lmc.chunking.pieces import chunk_key
from lmc.cli.store.inspect import Entry, entries, existing
from lmc.model.layout import KVLayout
from lmc.store.disk.read import known, read_rows
from lmc.store.disk.tier import Disk
from lmc.store.record import Origin, Record
from tests.cli import shell

CAPACITY = 4 << 20
FLOAT = KVLayout(L=3, G=2, D=16, dtype="float32")
BFLOAT = KVLayout(L=2, G=1, D=32, dtype="bfloat16")
A, B = b"a tenant", b"another"
# What is put where: namespace, layout, codec, ranks.
PUTS = [(A, FLOAT, "none", 1), (A, FLOAT, "int8", 1), (B, BFLOAT, "shuffle_zstd", 2)]


def invoke(*args: object) -> tuple[int, str, str]:
    return shell.invoke("store", *args)


def answer(*args: object) -> Any:
    return shell.answer("store", *args)


def chunk(seed: int, layout: KVLayout, namespace: bytes, **changes: Any) -> tuple[Record, list]:
    """A record of 30 to 39 tokens and its rows, of plausible values."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 50_000, 30 + seed % 10)
    record = Record(
        slot=-1,
        namespace=namespace,
        key=chunk_key(namespace, ids),
        tokens=ids.astype("<i8").tobytes(),
        start=seed,
        context=rng.bytes(32),
        context_after=rng.bytes(32),
        nbytes=len(ids) * layout.bytes_per_token,
        **{"origin": get_args(Origin)[seed % 4], "tail": False, **changes},
    )
    values = rng.standard_normal(layout.shape(len(ids)), np.float32).view("<u4")
    rows = values.view("<u2")[..., 1::2] if layout.dtype == "bfloat16" else values
    return record, [np.ascontiguousarray(rows).view(np.uint8).reshape(layout.L, 2, len(ids), -1)]


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Disk]:
    disk = Disk(path, CAPACITY, **options)
    try:
        yield disk
    finally:
        disk.close()


def fill(path: Path) -> None:
    """8 chunks of two tenants in each way of `PUTS`; the first of each was read once."""
    for i, (namespace, layout, codec, ranks) in enumerate(PUTS):
        chunks = [chunk(100 * i + j, layout, namespace) for j in range(7)]
        chunks.append(chunk(100 * i + 7, layout, namespace, origin="exact", tail=True))
        for rank in range(ranks):
            with opened(
                path, layout=layout, compression=codec, shard=rank, shards=ranks, label=f"toy {i}"
            ) as disk:
                assert all(disk.put(chunks))
                assert disk.get(chunks[0][0]) is not None


def contents(path: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """By id: what is known of a record that does not depend on its place, and its KV."""
    found = {}
    folder = existing(path)
    for entry in entries(folder):
        facts = entry.facts()
        for name in ("segment", "stored_bytes", "codec", "hits", "last_read"):
            del facts[name]
        record = entry.header.record
        told = (record.key, record.tokens, record.context, record.context_after, entry.header.error)
        found[facts["id"]] = (facts | {"told": told}, entry)
    folder.close()
    out = {}
    for rank in {(facts["shard"], facts["shards"]) for facts, _ in found.values()}:
        with opened(path, shard=rank[0], shards=rank[1]) as disk:
            for id, (facts, entry) in found.items():
                if (facts["shard"], facts["shards"]) == rank:
                    out[id] = facts, _read(disk, entry)
    return out


def _read(disk: Disk, entry: Entry) -> bytes:
    """Past `Disk.get`, which takes a namespace and not its digest."""
    parts = read_rows(
        disk.folder.segments, entry.located, known(entry.located.header), None, None, lambda n: None
    )
    return b"".join(part.tobytes() for part in parts)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def place(path: Path, id: str) -> tuple[Path, int, int]:
    """The file of a record, and where in it its header and its payload begin."""
    folder = existing(path)
    located = folder.catalog.locate(bytes.fromhex(id))
    assert located is not None
    folder.close()
    payload = located.at + located.unpack().payload_at
    return path / "segments" / f"{located.segment:08d}.seg", located.at, payload
