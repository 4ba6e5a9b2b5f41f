"""The disk tier: chunks in segment files, found through an LMDB index."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb

from lmc.model.layout import KVLayout
from lmc.store import compress
from lmc.store.disk import header as fmt
from lmc.store.disk.catalog import Located
from lmc.store.disk.encode import Encoded, Encoder, write_records
from lmc.store.disk.faults import FAULTS, kind_of
from lmc.store.disk.folder import Folder
from lmc.store.disk.guard import otherwise
from lmc.store.disk.header import Header
from lmc.store.disk.read import Damaged, Known, known, read_rows
from lmc.store.disk.room import Room
from lmc.store.record import Record, superseded
from lmc.store.tier import Rows


class Disk:
    """Chunks in a folder, which outlive the process and may be shared by several.

    A put is acknowledged when its bytes are synced to the disk and indexed. A get checks every
    byte that it gives. One process writes at a time, and none ever waits in order to read. In a
    child of a fork the folder is opened anew when it is first needed. A tier that is closed has
    nothing and takes nothing; one that is dropped, or open when the interpreter ends, is closed.

    Args:
        path: the folder, made when missing. Nothing is written outside it.
        capacity: bytes of its segment files, dead records included.
        layout: of the chunks, on one rank; None to read what is there, whatever it is.
        shard, shards: which of how many ranks' heads.
        compression: one of `lmc.store.compress.CODECS`.
        policy: which records go when there is no room, one of `lmc.policies.POLICIES`.
        exact_variants: exact contexts kept of one content.
        label: the model's name, for people who list the store.
        read_only: nothing in the folder is changed.

    Raises:
        ValueError: a folder that is no store, or of a newer format; a codec or policy that cannot
            be; a capacity of less than a MiB.
        OSError: it cannot be opened: see `Folder`.
    """

    name = "disk"

    def __init__(
        self,
        path: str | Path,
        capacity: int,
        *,
        layout: KVLayout | None = None,
        shard: int = 0,
        shards: int = 1,
        compression: str = "none",
        policy: Mapping[str, Any] | str = "lru",
        exact_variants: int = 2,
        label: str = "",
        read_only: bool = False,
    ) -> None:
        if capacity < 1 << 20:
            raise ValueError(f"capacity: got {capacity} bytes, allowed: at least {1 << 20}")
        if layout is not None:
            compress.check_codec(compression, layout)
        self.capacity = capacity
        self.layout = layout
        self.shard, self.shards = shard, shards
        self.read_only = read_only
        self._exact_variants = exact_variants
        self._path, self._policy = Path(path), policy
        self.counts: Counter[str] = Counter()
        self._open()
        self._encode: Encoder | None = None
        if layout is not None:
            label = label.encode()[:255].decode(errors="ignore")
            self._encode = Encoder(layout, shard, shards, compression, label, self.counts)

    def _open(self) -> None:
        self.folder = Folder(self._path, self.read_only, self.counts)
        # Not `self`, which could never be dropped then.
        self._closer = weakref.finalize(self, Folder.close, self.folder)
        try:
            self.room = Room(self.folder, self.capacity, self._policy, self.counts)
        except ValueError:
            self.folder.close()
            raise
        self._path = self.folder.root  # wherever the process goes
        self._uses: Counter[bytes] = Counter()  # reads that the index has not been told of
        self._uses_lock = threading.Lock()
        self._bad: set[bytes] = set()  # what failed to verify, as far as this process knows

    def open_again(self) -> None:
        """In a child, whose locks, files and index are its parent's, and may be half changed."""
        if self._closer.detach():  # one thread does; for the others it is closed
            try:
                self._open()
            except (ValueError, *FAULTS) as e:
                self.counts[f"not_opened:{kind_of(e)}"] += 1

    # -- what is here ------------------------------------------------------------------------

    @property
    @otherwise(lambda: 0)
    def size(self) -> int:
        """Bytes of the segment files; 0 where the index cannot be read."""
        return self.room.size

    @otherwise(lambda records: [False] * len(records))
    def contains(self, records: Sequence[Record]) -> list[bool]:
        ids = [self.id_of(record) for record in records]
        held = self.folder.catalog.contains(ids)
        return [known and id not in self._bad for id, known in zip(ids, held, strict=True)]

    @otherwise(lambda namespace, key: [])
    def find(self, namespace: bytes, key: bytes) -> list[Record]:
        """Records of one content that every rank has, in the order of their puts."""
        return self._usable(self.folder.catalog.variants(key, self.shard, self.shards), namespace)

    @otherwise(lambda namespace, context, first: [])
    def after(self, namespace: bytes, context: bytes, first: bytes) -> list[Record]:
        """What continues `context` with the token `first`, of that which every rank has."""
        behind = fmt.namespace_digest(namespace) + context + first
        return self._usable(self.folder.catalog.after(behind, self.shard, self.shards), namespace)

    def id_of(self, record: Record) -> bytes:
        """Names this rank's part of a record in the folder."""
        return fmt.shard_id(record, self.shard, self.shards)

    # -- reading -----------------------------------------------------------------------------

    def get(
        self,
        record: Record,
        into: Sequence[Rows] | None = None,
        deadline: float | None = None,
        arrived: Callable[[int], None] = lambda layers: None,
    ) -> Sequence[Rows] | None:
        """As `Tier.get`.

        Args:
            arrived: called with the number of layers that are there and verified, as they come.
        """
        id = self.id_of(record)
        rows = self._get(id, record, into, deadline, arrived)
        if rows is None:
            self.counts["misses"] += 1
            return None
        self.counts["hits"] += 1
        self.counts["bytes_read"] += record.nbytes
        with self._uses_lock:
            self._uses[id] += 1
        return rows

    @otherwise(lambda *arguments: None)
    def _get(
        self,
        id: bytes,
        record: Record,
        into: Sequence[Rows] | None,
        deadline: float | None,
        arrived: Callable[[int], None],
    ) -> Sequence[Rows] | None:
        before: Located | None = None
        while True:
            try:
                located = None if id in self._bad else self.folder.catalog.locate(id)
                if located is None:
                    return None
                stored = known(located.header)
                if not self._fits(stored, id, record, into):
                    return None
                return read_rows(self.folder.segments, located, stored, into, deadline, arrived)
            except (Damaged, EOFError, FileNotFoundError) as e:
                # Has a writer moved it meanwhile? Then it is elsewhere now.
                if located is not None and located != before:
                    before = located
                    self.folder.segments.forget({located.segment})
                    continue
                self._set_aside(id, before, e)
                return None
            except lmdb.Error:
                raise
            except OSError as e:
                self.counts[kind_of(e)] += 1
                return None

    def _fits(self, found: Known, id: bytes, record: Record, into: Sequence[Rows] | None) -> bool:
        """Whether a record is the one that was asked for, and of a shape that can be taken."""
        stored = found.header.record
        if found.id != id:
            raise Damaged("index")
        if (stored.key, stored.tokens, stored.namespace) != (
            record.key, record.tokens, fmt.namespace_digest(record.namespace)
        ):  # fmt: skip
            self.counts["not_its_record"] += 1  # who asks is wrong: what is stored stays
            return False
        L, S, T, R = found.shape
        fits = self.layout is None or found.header.layout == self.layout
        if into is not None:
            shapes = {(part.shape[0], part.shape[1], part.shape[3]) for part in into}
            fits = fits and shapes == {(L, S, R)} and sum(p.shape[2] for p in into) == T
        if not fits:
            self.counts["other_layout"] += 1
        return fits

    def _usable(self, found: Sequence[Located], namespace: bytes) -> list[Record]:
        """Of what the index has, records of this namespace and layout that every rank has."""
        records, digest = [], fmt.namespace_digest(namespace)
        for located in found:
            header = known(located.header).header
            if self.layout in (None, header.layout) and header.record.namespace == digest:
                records.append(replace(header.record, namespace=namespace))
        records = [record for record in records if self.id_of(record) not in self._bad]
        if self.shards > 1 and records:
            ids = [fmt.shard_id(r, i, self.shards) for r in records for i in range(self.shards)]
            held = iter(self.folder.catalog.contains(ids))
            n = self.shards
            records = [r for r in records if sum(next(held) for _ in range(n)) == n]
        return records

    def _set_aside(self, id: bytes, located: Located | None, fault: Exception) -> None:
        """Never serve a record again that failed to verify where it was."""
        reason = kind_of(fault)
        self.counts[f"damaged:{reason}"] += 1
        self._bad.add(id)
        if self.read_only:
            return
        try:
            with self.folder.writing(1.0):
                if self.folder.catalog.locate(id) != located:  # it has been put again
                    self._bad.discard(id)
                    return
                self.room.quarantine(id, reason)
            self.counts["quarantined"] += 1
        except FAULTS as e:
            self.folder.index_fault(e)

    # -- writing -----------------------------------------------------------------------------

    def put(self, items: Sequence[tuple[Record, Sequence[Rows]]]) -> list[bool]:
        if self._encode is None:
            raise ValueError("a disk tier that was opened without a layout takes no puts")
        held = self.contains([record for record, _ in items])
        seen: set[object] = set()
        for i, (record, _) in enumerate(items):
            held[i] = held[i] and _content(record) not in seen  # or else one before may replace it
            seen.add(_content(record))
        self.counts["known"] += sum(held)
        new = [self._encode(*item) for item, known in zip(items, held, strict=True) if not known]
        done = iter(self.put_encoded(new))
        return [not known and next(done) for known in held]

    @otherwise(lambda encoded: [False] * len(encoded))
    def put_encoded(self, encoded: Sequence[Encoded]) -> list[bool]:
        """As `put`, of chunks of this rank whose namespaces are digests already."""
        done = [False] * len(encoded)
        try:
            with self.folder.writing():
                self._tell_uses()
                for group in self._groups(encoded):
                    try:
                        acknowledged = self._write(group)
                    except FAULTS as e:
                        if not self._make_room(e):
                            raise
                        acknowledged = self._write(group)  # if that is not enough, nothing is
                    for i in acknowledged:
                        done[i] = True
        except FAULTS as e:
            self.counts[f"put_failed:{kind_of(e)}"] += len(encoded) - sum(done)
            self.folder.index_fault(e)
        return done

    def _make_room(self, fault: Exception) -> bool:
        """Whether what failed may succeed now."""
        if kind_of(fault) == "index_full":
            return self.folder.catalog.env.grow()
        return kind_of(fault) == "disk_full" and self.room.give_up_a_segment()

    def _groups(self, encoded: Sequence[Encoded]) -> list[dict[int, Encoded]]:
        """What is written and synced together, by index: no more than there can be room for.

        Of one content there is one in each, since what it replaces is known when it is its turn.
        """
        groups: list[dict[int, Encoded]] = []
        size, seen = 0, set[object]()
        for i, e in enumerate(encoded):
            size += e.header.record_bytes
            content = _content(e.header.record)
            if not groups or size > self.room.limit // 4 or content in seen:
                groups.append({})
                size, seen = e.header.record_bytes, set()
            groups[-1][i] = e
            seen.add(content)
        return groups

    def _write(self, encoded: Mapping[int, Encoded]) -> list[int]:
        """Write, sync, index; then records are acknowledged: those of these indices."""
        folder = self.folder
        out: set[bytes] = set()
        chosen: dict[bytes, int] = {}
        for i, e in encoded.items():
            replaced = self._replaced(e.header)
            if replaced is None:
                self.counts["known"] += 1
            elif e.header.record_bytes > self.room.limit:
                self.counts["no_room"] += 1
            else:
                chosen[e.header.id] = i
                out.update(replaced)
        if not chosen:
            return []
        seq = folder.catalog.next_seq()
        sizes = [encoded[i].header.record_bytes for i in chosen.values()]
        places = self.room.place(sizes)
        with self.room.undone_on_failure(places):
            new = [encoded[i] for i in chosen.values()]
            # The index is written meanwhile, and valid when it is left, behind the sync.
            with folder.catalog.change() as change:
                dead = [place for id in out if (place := change.remove(id)) is not None]
                write_records(folder.segments, new, places, seq, change.add)
        self.room.mark(dead, fmt.DEAD)
        self._bad -= chosen.keys()
        self.counts["puts"] += len(chosen)
        self.counts["bytes_written"] += sum(sizes)
        return list(chosen.values())

    def _replaced(self, new: Header) -> list[bytes] | None:
        """Ids of the records that a new one takes the place of; None when it would add nothing."""
        catalog, record = self.folder.catalog, new.record
        if record.tail:
            tail = catalog.tail(record.namespace, record.context, self.shard, self.shards)
            found = [tail] if tail else []
        else:
            found = catalog.variants(record.key, self.shard, self.shards)
        known = [located.unpack().record for located in found]
        # One that is known here to be damaged stands in nobody's way.
        known = [other for other in known if self.id_of(other) not in self._bad]
        replaced = superseded(known, record, self._exact_variants)
        return None if replaced is None else [self.id_of(other) for other in replaced]

    def evict(self, records: Sequence[Record]) -> None:
        self.evict_ids([self.id_of(record) for record in records])

    @otherwise(lambda ids: 0)
    def evict_ids(self, ids: Sequence[bytes]) -> int:
        """Let go of records by their ids; how many there were."""
        try:
            with self.folder.writing():
                return self.room.evict(ids)
        except FAULTS as e:
            self.counts[f"evict_failed:{kind_of(e)}"] += len(ids)
            self.folder.index_fault(e)
            return 0

    def _tell_uses(self) -> None:
        """Write down who was read how often; the caller is the folder's writer."""
        with self._uses_lock:
            uses, self._uses = self._uses, Counter()
        if uses:
            now = time.time()
            with self.folder.catalog.change() as change:
                for id, hits in uses.items():
                    change.used(id, hits, now)

    def close(self) -> None:
        if not self._closer.detach():  # it is closed, or somebody is closing it
            return
        if not self.read_only and not self.folder.forked:
            try:
                with self.folder, self.folder.writing(1.0):
                    self._tell_uses()
            except FAULTS as e:
                if not self.folder.index_fault(e):
                    self.counts[kind_of(e)] += 1
        self.folder.close()


def _content(record: Record) -> object:
    """What is equal of records that may replace each other."""
    return (record.namespace, record.context) if record.tail else record.key
