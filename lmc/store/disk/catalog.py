"""Where records lie: an LMDB index that can always be made again from the segment files.

It is synced only when it is closed: until then the segments are what lasts. `seal` says whether a
file that was closed may be used again, and `env` watches it meanwhile.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from lmc.store.disk import env, envs, order
from lmc.store.disk import header as fmt
from lmc.store.disk.header import Header
from lmc.store.disk.order import Since, Use, use_of
from lmc.store.disk.segments import Located
from lmc.store.record import Record
from lmc.store.sections import Form, complete

_AT = struct.Struct(">IQ")
_SEGMENT = struct.Struct("<QQQ")
_SEQ = struct.Struct(">Q")
_TABLES = (
    "records", "places", "keys", "behind", "tails", "segments", "quarantined", "meta",
    *order.TABLES,
)  # fmt: skip
_DUPS = ("keys", "behind")  # with several values of a key
_AT_ONCE = 1024  # records of one transaction, where all are walked through
BEHIND = 16  # of what continues a context with the same token, only so many of the latest are told
_numbers = count(1)  # of catalogs in this process
RECORD = slice(8, 40)  # where in a listing the id of the record is


@dataclass
class SegmentUse:
    """Of one segment: where its last record ends, bytes of live ones, how many those are."""

    end: int = 0
    live: int = 0
    records: int = 0


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
        self.number = next(_numbers)

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

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Several questions about one state of the index."""
        with self._env.begin() as txn:
            yield Reading(txn, self._db)

    @property
    def epoch(self) -> int:
        """Another number after every change, and of every other index."""
        return self.number << 48 | int(self._env.info()["last_txnid"])

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
        """How records were read, by id."""
        with self._env.begin(db=self._db["used"]) as txn:
            return {id: use_of(value) for id, value in txn.cursor()}

    def use(self, id: bytes) -> Use | None:
        """How a record was read; None when it is gone."""
        with self._env.begin(db=self._db["used"]) as txn:
            value = txn.get(id)
        return None if value is None else use_of(value)

    def since(self, after: bytes, most: int) -> list[Since]:
        """Records in the order in which they were last put or read: so many, behind `after`."""
        with self._env.begin(db=self._db["order"]) as txn:
            return order.since(txn, after, most)

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
        """The number of the next put; reads count too, so that it tells how much happened."""
        with self._env.begin(db=self._db["meta"]) as txn:
            return int(_SEQ.unpack(txn.get(b"seq", bytes(8)))[0])

    def __len__(self) -> int:
        with self._env.begin(db=self._db["records"]) as txn:
            return int(txn.stat(self._db["records"])["entries"])

    # -- writing, by whoever holds the folder's writer lock ------------------------------------

    @contextmanager
    def change(self) -> Iterator[Change]:
        """One transaction: all of it or nothing.

        What is read meanwhile is read through it: a fork, and a map that has to grow, let nobody
        in and wait for those who are.
        """
        with self._env.begin(write=True) as txn:
            change = Change(txn, self._db)
            yield change
            change.finish()


