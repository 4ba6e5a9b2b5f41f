"""What tells of parts: frames, one behind the other, under what they are asked for.

A frame is a part's id and its header. Of an entry only the latest frames are kept: what all prompts
begin with would have one of every prompt, and a lookup fetches all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blake3 import blake3

from lmc.store import wire
from lmc.store.record import Record
from lmc.store.remote.server import Key, Put, header_of
from lmc.store.wire import Header

ID_BYTES = 40
MOST = 128  # frames of an entry
MOST_BYTES = 128 << 10  # of them, but for the last
BELIEVED = 4 << 20  # bytes of an entry; one of more is nobody's that keeps to this

Parts = dict[bytes, Header]  # of a record, by id


class Entry:
    """What an entry tells, as far as it can be read."""

    def __init__(self, data: bytes) -> None:
        self.records: dict[bytes, Record] = {}  # by id, the oldest first
        self._of: dict[bytes, Parts] = {}
        self.damaged = len(data) > BELIEVED
        at = 0
        for frame in () if self.damaged else frames(data):
            at += len(frame)
            try:
                self.add(frame)
            except wire.HeaderError:
                self.damaged = True
        self.damaged |= at < len(data)

    def add(self, frame: bytes) -> None:
        """Raises HeaderError."""
        known = header_of(frame[ID_BYTES:])
        if known.id != frame[:ID_BYTES]:
            raise wire.HeaderError("another part's id")
        record = known.record
        self.records.pop(record.id, None)
        self.records[record.id] = record
        self._of.setdefault(record.id, {})[known.id] = known

    def of(self, id: bytes) -> Parts:
        """A record's parts."""
        return self._of.get(id, {})

    def parts(self) -> list[bytes]:
        """Ids of all parts."""
        return [part for parts in self._of.values() for part in parts]


def frames(data: bytes) -> Iterator[bytes]:
    """The frames of an entry, up to the first that is none."""
    at = 0
    while at < len(data):
        try:
            size = ID_BYTES + wire.sizes(data[at + ID_BYTES : at + ID_BYTES + 64])[0]
        except wire.HeaderError:
            return
        if at + size > len(data):
            return
        yield data[at : at + size]
        at += size


def merged(data: bytes, new: Sequence[bytes]) -> bytes:
    """An entry with new frames, in place of those of the same ids, within its bounds."""
    ids = {frame[:ID_BYTES] for frame in new}
    kept = [*(frame for frame in frames(data) if frame[:ID_BYTES] not in ids), *new][-MOST:]
    while len(kept) > 1 and sum(map(len, kept)) > MOST_BYTES:
        del kept[0]
    return b"".join(kept)


def by_entry(items: Sequence[Put]) -> dict[Key, list[int]]:
    """Of each entry that is added to, the items, by index, of which frames are added."""
    found: dict[Key, list[int]] = {}
    for i, item in enumerate(items):
        for key in item.entries:
            found.setdefault(key, []).append(i)
    return found


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
