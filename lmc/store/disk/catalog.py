"""Where records lie: an LMDB index that can always be made again from the segment files.

It is synced only when it is closed: until then the segments are what lasts. `seal` says whether a
file that was closed may be used again, and `env` watches it meanwhile.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lmc.store.disk import env, envs
from lmc.store.disk import header as fmt
from lmc.store.disk.header import Header
from lmc.store.record import Record

_AT = struct.Struct(">IQ")
_SEGMENT = struct.Struct("<QQQ")
_USE = struct.Struct("<Qd")
_SEQ = struct.Struct(">Q")
_TABLES = (
    "records", "places", "keys", "behind", "tails", "segments", "used", "quarantined", "meta",
)  # fmt: skip
_DUPS = ("keys", "behind")  # with several values of a key
_AT_ONCE = 1024  # records of one transaction, where all are walked through
BEHIND = 16  # of what continues a context with the same token, only so many of the latest are told


@dataclass(frozen=True)
class Located:
    """Where a record is: segment, offset, and its header's bytes."""

    segment: int
    at: int
    header: bytes

    def unpack(self) -> Header:
        """Raises HeaderError where the index is damaged."""
        return fmt.unpack(self.header)


@dataclass
class SegmentUse:
    """Of one segment: where its last record ends, bytes of live records, how many those are."""

    end: int = 0
    live: int = 0
    records: int = 0


@dataclass
class Use:
    """How often a record was read, and when last (seconds since 1970)."""

    hits: int = 0
    last: float = 0.0


