"""What is in a folder of the disk tier, for people: records one by one, in groups, as a whole."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lmc.store.disk import header as fmt
from lmc.store.disk.folder import Folder
from lmc.store.disk.header import Header, HeaderError
from lmc.store.disk.order import Use
from lmc.store.disk.read import Damaged
from lmc.store.disk.segments import Located

Read = TypeVar("Read")
# What the records of one group have in common.
_COMMON: dict[str, tuple[str, ...]] = {
    "namespace": ("namespace", "label", "origin"),
    "label": ("label", "origin"),
    "origin": ("origin",),
}

# Of what is met when an index is made again: what nobody can have back. A record that is torn, on
# the other hand, is what a crash leaves of a put that was never acknowledged.
LOST = ("headers_unreadable", "segments_unreadable")


@dataclass(frozen=True)
class Entry:
    """A part of a record that the index knows: its id, place and header, and how it was read."""

    id: bytes
    located: Located
    header: Header
    use: Use

    @property
    def used(self) -> float:
        """When it was stored or last read, whichever is later; seconds since 1970."""
        return max(self.header.created, self.use.last)

    def facts(self) -> dict[str, Any]:
        """What is printed of it: times in seconds since 1970, bytes of this part."""
        header, record = self.header, self.header.record
        stored = header.part.stored
        return {
            "id": self.id.hex(),
            "record": record.id.hex(),
            "namespace": record.namespace.hex(),
            "label": header.part.label,
            "tokens": record.T,
            "start": record.start,
            "origin": record.origin,
            "tail": record.tail,
            "codec": "+".join(dict.fromkeys(codec for _, codec, _, _ in stored)),
            "heads": list(stored[0].form.heads),
            "sections": [
                {"group": f.group, "kind": f.kind, "heads": list(f.heads), "tokens": list(f.tokens)}
                for f in header.forms
            ],
            "bytes": record.nbytes,
            "stored_bytes": header.record_bytes,
            "created": header.created,
            "last_read": self.use.last if self.use.hits else None,
            "hits": self.use.hits,
            "segment": self.located.segment,
        }


def existing(path: Path, to_write: bool = False) -> Folder:
    """The store that is in a folder, which is not made.

    Args:
        to_write: fail where it cannot be written; else it is opened for reading only there.

    Raises:
        ValueError: no folder, or no store of this format.
        OSError: it cannot be opened.
    """
    if not path.is_dir():
        raise ValueError(f"got {path}, which is {'no folder' if path.exists() else 'not there'}")
    if not any(path.iterdir()):
        raise ValueError(f"got {path}, which is empty: it holds no store")
    try:
        folder = Folder(path)
    except OSError as e:
        if to_write or e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        folder = Folder(path, read_only=True)
    folder.settle()
    return folder


def entries(
    folder: Folder, namespace: str | None = None, origin: str | None = None
) -> Iterator[Entry]:
    """Records, by id; what is damaged in the index itself is left out, and counted.

    Args:
        namespace: how its digest begins, in hex; it must be one namespace's.
        origin: one of `lmc.store.record.Origin`.

    Raises:
        ValueError: a namespace that is not there, or several.
    """
    digest = None if namespace is None else _namespace(folder, namespace)
    uses = folder.catalog.uses()
    for entry in _all(folder, uses):
        record = entry.header.record
        if digest in (None, record.namespace) and origin in (None, record.origin):
            yield entry


def grouped(found: Iterable[Entry], by: str) -> list[dict[str, Any]]:
    """Records added up by namespace, label or origin; what is largest comes first.

    `records` counts every rank's part; `chunks` and `tokens` each record once.
    """
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    seen: set[str] = set()
    for entry in found:
        facts = entry.facts()
        common = {name: facts[name] for name in _COMMON[by]}
        group = groups.setdefault(tuple(common.values()), {**common, **_EMPTY})
        first = facts["record"] not in seen
        seen.add(facts["record"])
        group["records"] += 1
        group["chunks"] += first
        group["tokens"] += facts["tokens"] if first else 0
        for name in ("bytes", "stored_bytes", "hits"):
            group[name] += facts[name]
        created = facts["created"]
        group["oldest"] = min(group["oldest"] or created, created)
        group["newest"] = max(group["newest"] or created, created)
    whole: Counter[Any] = Counter()  # of all origins
    for key, group in groups.items():
        whole[key[:-1]] += group["stored_bytes"]
    order = sorted(groups, key=lambda k: (-whole[k[:-1]], k[:-1], -groups[k]["stored_bytes"]))
    return [groups[key] for key in order]


_EMPTY = {
    "chunks": 0, "records": 0, "tokens": 0, "bytes": 0, "stored_bytes": 0,
    "oldest": None, "newest": None, "hits": 0,
}  # fmt: skip


def totals(folder: Folder) -> dict[str, Any]:
    """The folder as a whole; `error` is the mean over sections of the relative RMS error."""
    used = folder.catalog.segments().values()
    index = folder.root / "index" / "data.mdb"  # not there: made for this process alone
    codecs: dict[str, Counter[str]] = {}
    errors: Counter[str] = Counter()
    layouts: dict[tuple[Any, ...], Counter[str]] = {}
    for entry in _all(folder, {}):
        for form, codec, _, spans in entry.header.part.stored:
            payload = sum(span.length for span in spans)
            sizes = Counter(records=1, bytes=form.nbytes, payload_bytes=payload)
            codecs.setdefault(codec, Counter()).update(sizes)
            errors[codec] += entry.header.part.error  # type: ignore[assignment]
            key = (form.kind, form.dtype, form.L, form.heads[2], form.D)
            layouts.setdefault(key, Counter()).update(sizes)
    names = ("kind", "dtype", "L", "heads", "D")
    return {
        "format": fmt.FORMAT,
        "records": len(folder.catalog),
        "segments": len(used),
        "file_bytes": sum(use.end for use in used),
        "live_bytes": sum(use.live for use in used),
        "dead_bytes": sum(use.end - use.live for use in used),
        "index_bytes": 512 * index.stat().st_blocks if index.exists() else 0,
        "codecs": [
            {
                "codec": codec,
                **sizes,
                "ratio": sizes["bytes"] / sizes["payload_bytes"],
                "error": errors[codec] / sizes["records"],
            }
            for codec, sizes in sorted(codecs.items())
        ],
        "layouts": [
            {**dict(zip(names, key, strict=True)), **sizes}
            for key, sizes in sorted(layouts.items())
        ],
        "quarantined": dict(Counter(folder.catalog.quarantined().values())),
        "opening": opening(folder),
    }


def opening(folder: Folder) -> dict[str, int]:
    """What was met when the index had to be made again, by kind; empty where it had not."""
    kinds = ("index_rebuilt", "records_torn", *LOST)
    return {kind: folder.counts[kind] for kind in kinds if folder.counts[kind]}


def settled(folder: Folder, id: bytes, read: Callable[[Located], Read]) -> Read | None:
    """What `read` makes of a record where it is; None when it was evicted meanwhile.

    Where it fails because a writer has moved the record, it is asked again.

    Raises:
        As `read` does.
    """
    before: Located | None = None
    fault: Exception | None = None
    while (located := folder.catalog.locate(id)) is not None:
        if located == before and fault is not None:
            raise fault
        try:
            return read(located)
        except (Damaged, HeaderError, EOFError, FileNotFoundError) as e:
            before, fault = located, e
            folder.segments.forget({located.segment})
    return None


def _all(folder: Folder, uses: dict[bytes, Use]) -> Iterator[Entry]:
    for id, located in folder.catalog.records():
        try:
            yield Entry(id, located, located.unpack(), uses.get(id, Use()))
        except HeaderError:
            folder.counts["index_entries_damaged"] += 1


def _namespace(folder: Folder, begins: str) -> bytes:
    """The one namespace whose digest begins so."""
    there = sorted({entry.header.record.namespace.hex() for entry in _all(folder, {})})
    matching = [digest for digest in there if digest.startswith(begins.lower())]
    if len(matching) != 1:
        known = ", ".join(digest[:12] for digest in (matching or there)[:8]) or "none"
        raise ValueError(
            f"namespace: {len(matching) or 'no'} namespaces begin with {begins!r}, "
            f"want one of those in the store: {known}"
        )
    return bytes.fromhex(matching[0])
