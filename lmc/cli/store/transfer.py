"""Chunks out of a store into one file, and from there into another store."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from lmc.cli.store import chunk_file
from lmc.cli.store.chunk_file import MOST_HEADER, MOST_TENSORS, Item, header_of, items_of
from lmc.cli.store.inspect import Entry, entries, settled
from lmc.store import wire
from lmc.store.disk import header as fmt
from lmc.store.disk.encode import Encoded
from lmc.store.disk.folder import Folder
from lmc.store.disk.header import Header, HeaderError
from lmc.store.disk.read import Damaged, Part, known, read_part
from lmc.store.disk.room import OCCUPANCY
from lmc.store.disk.segments import Located, aligned
from lmc.store.disk.tier import Disk
from lmc.store.payload import encode
from lmc.store.sections import Section

_BATCH_BYTES = 64 << 20
_LOSSLESS = ("none", "zstd", "shuffle_zstd")


@dataclass
class Exported:
    """What was written: records, bytes of their KV; left out: those damaged, and evicted since."""

    records: int = 0
    bytes: int = 0
    damaged: int = 0
    gone: int = 0


@dataclass
class Imported:
    """What was put: records, bytes of their KV; what adds nothing to the store; what failed."""

    records: int = 0
    bytes: int = 0
    known: int = 0
    failed: Counter[str] = field(default_factory=Counter)


def export_chunks(
    folder: Folder, out: Path, namespace: str | None = None, limit_bytes: int | None = None
) -> Exported:
    """Write records of a store to `out`, which is replaced when all is written.

    A record that does not match its digests is left out.

    Args:
        namespace: as `inspect.entries`.
        limit_bytes: of KV; the latest puts come first.

    Raises:
        ValueError: no record to write, or too many for one file.
        OSError: it cannot be written.
    """
    chosen = _latest(entries(folder, namespace), limit_bytes)
    if not chosen:
        raise ValueError("the store has no such records: nothing is exported")
    # Wider types first, so that each tensor lies at a multiple of its element.
    chosen.sort(key=lambda e: (all(f.dtype != "float32" for f in e.header.forms), e.header.seq))
    reserved = len(header_of([(e.header.part, e.header.seq, bytes(16)) for e in chosen]))
    tensors = sum(len(entry.header.forms) for entry in chosen)
    if reserved > MOST_HEADER or tensors > MOST_TENSORS:
        raise ValueError(
            f"{len(chosen):,} records need a header of {reserved:,} bytes, and readers allow "
            f"{MOST_HEADER:,}: export fewer (--namespace, --limit-bytes)"
        )
    fd, temporary = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            found = _write(folder, chosen, reserved, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
    except BaseException:
        os.unlink(temporary)
        raise
    return found


def _latest(found: Iterable[Entry], limit_bytes: int | None) -> list[Entry]:
    chosen = sorted(found, key=lambda entry: -entry.header.seq)
    if limit_bytes is None:
        return chosen
    total, within = 0, []
    for entry in chosen:
        total += entry.header.record.nbytes
        if total > limit_bytes:
            break
        within.append(entry)
    return within


def _write(folder: Folder, chosen: Sequence[Entry], reserved: int, file: BinaryIO) -> Exported:
    """Tensors first: what was evicted or is damaged shows only when it is read."""
    found = Exported()
    written = []
    file.seek(reserved)
    for entry in chosen:
        try:
            sections = settled(folder, entry.id, partial(_read, folder, entry))
        except (Damaged, HeaderError, EOFError, FileNotFoundError):
            found.damaged += 1
            continue
        if sections is None:
            found.gone += 1
            continue
        digest = xxhash.xxh3_128()
        for section in sections:
            file.write(section.parts[0].data)
            digest.update(section.parts[0].data)
            found.bytes += section.form.nbytes
        written.append((entry.header.part, entry.header.seq, digest.digest()))
        found.records += 1
    file.seek(0)
    file.write(header_of(written, reserved))
    return found


def _read(folder: Folder, entry: Entry, located: Located) -> list[Section] | None:
    """A part's sections, decoded and verified; None when another has taken its place."""
    if not fmt.same(located.header, entry.located.header):
        return None
    part = Part(located, known(located.header))
    forms = part.known.forms
    sections = [Section(form, [np.empty(form.shape, np.uint8)]) for form in forms]
    read_part(
        folder.segments, part, [*enumerate(forms)], sections, None, lambda section, layers: None
    )
    return sections


