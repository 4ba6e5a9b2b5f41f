"""Small chunks that can be made again from a few numbers, and what a folder of them holds."""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmc.chunking.pieces import chunk_key
from lmc.model.layout import KVLayout
from lmc.store.disk.tier import Disk
from lmc.store.record import Origin, Record, superseded
from lmc.store.tier import Rows

LAYOUT = KVLayout(L=4, G=1, D=8, dtype="float32")  # 256 bytes a token
NAMESPACES = (b"model, salt of tenant 0", b"model, salt of tenant 1")
EXACT_VARIANTS = 2


@dataclass(frozen=True)
class Spec:
    """All of a chunk: equal specs are equal chunks, in whatever process.

    Attributes:
        content: which tokens; those of fewer T begin those of more.
        context: which tokens came before, below 256.
    """

    content: int
    context: int
    T: int
    origin: Origin = "exact"
    tail: bool = False
    tenant: int = 0

    @staticmethod
    def of(record: Record) -> Spec:
        """What a stored record was made of: its start says."""
        content, context, tenant = record.start >> 16, record.start >> 8 & 255, record.start & 255
        return Spec(content, context, record.T, record.origin, record.tail, tenant)

    def record(self) -> Record:
        namespace = NAMESPACES[self.tenant]
        ids = np.random.default_rng(self.content).integers(0, 50_000, self.T)
        return Record(
            -1,
            namespace,
            chunk_key(namespace, ids),
            ids.astype("<i8").tobytes(),
            self.content << 16 | self.context << 8 | self.tenant,
            digest(self.tenant, self.context),
            digest(self.tenant, self.context, self.content, self.T),
            self.origin,
            self.T * LAYOUT.bytes_per_token,
            self.tail,
        )

    def rows(self) -> list[Rows]:
        """In one part, which compresses to about half; another spec's is another everywhere."""
        kind = (self.origin == "blended") << 1 | self.tail
        rng = np.random.default_rng([self.content, self.context, self.T, kind, self.tenant])
        data = rng.integers(0, 16, self.T * LAYOUT.bytes_per_token, dtype=np.uint8)
        return [data.reshape(LAYOUT.L, 2, self.T, -1)]

    def item(self) -> tuple[Record, list[Rows]]:
        return self.record(), self.rows()


def digest(*numbers: int) -> bytes:
    """32 bytes that stand for a context."""
    return np.random.default_rng(numbers).bytes(32)


def random_spec(rng: random.Random, contents: int, T: int = 60) -> Spec:
    """One of few contents, of up to T tokens, in one of few contexts: some replace others."""
    content = rng.randrange(contents)
    tenant = content % 2
    if rng.random() < 0.3:  # the tail of a context grows, as a conversation does
        return Spec(content, content % 256, rng.randrange(1, T), "exact", True, tenant)
    origin: Origin = rng.choice(("exact", "exact", "exact", "isolated", "blended"))
    return Spec(content, rng.randrange(4), 1 + content * 7 % T, origin, False, tenant)


def hold(known: dict[bytes, Spec], new: Spec) -> bool:
    """Put `new` where `known` is held, by id and in the order of the puts, as the contract says.

    Returns:
        Whether it is held then, and was not before.
    """
    record = new.record()
    same = []
    for spec in known.values():
        other = spec.record() if (spec.tenant, spec.tail) == (new.tenant, new.tail) else None
        if other and (other.context == record.context if new.tail else other.key == record.key):
            same.append(other)
    out = superseded(same, record, EXACT_VARIANTS)
    if out is None:
        return False
    for old in out:
        del known[old.id]
    known[record.id] = new
    return True


def right(rows: Sequence[Rows], spec: Spec) -> bool:
    """Whether rows are what was put."""
    return np.array_equal(np.concatenate(list(rows), axis=2), spec.rows()[0])


def opened(folder: Path, capacity: int = 64 << 20, **settings: Any) -> Disk:
    """The store under test, with all of its index."""
    disk = Disk(folder, capacity, layout=LAYOUT, exact_variants=EXACT_VARIANTS, **settings)
    disk.folder.settle()
    return disk


def held(disk: Disk) -> dict[bytes, Spec]:
    """What the index has, in the order of the puts, by the id of the record in any tier."""
    headers = [located.unpack() for _, located in disk.folder.catalog.records()]
    headers.sort(key=lambda header: header.seq)
    return {header.record.id: Spec.of(header.record) for header in headers}


def served(disk: Disk, spec: Spec) -> bool | None:
    """Whether a get gives what was put; None when it gives nothing."""
    rows = disk.get(spec.record())
    return None if rows is None else right(rows, spec)


def leaked(disk: Disk) -> int:
    """Bytes of files in the folder of segments that are more, or less, than the index knows."""
    known = {f"{n:08d}.seg": use.end for n, use in disk.folder.catalog.segments().items()}
    there = {e.name: e.stat().st_size for e in os.scandir(disk.folder.root / "segments")}
    return sum(abs(there.get(name, 0) - known.get(name, 0)) for name in there | known)


def live_bytes(disk: Disk) -> int:
    """Bytes of records that the index has."""
    return sum(use.live for use in disk.folder.catalog.segments().values())


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """A child at `work(pipe)`: its process id, and the end of the pipe that reads."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(out)
            work(into)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(into)
    return pid, out