class Catalog:
    """The index of one folder, shared by processes; one of them writes at a time.

    Args:
        folder: of the LMDB files.
        patience_s: to wait where it has been tried in vain.

    Raises:
        lmdb.Error, OSError: it cannot be used.
    """

    def __init__(self, folder: Path, patience_s: float = envs.OPEN_S) -> None:
        self.env = envs.opened(folder, _TABLES, _DUPS, patience_s)
        self._env, self._db = self.env, self.env.tables

    @staticmethod
    def make(folder: Path, identity: bytes) -> None:
        """An empty index in a folder that is there, of the store with this identity."""
        env.make(folder, _TABLES, _DUPS, identity)

    # -- reading -----------------------------------------------------------------------------

    def locate(self, id: bytes) -> Located | None:
        """Where the record of this id is."""
        with self._env.begin(db=self._db["records"]) as txn:
            return _located(txn.get(id))

    def contains(self, ids: Iterable[bytes]) -> list[bool]:
        """Which ids are known."""
        with self._env.begin(db=self._db["records"], buffers=True) as txn:
            return [txn.get(id) is not None for id in ids]

    def variants(self, key: bytes, shard: int, shards: int) -> list[Located]:
        """Records of one content, in the order of their puts; tails excepted."""
        found = []
        with self._env.begin() as txn:
            cursor = txn.cursor(self._db["keys"])
            if cursor.set_key(_key(key, shard, shards)):
                for value in list(cursor.iternext_dup()):
                    found.append(_located(txn.get(value[_SEQ.size :], db=self._db["records"])))
        return [located for located in found if located is not None]

    def after(self, behind: bytes, shard: int, shards: int) -> list[Located]:
        """Records by namespace, context and first token: the latest, in the order of their puts."""
        found = []
        with self._env.begin() as txn:
            cursor = txn.cursor(self._db["behind"])
            if cursor.set_key(_key(behind, shard, shards)) and cursor.last_dup():
                latest = [bytes(cursor.value())]
                while len(latest) < BEHIND and cursor.prev_dup():
                    latest.append(bytes(cursor.value()))
                for value in reversed(latest):
                    found.append(_located(txn.get(value[_SEQ.size :], db=self._db["records"])))
        return [located for located in found if located is not None]

    def tail(self, namespace: bytes, context: bytes, shard: int, shards: int) -> Located | None:
        """The tail that continues a context."""
        with self._env.begin() as txn:
            id = txn.get(_tail(namespace, context, shard, shards), db=self._db["tails"])
            return None if id is None else _located(txn.get(id, db=self._db["records"]))

    def records(self) -> Iterator[tuple[bytes, Located]]:
        """All records, by id."""
        last: bytes | None = None
        while True:
            # Some at a time: a transaction that stays open keeps the index from using pages again.
            with self._env.begin(db=self._db["records"]) as txn:
                cursor = txn.cursor()
                there = cursor.first() if last is None else cursor.set_range(last + b"\0")
                some = list(islice(cursor.iternext(), _AT_ONCE)) if there else []
            for id, value in some:
                segment, at = _AT.unpack_from(value)
                yield id, Located(segment, at, value[_AT.size :])
            if len(some) < _AT_ONCE:
                return
            last = some[-1][0]

    def within(self, segment: int) -> list[tuple[bytes, Located]]:
        """Records of one segment, by offset."""
        found = []
        with self._env.begin() as txn:
            cursor = txn.cursor(self._db["places"])
            if cursor.set_range(_AT.pack(segment, 0)):
                for place, id in cursor:
                    if _AT.unpack(place)[0] != segment:
                        break
                    if located := _located(txn.get(id, db=self._db["records"])):
                        found.append((id, located))
        return found

    def segments(self) -> dict[int, SegmentUse]:
        """All segments, by number."""
        with self._env.begin(db=self._db["segments"]) as txn:
            return {
                int.from_bytes(number, "big"): SegmentUse(*_SEGMENT.unpack(value))
                for number, value in txn.cursor()
            }

    def uses(self) -> dict[bytes, Use]:
        """How records were read, by id; of one that never was, nothing."""
        with self._env.begin(db=self._db["used"]) as txn:
            return {id: Use(*_USE.unpack(value)) for id, value in txn.cursor()}

    def quarantined(self) -> dict[bytes, str]:
        """Ids of records that failed to verify, and how."""
        with self._env.begin(db=self._db["quarantined"]) as txn:
            return {id: reason.decode() for id, reason in txn.cursor()}

    def last_segment(self) -> int:
        """The highest number that a segment ever had, or 0."""
        with self._env.begin(db=self._db["meta"]) as txn:
            return int.from_bytes(txn.get(b"segment", b""), "big")

    def unreadable(self) -> set[int]:
        """Segments that are there and could not be read when the index was made."""
        with self._env.begin(db=self._db["meta"]) as txn:
            numbers = txn.get(b"unreadable", b"")
        return {int.from_bytes(numbers[i : i + 4], "big") for i in range(0, len(numbers), 4)}

    def next_seq(self) -> int:
        """The number of the next put."""
        with self._env.begin(db=self._db["meta"]) as txn:
            return int(_SEQ.unpack(txn.get(b"seq", bytes(8)))[0])

    def __len__(self) -> int:
        with self._env.begin(db=self._db["records"]) as txn:
            return int(txn.stat(self._db["records"])["entries"])

    # -- writing, by whoever holds the folder's writer lock ------------------------------------

    @contextmanager
    def change(self) -> Iterator[Change]:
        """One transaction: all of it or nothing."""
        with self._env.begin(write=True) as txn:
            change = Change(txn, self._db)
            yield change
            change.finish()