class Reading:
    """What one transaction sees. A part is listed as the number of its put and its id."""

    def __init__(self, txn: Any, db: dict[str, Any]) -> None:
        self._txn, self._db = txn, db
        self._records = txn.cursor(db["records"])

    def listed(self, keys: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
        """Key by key, parts of these contents in the order of their puts; tails excepted."""
        found: list[tuple[bytes, bytes]]
        found = self._txn.cursor(self._db["keys"]).getmulti(list(keys), dupdata=True)
        return found

    def latest(self, behind: Iterable[bytes]) -> list[list[bytes]]:
        """Ids of the latest records behind a context with a first token, the oldest first.

        behind: namespace digest, context, first token.
        """
        cursor = self._txn.cursor(self._db["behind"])
        out: list[list[bytes]] = []
        for key in behind:
            ids: dict[bytes, None] = {}
            if cursor.set_key(key) and cursor.last_dup():
                ids[cursor.value()[RECORD]] = None
                while len(ids) < BEHIND and cursor.prev_dup():
                    ids[cursor.value()[RECORD]] = None
            out.append(list(reversed(ids)))
        return out

    def tail(self, namespace: bytes, context: bytes) -> bytes | None:
        """The id of the record that is the tail of a context."""
        id: bytes | None = self._txn.get(namespace + context, db=self._db["tails"])
        return id

    def headers(self, parts: Iterable[bytes]) -> dict[bytes, memoryview]:
        """The bytes of parts' headers, of those that there are."""
        found = self._records.getmulti(list(parts))
        return {id: memoryview(value)[_AT.size :] for id, value in found}

    def parts(self, record: bytes) -> list[tuple[bytes, Located]]:
        """Ids and places of what there is of a record, by its id."""
        return _parts(self._records, record)

    def listed_parts(self, record: bytes) -> bytes:
        """The same as they are listed elsewhere, one after the other."""
        out, cursor = b"", self._records
        more = cursor.set_range(record)
        while more and (id := cursor.key())[:32] == record:
            out += _SEQ.pack(fmt.seq_of(cursor.value()[_AT.size : _AT.size + fmt.FRONT])) + id
            more = cursor.next()
        return out


class Change:
    """What one transaction writes."""

    def __init__(self, txn: Any, db: dict[str, Any]) -> None:
        self._txn, self._db = txn, db
        self._segments: dict[int, SegmentUse] = {}
        self._seq = 0

    def add(self, header: Header, place: tuple[int, int], data: bytes) -> list[Located]:
        """A part is at `place` from now on; one of its id that was elsewhere is dead there.

        So is a tail that another has taken the place of, whichever of them comes first: a crash may
        have kept it from being marked.

        Returns:
            What is dead now.
        """
        segment, at = place
        was = self.remove(header.id, keep_use=True)
        dead = [] if was is None else [was]
        record, id = header.record, header.id
        tail, takes_over = record.namespace + record.context, False
        if record.tail:
            before = self._txn.get(tail, db=self._db["tails"])
            takes_over = before in (None, record.id)
            if not takes_over and self._state(record.id, header.forms)[0]:
                if self._state(before) > (True, header.seq):
                    return [*dead, Located(segment, at, data)]
                dead += self.remove_records([before]).values()
                takes_over = True
        self._txn.put(id, _AT.pack(segment, at) + data, db=self._db["records"])
        self._txn.put(_AT.pack(segment, at), id, db=self._db["places"])
        self._txn.delete(id, db=self._db["quarantined"])
        listed = _SEQ.pack(header.seq) + id
        if takes_over:
            self._txn.put(tail, record.id, db=self._db["tails"])
        if not record.tail:
            self._txn.put(record.key, listed, db=self._db["keys"])
        if record.origin != "blended":
            self._txn.put(_behind(record), listed, db=self._db["behind"])
        order.enter(self._txn, self._db, id, header)
        use = self._segment(segment)
        use.end = max(use.end, at + header.record_bytes)
        use.live += header.record_bytes
        use.records += 1
        self._seq = max(self._seq, header.seq + 1)
        return dead

    def remove_records(self, ids: Iterable[bytes]) -> dict[bytes, Located]:
        """Forget records, by their ids or those of their parts: all parts, and where they were."""
        cursor = self._txn.cursor(self._db["records"])
        parts = [part for id in ids for part, _ in _parts(cursor, id[:32])]
        places = ((part, self.remove(part)) for part in parts)
        return {part: at for part, at in places if at is not None}

    def remove(self, id: bytes, keep_use: bool = False) -> Located | None:
        """Forget one part; where it was."""
        value = self._txn.pop(id, db=self._db["records"])
        if value is None:
            return None
        segment, at = _AT.unpack_from(value)
        self._txn.delete(value[: _AT.size], db=self._db["places"])
        data = value[_AT.size :]
        record, listed = fmt.record_of(data), _SEQ.pack(fmt.seq_of(data)) + id
        order.leave(self._txn, self._db, id, keep_use)
        if record.tail:
            key = record.namespace + record.context
            gone = not _parts(self._txn.cursor(self._db["records"]), record.id)
            if gone and self._txn.get(key, db=self._db["tails"]) == record.id:
                self._txn.delete(key, db=self._db["tails"])
        else:
            self._txn.delete(record.key, listed, db=self._db["keys"])
        if record.origin != "blended":
            self._txn.delete(_behind(record), listed, db=self._db["behind"])
        use = self._segment(segment)
        use.live -= fmt.sizes(data)[1]
        use.records -= 1
        return Located(segment, at, value[_AT.size :])

    def _state(self, record: bytes, more: Sequence[Form] = ()) -> tuple[bool, int]:
        """Whether parts of a record, with what comes to them, have all heads; the latest seq."""
        parts = [at.header for _, at in _parts(self._txn.cursor(self._db["records"]), record)]
        forms = [form for data in parts for form in fmt.forms_of(data)]
        return complete([*forms, *more]), max(map(fmt.seq_of, parts), default=-1)

    def quarantine(self, id: bytes, reason: str) -> Located | None:
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
        """A record was read `hits` times more, after all that was put or read before."""
        if not self._seq:
            self._seq = _SEQ.unpack(self._txn.get(b"seq", bytes(8), db=self._db["meta"]))[0]
        self._seq += order.used(self._txn, self._db, id, hits, last, self._seq)

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


def _parts(cursor: Any, record: bytes) -> list[tuple[bytes, Located]]:
    found = []
    if cursor.set_range(record):
        for id, value in cursor:
            if id[:32] != record:
                break
            located = _located(value)
            assert located is not None
            found.append((id, located))
    return found


def _behind(record: Record) -> bytes:
    return record.namespace + record.context + record.tokens[:8]
