"""What tells of parts: headers, one behind the other, under what they are asked for."""

from __future__ import annotations

from blake3 import blake3

from lmc.store import wire
from lmc.store.record import Record
from lmc.store.remote.server import Key, header_of
from lmc.store.wire import Header

Parts = dict[bytes, Header]  # of a record, by id


class Entry:
    """Headers of parts, one behind the other, as a server has them under one key."""

    def __init__(self, data: bytes) -> None:
        self.records: dict[bytes, Record] = {}  # by id, the oldest first
        self._of: dict[bytes, Parts] = {}
        self.damaged = False
        at = 0
        while at < len(data) and not self.damaged:
            try:
                size, _ = wire.sizes(data[at : at + 64])
                self.add(data[at : at + size])
                at += size
            except wire.HeaderError:
                self.damaged = True  # it says no more of what is behind it

    def add(self, header: bytes) -> None:
        """Raises HeaderError."""
        known = header_of(header)
        record = known.record
        self.records.setdefault(record.id, record)
        self._of.setdefault(record.id, {})[known.id] = known

    def of(self, id: bytes) -> Parts:
        """A record's parts."""
        return self._of.get(id, {})

    def parts(self) -> list[bytes]:
        """Ids of all parts."""
        return [part for parts in self._of.values() for part in parts]


def content_key(namespace: bytes, key: bytes) -> Key:
    return Key("key", blake3(namespace + key).digest(16))


def behind_key(namespace: bytes, context: bytes, first: bytes) -> Key:
    return Key("behind", blake3(namespace + context + first).digest(16))


def keys_of(record: Record) -> list[Key]:
    """The entries that tell of a record."""
    digest = wire.namespace_digest(record.namespace)
    keys = [] if record.tail else [content_key(digest, record.key)]
    if record.origin != "blended":
        keys.append(behind_key(digest, record.context, record.tokens[:8]))
    return keys or [content_key(digest, record.key)]


def home_of(record: Record) -> Key:
    """The entry that tells of all parts of a record, and of its variants where it has any."""
    return keys_of(record)[0]
