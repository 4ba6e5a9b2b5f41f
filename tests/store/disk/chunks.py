"""Small chunks that can be made again from a few numbers, and what a folder of them holds."""

from __future__ import annotations

import os
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lmc.chunking.pieces import chunk_key
from lmc.model.layout import KVLayout
from lmc.store.disk.tier import Disk
from lmc.store.payload import head_bytes
from lmc.store.record import Origin, Record, superseded
from lmc.store.sections import Form, Rows, Section, complete, full_attention
from lmc.store.tier import Behind

LAYOUT = KVLayout(L=4, G=2, D=4, dtype="float32")  # 256 bytes a token
NAMESPACES = (b"model, salt of tenant 0", b"model, salt of tenant 1")
EXACT_VARIANTS = 2

# What a chunk consists of: full attention; the same, of which two ranks put one head each; full
# attention and a window of the last tokens; latents.
Kind = Literal["full", "ranks", "windowed", "latent"]
KINDS = get_args(Kind)


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
    kind: Kind = "full"

    @staticmethod
    def of(record: Record) -> Spec:
        """What a stored record was made of: its start says."""
        content, context, tenant = record.start >> 16, record.start >> 8 & 255, record.start & 63
        kind = KINDS[record.start >> 6 & 3]
        return Spec(content, context, record.T, record.origin, record.tail, tenant, kind)

    def forms(self) -> list[Form]:
        """Of its sections, all heads."""
        full = full_attention(LAYOUT, self.T)
        if self.kind == "windowed":
            window = Form(1, "kv", (0, 1, 1), (max(0, self.T - 8), self.T), 3, 6, "float16")
            return [full, window]
        if self.kind == "latent":
            return [Form(0, "latent", (0, 1, 1), (0, self.T), 5, 10, "bfloat16")]
        return [full]

    def record(self) -> Record:
        namespace = NAMESPACES[self.tenant]
        ids = np.random.default_rng(self.content).integers(0, 50_000, self.T)
        start = self.content << 16 | self.context << 8 | KINDS.index(self.kind) << 6 | self.tenant
        return Record(
            -1,
            namespace,
            chunk_key(namespace, ids),
            ids.astype("<i8").tobytes(),
            start,
            digest(self.tenant, self.context),
            digest(self.tenant, self.context, self.content, self.T),
            self.origin,
            sum(form.nbytes for form in self.forms()),
            self.tail,
        )

    def sections(self) -> list[Section]:
        """In one part each, which compress to about half; another spec's are others everywhere."""
        origin = (self.origin == "blended") << 1 | self.tail
        seed = [self.content, self.context, self.T, origin, self.tenant]
        rng = np.random.default_rng(seed)
        return [
            Section(form, [rng.integers(0, 16, form.nbytes, dtype=np.uint8).reshape(form.shape)])
            for form in self.forms()
        ]

    def rows(self) -> list[Rows]:
        """Those of the first section."""
        return [*self.sections()[0].parts]

    def item(self) -> tuple[Record, list[Section]]:
        """The chunk as one rank puts it that has all heads."""
        return self.record(), self.sections()

    def items(self) -> list[tuple[Record, list[Section]]]:
        """The chunk as those put it who do."""
        if self.kind != "ranks":
            return [self.item()]
        return [(self.record(), heads_of(self.sections(), rank, 2)) for rank in range(2)]


def heads_of(sections: Sequence[Section], rank: int, ranks: int) -> list[Section]:
    """What one of several ranks has of sections of all heads."""
    out = []
    for form, parts in sections:
        each = form.heads[2] // ranks
        of = form.of((rank * each, (rank + 1) * each, form.heads[2]))
        start, end = head_bytes(form, of)
        out.append(Section(of, [part[..., start:end] for part in parts]))
    return out


def empty(forms: Sequence[Form], fill: int = 255) -> list[Section]:
    """Sections to get into, full of something else."""
    return [Section(form, [np.full(form.shape, fill, np.uint8)]) for form in forms]


def digest(*numbers: int) -> bytes:
    """32 bytes that stand for a context."""
    return np.random.default_rng(numbers).bytes(32)


def random_spec(rng: random.Random, contents: int, T: int = 60) -> Spec:
    """One of few contents, of up to T tokens, in one of few contexts: some replace others."""
    content = rng.randrange(contents)
    tenant, kind = content % 2, KINDS[content // 2 % len(KINDS)]
    if rng.random() < 0.3:  # the tail of a context grows, as a conversation does
        return Spec(content, content % 256, rng.randrange(1, T), "exact", True, tenant, kind)
    origin: Origin = rng.choice(("exact", "exact", "exact", "isolated", "blended"))
    return Spec(content, rng.randrange(4), 1 + content * 7 % T, origin, False, tenant, kind)


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


def right(sections: Sequence[Section], spec: Spec) -> bool:
    """Whether sections are what was put, in the order that a tier without a wish gives."""
    want = spec.sections()
    return [form for form, _ in sections] == [form for form, _ in want] and all(
        np.array_equal(np.concatenate(list(got.parts), axis=2), all_of.parts[0])
        for got, all_of in zip(sections, want, strict=True)
    )


def opened(folder: Path, capacity: int = 64 << 20, **settings: Any) -> Disk:
    """The store under test, with all of its index."""
    settings = {"layout": LAYOUT, "exact_variants": EXACT_VARIANTS, **settings}
    disk = Disk(folder, capacity, **settings)
    disk.folder.settle()
    return disk


def put(disk: Disk, spec: Spec) -> bool:
    """Put a chunk as those do who have its heads; whether it is there, and was not before."""
    done = disk.put(spec.items())
    return "stored" in done and not {*done} - {"stored", "known"}


def held(disk: Disk) -> dict[bytes, Spec]:
    """What the index has whole, in the order of the puts, by the id of the record.

    Where a writer died between the parts of two ranks, and who came next put them with another
    origin, it is that of the part that was there first, as for the store.
    """
    headers = [located.unpack() for _, located in disk.folder.catalog.records()]
    headers.sort(key=lambda header: header.seq)
    forms: dict[bytes, list[Form]] = {}
    for header in headers:
        forms.setdefault(header.record.id, []).extend(header.forms)
    out: dict[bytes, Spec] = {}
    for header in headers:
        if complete(forms[header.record.id]):
            out.setdefault(header.record.id, Spec.of(header.record))
    return out


def find(disk: Disk, record: Record) -> list[Record]:
    """What the tier tells of a record's content."""
    return disk.lookup_many(record.namespace, [record.key], [], time.monotonic() + 60)[0][0]


def after(disk: Disk, record: Record, namespace: bytes | None = None) -> list[Record]:
    """What the tier tells of what stands where a record does."""
    behind = [Behind(record.context, record.tokens[:8])]
    namespace = namespace or record.namespace
    return disk.lookup_many(namespace, [], behind, time.monotonic() + 60)[1][0]


def part_of(disk: Disk, spec: Spec) -> bytes:
    """The id of a record's first part."""
    record = spec.record().id
    return next(id for id, _ in disk.folder.catalog.records() if id.startswith(record))


def served(disk: Disk, spec: Spec) -> bool | None:
    """Whether a get gives what was put; None when it gives nothing."""
    got = disk.get(spec.record())
    return None if got is None else right(got, spec)


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
