"""What a failing disk, a full one or a damaged folder raise, and words to count it by."""

from __future__ import annotations

import errno

import lmdb

from lmc.store.disk.header import HeaderError
from lmc.store.disk.read import Damaged

FAULTS = (OSError, EOFError, lmdb.Error, HeaderError)


class NoRoomError(OSError):
    """What may go does not make enough room."""


def kind_of(fault: Exception) -> str:
    """A short word for what went wrong, to count by."""
    if isinstance(fault, Damaged):
        return str(fault)
    if isinstance(fault, HeaderError):
        return "index"
    if isinstance(fault, EOFError):
        return "truncated"
    if isinstance(fault, FileNotFoundError):
        return "missing"
    if isinstance(fault, NoRoomError):
        return "no_room"
    if isinstance(fault, TimeoutError):
        return "timeout"
    if isinstance(fault, PermissionError) or getattr(fault, "errno", None) == errno.EROFS:
        return "read_only"
    if getattr(fault, "errno", None) == errno.ENOSPC or isinstance(fault, lmdb.DiskError):
        return "disk_full"
    return "index" if isinstance(fault, lmdb.Error) else "io_error"
