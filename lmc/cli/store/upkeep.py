"""Upkeep of a folder of the disk tier: everything in it read once, and space given back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lmc.cli.store.inspect import Entry, settled
from lmc.store.disk.faults import FAULTS, kind_of
from lmc.store.disk.folder import Folder
from lmc.store.disk.read import Damaged, verify
from lmc.store.disk.room import SEGMENTS, Room
from lmc.store.disk.segments import Located

# What is forgotten in one go: others want to write, too.
_BATCH = 1000


@dataclass(frozen=True)
class Fault:
    """A record that is not what was put, or cannot be read.

    Attributes:
        reason: header, payload, index, truncated, missing or io_error.
        quarantined: it will not be served again. False where the folder or its disk cannot be
            written, and where the index or the disk are at fault rather than the record.
    """

    id: bytes
    segment: int
    reason: str
    quarantined: bool


@dataclass
class Verified:
    """What was read: records, their bytes on the disk, those evicted meanwhile, and faults."""

    records: int = 0
    bytes: int = 0
    gone: int = 0
    faults: list[Fault] = field(default_factory=list)


def verify_all(folder: Folder, done: Callable[[int], None] = lambda nbytes: None) -> Verified:
    """Read every record past the page cache, and quarantine what does not match its digests.

    Args:
        done: called with the bytes of each record that was read.
    """
    room = _room(folder)
    found = Verified()
    at: Located | None = None  # what was read last

    def read(located: Located) -> int:
        nonlocal at
        at = located
        header = located.unpack()
        verify(folder.segments, located, header)
        return header.record_bytes

    places = sorted((at.segment, at.at, id) for id, at in folder.catalog.records())
    for segment, _, id in places:
        try:
            nbytes = settled(folder, id, read)
        except (Damaged, *FAULTS) as e:
            gone = _quarantine(folder, room, id, at, e)
            found.faults.append(Fault(id, segment, kind_of(e), gone))
            continue
        if nbytes is None:
            found.gone += 1
            continue
        found.records += 1
        found.bytes += nbytes
        done(nbytes)
    return found


def to_forget(folder: Folder, found: Iterable[Entry], live_bytes: int | None) -> list[bytes]:
    """Ids of records to forget, the least recently used first.

    Args:
        found: what may go.
        live_bytes: no more goes than must until the folder holds at most so many; None: all of it.
    """
    live = sum(use.live for use in folder.catalog.segments().values())
    ids = []
    for entry in sorted(found, key=lambda entry: (entry.use.tick, entry.header.seq)):
        if live_bytes is not None and live <= live_bytes:
            break
        ids.append(entry.id)
        live -= entry.header.record_bytes
    return ids


def forget(folder: Folder, ids: Sequence[bytes]) -> int:
    """Forget records; how many there were. Raises OSError when the folder cannot be written."""
    room = _room(folder)
    forgotten = 0
    for start in range(0, len(ids), _BATCH):
        with folder.writing():
            forgotten += room.evict(ids[start : start + _BATCH])
    return forgotten


def forget_quarantined(folder: Folder) -> int:
    """Forget which records were quarantined; how many there were."""
    with folder.writing(), folder.catalog.change() as change:
        known = len(folder.catalog.quarantined())
        change.forget_quarantined()
    return known


def compact(folder: Folder) -> None:
    """Give back the space of all that is dead. Raises OSError when the folder cannot be written.

    One file after another, so that others can write in between.
    """
    room = _room(folder)
    more = True
    while more:
        with folder.writing():
            more = room.compact_one(folder.catalog.segments())


def _quarantine(
    folder: Folder, room: Room, id: bytes, located: Located | None, fault: Exception
) -> bool:
    """Whether a record that is at fault itself will not be served again."""
    if folder.read_only or not isinstance(fault, Damaged | EOFError | FileNotFoundError):
        return False
    try:
        with folder.writing():
            return room.quarantine(id, located, kind_of(fault))
    except FAULTS as e:
        folder.index_fault(e)
        return False


def _room(folder: Folder) -> Room:
    """Files that are made here are as large as those that are there.

    What capacity its users gave the folder is not written anywhere.
    """
    largest = max((use.end for use in folder.catalog.segments().values()), default=0)
    return Room(folder, max(1 << 20, SEGMENTS * largest), "lru", folder.counts)
