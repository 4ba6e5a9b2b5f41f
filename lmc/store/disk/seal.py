"""Whether an index file may be used: only as its last user left it.

LMDB checks nothing that it reads: a page that is not what it was may mislead it, and a file that is
shorter than it thinks kills it. So its last user writes down a digest of the whole file, and the
next one compares; after a crash there is none.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import xxhash

from lmc.store.disk.segments import fsync_folder

_MAGIC, _VERSION = 0xBEEFC0DE, 1  # of LMDB's files
TABLES = 3  # version of what an index has: one that lacks a table is made again from the segments


def seal(folder: Path) -> None:
    """Write down what the index file is, now that nobody has it open."""
    data = folder / "data.mdb"
    seal = {"tables": TABLES, "bytes": data.stat().st_size, "xxh3_128": _file_digest(data)}
    new = folder / "seal.new"
    fd = os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
        os.write(fd, json.dumps(seal).encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    new.rename(folder / "seal")
    fsync_folder(folder)


def sealed(folder: Path) -> bool:
    """Whether the index file is what its last user left."""
    try:
        seal = json.loads((folder / "seal").read_bytes())
        data = folder / "data.mdb"
        return bool(
            complete(folder)
            and seal["tables"] == TABLES
            and seal["bytes"] == data.stat().st_size
            and seal["xxh3_128"] == _file_digest(data)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def break_seal(folder: Path) -> None:
    """The index is about to be used: as long as it is, only its users know what it is."""
    (folder / "seal").unlink(missing_ok=True)
    (folder / "lock.mdb").unlink(missing_ok=True)  # of users that are gone
    fsync_folder(folder)  # or a loss of power brings back a seal and the index that it is of


def complete(folder: Path) -> bool:
    """Whether the index file reaches as far as its own last page, which LMDB does not check."""
    try:
        with open(folder / "data.mdb", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            metas = [_meta(file.read(4096)) for _ in range(2)]
    except (OSError, struct.error):
        return False
    # Two pages take turns; the one of the later transaction counts.
    known = [meta for meta in metas if meta is not None]
    if len(known) < 2:
        return False
    _, last_page, page_bytes = max(known)
    return size >= (last_page + 1) * page_bytes


def wipe(folder: Path) -> None:
    """Remove an index that cannot be used."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        folder.unlink(missing_ok=True)


def _meta(page: bytes) -> tuple[int, int, int] | None:
    """(transaction, last page, bytes of a page) out of one of LMDB's two meta pages.

    As `MDB_meta` in mdb.c of LMDB 0.9 has it, behind a page header of 16 bytes: magic, version,
    address, size of the map, two databases of 48 bytes (of the first, the leading 4 bytes are the
    page size), last page, transaction.
    """
    magic, version, _, _ = struct.unpack_from("<IIQQ", page, 16)
    if (magic, version) != (_MAGIC, _VERSION):
        return None
    page_bytes = struct.unpack_from("<I", page, 40)[0]
    last_page, transaction = struct.unpack_from("<QQ", page, 40 + 2 * 48)
    return transaction, last_page, page_bytes


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
