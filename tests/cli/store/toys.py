"""Small stores for the tests of `lmc store`, and what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from lmc.chunking.pieces import chunk_key
from lmc.cli.store.inspect import entries, existing
from lmc.cli.store.transfer import _read
from lmc.model.layout import KVLayout
from lmc.store.disk.tier import Disk
from lmc.store.record import Origin, Record
from lmc.store.sections import Form, Section, full_attention
from tests.cli import shell
from tests.store.disk.chunks import heads_of

CAPACITY = 4 << 20
FLOAT = KVLayout(L=3, G=2, D=16, dtype="float32")
BFLOAT = KVLayout(L=2, G=2, D=16, dtype="bfloat16")
A, B = b"a tenant", b"another"
# What is put where: namespace, layout, codec, ranks.
PUTS = [(A, FLOAT, "none", 1), (A, FLOAT, "int8", 1), (B, BFLOAT, "shuffle_zstd", 2)]


def invoke(*args: object) -> tuple[int, str, str]:
    return shell.invoke("store", *args)


def answer(*args: object) -> Any:
    return shell.answer("store", *args)


def chunk(
    seed: int, layout: KVLayout, namespace: bytes, **changes: Any
) -> tuple[Record, list[Section]]:
    """A record of 30 to 39 tokens and its section, of plausible values."""
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
    form = full_attention(layout, len(ids))
    return record, [Section(form, [np.ascontiguousarray(rows).view(np.uint8).reshape(form.shape)])]


def windowed(seed: int) -> tuple[Record, list[Section]]:
    """A record of two groups: full attention, and a window over the last tokens."""
    record, sections = chunk(seed, FLOAT, A, origin="exact")
    form = Form(1, "kv", (0, 1, 1), (record.T - 9, record.T), 1, 8, "float16")
    data = np.random.default_rng(seed).integers(0, 60, form.nbytes, dtype=np.uint8)
    return record, [*sections, Section(form, [data.reshape(form.shape)])]


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
        each = layout.G // ranks
        of_rank = replace(layout, G=each)
        for rank in range(ranks):
            heads = (rank * each, (rank + 1) * each, layout.G)
            items = [(record, heads_of(kv, rank, ranks)) for record, kv in chunks]
            with opened(
                path, layout=of_rank, heads=heads, compression=codec, label=f"toy {i}"
            ) as disk:
                assert stored(disk, items)
                assert disk.get(chunks[0][0]) is not None


def stored(disk: Disk, items: list[tuple[Record, list[Section]]]) -> bool:
    """Put them; whether all of them are stored now."""
    return disk.put(items) == ["stored"] * len(items)


def contents(path: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """By id: what is known of a part that does not depend on its place, and its KV."""
    found = {}
    folder = existing(path)
    for entry in entries(folder):
        facts = entry.facts()
        for name in ("segment", "stored_bytes", "codec", "hits", "last_read"):
            del facts[name]
        record = entry.header.record
        told = (record.key, record.tokens, record.context, record.context_after)
        facts |= {"told": (*told, entry.header.part.error)}
        sections = _read(folder, entry, entry.located)
        assert sections is not None
        found[facts["id"]] = facts, b"".join(kv.parts[0].tobytes() for kv in sections)
    folder.close()
    return found


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
