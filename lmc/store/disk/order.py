"""When records were last put or read: the tables of the index that eviction goes by.

Order is counted, not timed: a clock may be set back. Puts and reads of a folder draw from the same
numbers, and a record has one place among them, that of the latest.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmc.store.disk.header import Header

TABLES = ("used", "order")  # id -> Use; tick and id -> About
_USE = struct.Struct("<QdQ")
_ABOUT = struct.Struct("<QId8s8s")
_TICK = struct.Struct(">Q")


@dataclass
class Use:
    """How often a record was read, and when last.

    Attributes:
        last: seconds since 1970, for people.
        tick: the place in the folder's order of puts and reads.
    """

    hits: int = 0
    last: float = 0.0
    tick: int = 0


class About(NamedTuple):
    """What an eviction policy may be told of a record.

    Attributes:
        size: bytes of the record in its file.
        T: tokens.
        created: seconds since 1970.
        begins, ends: 8 bytes of the context's digest, in front of it and behind it.
    """

    size: int
    T: int
    created: float
    begins: bytes
    ends: bytes


Since = tuple[bytes, bytes, bytes]  # where to go on, a record's id, and what it is about


def about(value: bytes) -> About:
    """What a row of `order` says."""
    return About(*_ABOUT.unpack(value))


def use_of(value: bytes | None) -> Use:
    """What a row of `used` says; of none, that it was never read."""
    return Use(*_USE.unpack(value)) if value else Use()


def since(txn: Any, after: bytes, most: int) -> list[Since]:
    """Of the table `order`, at most so many rows behind `after`, in their order."""
    found: list[Since] = []
    cursor = txn.cursor()
    if most <= 0 or not cursor.set_range(after):
        return found
    for key, value in cursor:
        if key != after:
            found.append((key, key[_TICK.size :], value))
            if len(found) == most:
                break
    return found


def tick_of(after: bytes) -> int:
    """How far in the order one is that goes on behind `after`."""
    return int(_TICK.unpack_from(after)[0]) if after else -1


def enter(txn: Any, db: Mapping[str, Any], id: bytes, header: Header) -> None:
    """A record is put: it comes last. One that was moved has kept its uses, and its place."""
    use = use_of(txn.get(id, db=db["used"]))
    tick = max(use.tick, header.seq)
    record = header.record
    row = _ABOUT.pack(
        header.record_bytes, record.T, header.created, record.context[:8], record.context_after[:8]
    )
    txn.put(id, _USE.pack(use.hits, use.last, tick), db=db["used"])
    txn.put(_TICK.pack(tick) + id, row, db=db["order"])


def leave(txn: Any, db: Mapping[str, Any], id: bytes, keep_use: bool) -> None:
    """A record is gone, or about to come back."""
    use = use_of(txn.get(id, db=db["used"]))
    txn.delete(_TICK.pack(use.tick) + id, db=db["order"])
    if not keep_use:
        txn.delete(id, db=db["used"])


def used(txn: Any, db: Mapping[str, Any], id: bytes, hits: int, last: float, tick: int) -> bool:
    """A record was read `hits` times more, and comes last now; False when it is gone."""
    use = use_of(txn.get(id, db=db["used"]))
    row = txn.pop(_TICK.pack(use.tick) + id, db=db["order"])
    if row is None:
        return False
    value = _USE.pack(use.hits + hits, max(use.last, last), tick)
    txn.put(id, value, db=db["used"])
    txn.put(_TICK.pack(tick) + id, row, db=db["order"])
    return True
