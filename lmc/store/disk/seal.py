"""Whether an index file may be used: only as its last user left it.

LMDB checks nothing that it reads: a page that is not what it was may mislead it, and a file that is
shorter than it thinks kills it. So its last user writes down a digest of the whole file, and the
next one compares; after a crash there is none.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import xxhash

from lmc.store.disk.place import write_file

_MAGIC, _VERSION = 0xBEEFC0DE, 1  # of LMDB's files
_PAGES = range(9, 17)  # their sizes, as powers of two
TABLES = 3  # version of what an index has: one that lacks a table is made again from the segments
_SEAL_BYTES = 4096


def seal(folder: Path, identity: bytes, nbytes: int) -> None:
    """Write down what the index file is, now that nobody has it open.

    Args:
        nbytes: as far as its last page; behind it there is nothing but a hole.
    """
    with _within(folder) as place:
        fd = _open(place, "data.mdb", os.O_RDWR)
        try:
            os.ftruncate(fd, nbytes)
            text = _text(identity, os.fstat(fd).st_size, _digest(fd))
        finally:
            os.close(fd)
        write_file(place, "seal", text)


def sealed(folder: Path, copy: int | None = None) -> bytes | None:
    """Of an index that is what its last user left, the identity of its folder.

    Args:
        copy: descriptor of a file, which becomes what was compared.
    """
    try:
        with _within(folder) as place:
            fd = _open(place, "seal")
            try:
                text = os.read(fd, _SEAL_BYTES)
            finally:
                os.close(fd)
            fd = _open(place, "data.mdb")
            try:
                identity = bytes.fromhex(json.loads(text)["identity"])
                size = os.fstat(fd).st_size
                same = _complete(fd) and text == _text(identity, size, _digest(fd, copy))
            finally:
                os.close(fd)
        return identity if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _text(identity: bytes, size: int, digest: str) -> bytes:
    seal = {"tables": TABLES, "identity": identity.hex(), "bytes": size, "xxh3_128": digest}
    return json.dumps(seal).encode()


def break_seal(folder: Path) -> None:
    """The index is about to be used: as long as it is, only its users know what it is."""
    with _within(folder) as place:
        for name in ("seal", "lock.mdb"):  # the latter of users that are gone
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=place)
        os.fsync(place)  # or a loss of power brings back a seal and the index that it is of


def complete(folder: Path) -> bool:
    """Whether the index file reaches as far as its own last page, which LMDB does not check."""
    try:
        with _within(folder) as place:
            fd = _open(place, "data.mdb")
            try:
                return _complete(fd)
            finally:
                os.close(fd)
    except OSError:
        return False


def _complete(fd: int) -> bool:
    size = os.fstat(fd).st_size
    first = _meta(os.pread(fd, 4096, 0))
    if first is None:
        return False
    # Two pages take turns; the one of the later transaction counts. Pages are the system's.
    second = _meta(os.pread(fd, 4096, first[2]))
    if second is None or second[2] != first[2]:
        return False
    _, last_page, page_bytes = max(first, second)
    return size >= (last_page + 1) * page_bytes


def _meta(page: bytes) -> tuple[int, int, int] | None:
    """(transaction, last page, bytes of a page) out of one of LMDB's two meta pages.

    As `MDB_meta` in mdb.c of LMDB 0.9 has it, behind a page header of 16 bytes: magic, version,
    address, size of the map, two databases of 48 bytes (of the first, the leading 4 bytes are the
    page size), last page, transaction.
    """
    try:
        magic, version, _, _ = struct.unpack_from("<IIQQ", page, 16)
        page_bytes = struct.unpack_from("<I", page, 40)[0]
        last_page, transaction = struct.unpack_from("<QQ", page, 40 + 2 * 48)
    except struct.error:
        return None
    if (magic, version) != (_MAGIC, _VERSION) or page_bytes not in [1 << n for n in _PAGES]:
        return None
    return transaction, last_page, page_bytes


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _open(place: int, name: str, access: int = os.O_RDONLY) -> int:
    """A plain file of a folder, to be read."""
    flags = access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=place)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{name} is no plain file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _digest(fd: int, copy: int | None = None) -> str:
    digest = xxhash.xxh3_128()
    at = 0
    while block := os.pread(fd, 1 << 20, at):
        digest.update(block)
        if copy is not None:
            os.pwrite(copy, block, at)
        at += len(block)
    return digest.hexdigest()