def import_chunks(path: Path, source: Path, capacity: int) -> Imported:
    """Put the records of a file into the store in `path`, made when missing.

    The file is trusted in one thing only: that its KV is that of its tokens, model and tenant. A
    key cannot be computed again, since the namespace that goes into it is no part of any file; all
    else is checked, every byte's digest included, before the store is opened. Nothing is evicted to
    stay within `capacity`. What was stored with loss is stored as it is now, with no other loss.

    Raises:
        ValueError: a file that `export_chunks` does not write, a folder that is no store, or more
            than fits.
        OSError: one of them cannot be read or written.
    """
    items = items_of(source)
    with chunk_file.open_plain(source) as file:
        sizes = {}
        for item in items:
            # What could not be read again is refused here.
            header, _, _ = _encoded(item, _sections(file, item), "none", bytes(16)).numbered(0)
            sizes[header.id] = header.record_bytes
        _check_room(path, sizes, capacity)
        found = Imported()
        items.sort(key=lambda item: item.facts.seq)
        # Engines differ in how many variants they keep: all stay until one puts the next.
        disk = Disk(path, capacity, exact_variants=sys.maxsize)
        try:
            _put(disk, file, items, found)
        finally:
            disk.close()
    return found


def _sections(file: BinaryIO, item: Item) -> list[Section]:
    """A part's bytes, compared with their digest."""
    try:
        data = aligned(item.record.nbytes)
    except MemoryError as e:
        raise ValueError(f"a record takes {item.record.nbytes:,} bytes, which are not free") from e
    file.seek(item.at)
    if file.readinto(data.data) != data.nbytes:  # type: ignore[attr-defined]
        raise ValueError("the file became shorter while it was read")
    return item.sections(data)


def _encoded(item: Item, sections: Sequence[Section], codec: str, folder: bytes) -> Encoded:
    """As the item was stored where it comes from, but for the codec."""
    facts = item.facts
    part = encode(item.record, sections, codec, facts.label, memory=aligned)
    # The encoder takes a namespace, and this one is a digest already.
    header = replace(part.header, record=item.record, created=facts.created, error=facts.error)
    part = replace(part, header=header, data=wire.unsealed(header))
    return Encoded(Header(header, 0, folder), part)


def _check_room(path: Path, sizes: dict[bytes, int], capacity: int) -> None:
    """Raise ValueError unless records of these sizes, by id, fit beside what is in a store."""
    live = 0
    new: Collection[int] = sizes.values()
    if path.exists():
        folder = Folder(path)
        live = sum(use.live for use in folder.catalog.segments().values())
        held = folder.catalog.contains(sizes)
        new = [size for size, known in zip(sizes.values(), held, strict=True) if not known]
        folder.close()
    need = live + sum(new)
    if sum(new) and need > OCCUPANCY * capacity:
        raise ValueError(
            f"capacity: got {capacity:,} bytes, which take {int(OCCUPANCY * capacity):,} of "
            f"records; the store has {live:,} and the file {sum(new):,} more: "
            f"give at least {int(need / OCCUPANCY) + 1:,}"
        )


def _put(disk: Disk, file: BinaryIO, items: Sequence[Item], found: Imported) -> None:
    """Put parts in the order of their puts where they come from."""
    batch: list[Encoded] = []
    for i, item in enumerate(items):
        codec = item.facts.sections[0].codec
        codec = codec if codec in _LOSSLESS else "none"
        batch.append(_encoded(item, _sections(file, item), codec, disk.folder.identity))
        size = sum(encoded.part.payload.nbytes for encoded in batch)
        if size < _BATCH_BYTES and i < len(items) - 1:
            continue
        for encoded, outcome in zip(batch, disk.put_encoded(batch), strict=True):
            if outcome == "stored":
                found.records += 1
                found.bytes += encoded.header.record.nbytes
        batch = []
    found.known += disk.counts["known"]
    found.failed.update(
        {kind: n for kind, n in disk.counts.items() if kind.startswith(("put_failed", "no_room"))}
    )
