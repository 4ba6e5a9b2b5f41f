"""What a failing disk, a full one or a damaged folder raise, and words to count it by."""

from __future__ import annotations

import errno
import struct

import lmdb

from lmc.store.disk.env import FULL_DISK, ClosedError, condemns
from lmc.store.disk.header import HeaderError
from lmc.store.disk.read import Damaged

FAULTS = (OSError, EOFError, lmdb.Error, HeaderError, struct.error, UnicodeDecodeError)


class NoRoomError(OSError):
    """What may go does not make enough room."""


class GoneError(OSError):
    """The folder was removed, or another has its name."""


class NoIndexError(OSError):
    """There is no index, or not the whole one yet."""


def kind_of(fault: Exception) -> str:
    """A short word for what went wrong, to count by."""
    number = getattr(fault, "errno", None) or getattr(fault, "code", None)
    for types, word in _WORDS:
        if isinstance(fault, types):
            return word
    if isinstance(fault, Damaged):
        return str(fault)
    if number in FULL_DISK:
        return "disk_full"
    if isinstance(fault, PermissionError) or number == errno.EROFS:
        return "read_only"
    return "index" if condemns(fault) or isinstance(fault, lmdb.Error) else "io_error"


_WORDS: tuple[tuple[type[Exception], str], ...] = (
    (ClosedError, "closed"),
    (NoIndexError, "no_index"),
    (GoneError, "gone"),
    (NoRoomError, "no_room"),
    (EOFError, "truncated"),
    (FileNotFoundError, "missing"),
    (TimeoutError, "timeout"),
    (lmdb.MapFullError, "index_full"),
    (lmdb.ReadersFullError, "readers_full"),
    (lmdb.DiskError, "disk_full"),
)