class Change:
    """What one transaction writes."""

    def __init__(self, txn: Any, db: dict[str, Any]) -> None:
        self._txn, self._db = txn, db
        self._segments: dict[int, SegmentUse] = {}
        self._seq = 0

    def add(self, header: Header, place: tuple[int, int], data: bytes) -> None:
        """A record is at `place` from now on; one of its id that was elsewhere is dead there."""
        segment, at = place
        self.remove(header.id, keep_use=True)
        record, id = header.record, header.id
        self._txn.put(id, _AT.pack(segment, at) + data, db=self._db["records"])
        self._txn.put(_AT.pack(segment, at), id, db=self._db["places"])
        self._txn.delete(id, db=self._db["quarantined"])
        if record.tail:
            key = _tail(record.namespace, record.context, header.shard, header.shards)
            # A crash may have kept the one before from being marked as dead.
            if (before := self._txn.get(key, db=self._db["tails"])) is not None:
                self.remove(before)
            self._txn.put(key, id, db=self._db["tails"])
        else:
            key = _key(record.key, header.shard, header.shards)
            self._txn.put(key, _SEQ.pack(header.seq) + id, db=self._db["keys"])
        if record.origin != "blended":
            key = _key(_behind(record), header.shard, header.shards)
            self._txn.put(key, _SEQ.pack(header.seq) + id, db=self._db["behind"])
        use = self._segment(segment)
        use.end = max(use.end, at + header.record_bytes)
        use.live += header.record_bytes
        use.records += 1
        self._seq = max(self._seq, header.seq + 1)

    def remove(self, id: bytes, keep_use: bool = False) -> tuple[int, int] | None:
        """Forget a record; where it was."""
        value = self._txn.pop(id, db=self._db["records"])
        if value is None:
            return None
        if not keep_use:
            self._txn.delete(id, db=self._db["used"])
        segment, at = _AT.unpack_from(value)
        self._txn.delete(value[: _AT.size], db=self._db["places"])
        header = fmt.unpack(value[_AT.size :])
        record = header.record
        if record.tail:
            key = _tail(record.namespace, record.context, header.shard, header.shards)
            if self._txn.get(key, db=self._db["tails"]) == id:
                self._txn.delete(key, db=self._db["tails"])
        else:
            key = _key(record.key, header.shard, header.shards)
            self._txn.delete(key, _SEQ.pack(header.seq) + id, db=self._db["keys"])
        if record.origin != "blended":
            key = _key(_behind(record), header.shard, header.shards)
            self._txn.delete(key, _SEQ.pack(header.seq) + id, db=self._db["behind"])
        use = self._segment(segment)
        use.live -= header.record_bytes
        use.records -= 1
        return segment, at

    def quarantine(self, id: bytes, reason: str) -> tuple[int, int] | None:
        """Forget a record that is damaged, but for why; where it was."""
        was = self.remove(id)
        if was is not None:
            self._txn.put(id, reason.encode(), db=self._db["quarantined"])
        return was

    def forget_quarantined(self) -> None:
        """Forget what was quarantined."""
        self._txn.drop(self._db["quarantined"], delete=False)

    def segment_ends(self, segment: int, end: int) -> None:
        """A segment is there, and what follows `end` in it is nobody's."""
        self._segment(segment).end = end

    def unreadable(self, segment: int) -> None:
        """A segment is there that could not be read."""
        numbers = self._txn.get(b"unreadable", b"", db=self._db["meta"])
        numbers += segment.to_bytes(4, "big")
        self._txn.put(b"unreadable", numbers, db=self._db["meta"])

    def drop_segment(self, segment: int) -> None:
        """A segment without live records is gone."""
        self._segments.pop(segment, None)
        self._txn.delete(segment.to_bytes(4, "big"), db=self._db["segments"])

    def used(self, id: bytes, hits: int, last: float) -> None:
        """A record was read `hits` times more."""
        if self._txn.get(id, db=self._db["records"]) is None:
            return
        before = self._txn.get(id, db=self._db["used"])
        use = Use(*_USE.unpack(before)) if before else Use()
        value = _USE.pack(use.hits + hits, max(use.last, last))
        self._txn.put(id, value, db=self._db["used"])

    def finish(self) -> None:
        for number, use in self._segments.items():
            value = _SEGMENT.pack(use.end, use.live, use.records)
            self._txn.put(number.to_bytes(4, "big"), value, db=self._db["segments"])
        last = max(self._segments, default=0).to_bytes(4, "big")
        if last > self._txn.get(b"segment", b"", db=self._db["meta"]):
            self._txn.put(b"segment", last, db=self._db["meta"])
        before = _SEQ.unpack(self._txn.get(b"seq", bytes(8), db=self._db["meta"]))[0]
        if self._seq > before:
            self._txn.put(b"seq", _SEQ.pack(self._seq), db=self._db["meta"])

    def _segment(self, number: int) -> SegmentUse:
        if number not in self._segments:
            value = self._txn.get(number.to_bytes(4, "big"), db=self._db["segments"])
            self._segments[number] = SegmentUse(*_SEGMENT.unpack(value)) if value else SegmentUse()
        return self._segments[number]


def _located(value: bytes | None) -> Located | None:
    if value is None:
        return None
    segment, at = _AT.unpack_from(value)
    return Located(segment, at, value[_AT.size :])


def _key(key: bytes, shard: int, shards: int) -> bytes:
    return key + struct.pack("<HH", shard, shards)


def _tail(namespace: bytes, context: bytes, shard: int, shards: int) -> bytes:
    return namespace + context + struct.pack("<HH", shard, shards)


def _behind(record: Record) -> bytes:
    return record.namespace + record.context + record.tokens[:8]
