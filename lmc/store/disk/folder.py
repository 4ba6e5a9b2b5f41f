"""The folder of a store: its format, its locks, and the index made again when it must be."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lmdb
import xxhash

from lmc.store.disk import header as fmt
from lmc.store.disk import seal
from lmc.store.disk.catalog import Catalog
from lmc.store.disk.header import PAGE, HeaderError
from lmc.store.disk.segments import Segments, fsync_folder

FORMAT_FILE = "lmc-store.json"
_SCAN_BYTES = 1 << 20


class Folder:
    """An open folder. Several processes may have it open; one at a time changes it.

    Layout: `lmc-store.json` (format), `segments/NNNNNNNN.seg` (records), `index/` (LMDB), and
    lock files. All files are 0600, folders 0700.

    Args:
        root: made when missing.
        read_only: nothing in it is changed; an index that cannot be used is made in a temporary
            folder.

    Raises:
        ValueError: a folder that is no store and not empty, or one of a newer format.
        OSError: it cannot be made or opened.
    """

    identity = bytes(16)  # what records in it are marked with

    def __init__(self, root: Path, read_only: bool = False) -> None:
        self.root = root
        self.read_only = read_only
        self.counts: Counter[str] = Counter()
        self._writer_thread = threading.Lock()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._locks: dict[str, int] = {}
        damaged = _check_format(root, read_only)
        try:
            self._prepare(damaged)
        except BaseException as e:
            self._unlock()
            if isinstance(e, lmdb.Error):
                raise OSError(f"the index of {root} cannot be used or made: {e}") from e
            raise

    @contextlib.contextmanager
    def writing(self, patience_s: float = 10.0) -> Iterator[None]:
        """Be the one who changes the folder.

        Raises:
            TimeoutError: another process has been it for all of `patience_s` seconds.
            PermissionError: the folder is open for reading only.
        """
        if self.read_only:
            raise PermissionError("the store is open for reading only")
        until = time.monotonic() + patience_s
        if not self._writer_thread.acquire(timeout=patience_s):
            raise TimeoutError("another thread has been writing to the store all the time")
        try:
            fd = self._locks["writer.lock"]
            while not _try_lock(fd, fcntl.LOCK_EX):
                if time.monotonic() > until:
                    raise TimeoutError("another process has been writing to the store all the time")
                time.sleep(0.002)
            try:
                yield
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            self._writer_thread.release()

    def close(self) -> None:
        """Let go; the last user leaves the index in a state that the next one can trust."""
        if self.read_only:
            self.catalog.close()
            if self._temporary is not None:
                self._temporary.cleanup()
        else:
            fcntl.flock(self._locks["open.lock"], fcntl.LOCK_EX)
            alone = _try_lock(self._locks["users.lock"], fcntl.LOCK_EX)
            with contextlib.suppress(Exception):  # a disk that fails now: the index is made again
                if alone:
                    self.catalog.sync()
            last = self.catalog.close()
            with contextlib.suppress(OSError):
                if alone and last:
                    seal.seal(self.root / "index")
        self.segments.close()
        self._unlock()

    # -- parts -------------------------------------------------------------------------------

    def _prepare(self, damaged: bool) -> None:
        if self.read_only:
            self.segments = Segments(self.root / "segments", read_only=True)
            index = self.root / "index"
            if not seal.sealed(index):
                self._temporary = tempfile.TemporaryDirectory(prefix="lmc-index-")
                index = Path(self._temporary.name)
                catalog = Catalog(index)
                self._rebuild(catalog)
                catalog.close()
            self.catalog = Catalog(index, read_only=True)
            return
        _make_folder(self.root)
        _make_folder(self.root / "segments")
        if damaged:
            _write_format(self.root)
        for name in ("open.lock", "users.lock", "writer.lock"):
            self._locks[name] = os.open(self.root / name, os.O_RDWR | os.O_CREAT, 0o600)
        self.segments = Segments(self.root / "segments")
        index = self.root / "index"
        fcntl.flock(self._locks["open.lock"], fcntl.LOCK_EX)
        try:
            alone = _try_lock(self._locks["users.lock"], fcntl.LOCK_EX)
            if not alone:
                if not seal.complete(index):
                    raise OSError(f"the index in {index} is damaged, and others are using it")
                self.catalog = Catalog(index)
            elif seal.sealed(index) and not self._strangers(index):
                seal.break_seal(index)
                self.catalog = Catalog(index)
            else:
                if index.exists() or self.segments.numbers():
                    self.counts["index_rebuilt"] += 1
                seal.wipe(index)
                self.catalog = Catalog(index)
                try:
                    self._rebuild(self.catalog)
                except BaseException:
                    self.catalog.close()
                    raise
            fcntl.flock(self._locks["users.lock"], fcntl.LOCK_SH)
        finally:
            fcntl.flock(self._locks["open.lock"], fcntl.LOCK_UN)

    def _strangers(self, index: Path) -> bool:
        """Whether the segment files are others than those the index knows."""
        catalog = Catalog(index, read_only=True)
        known = {number: use.end for number, use in catalog.segments().items()}
        catalog.close()
        there = {number: self.segments.size(number) for number in self.segments.numbers()}
        return known != there

    def _rebuild(self, catalog: Catalog) -> None:
        """Index what is in the segment files, and cut off what is not whole."""
        others = [p for p in (self.root / "segments").iterdir() if not p.is_file()]
        self.counts["segments_unreadable"] += len(others)
        found: dict[bytes, int] = {}  # by id, the latest put
        for number in self.segments.numbers():
            try:
                with catalog.change() as change:
                    end = 0
                    for at, data in self._records(number):
                        header = fmt.unpack(data)
                        end = at + header.record_bytes
                        if data[fmt.STATE_AT] != fmt.LIVE or found.get(header.id, -1) > header.seq:
                            continue
                        found[header.id] = header.seq
                        change.add(header, (number, at), data)
                    change.segment_ends(number, end)
            except OSError:
                # It stays, and the index is made again whenever it can be: the disk may recover.
                self.counts["segments_unreadable"] += 1
                with catalog.change() as change:
                    change.unreadable(number)
                continue
            if self.read_only:
                continue
            with contextlib.suppress(OSError):  # then it is done when the index is made again
                if end == 0:
                    with catalog.change() as change:
                        change.drop_segment(number)
                    self.segments.unlink(number)
                elif self.segments.size(number) > end:
                    self.segments.truncate(number, end)

    def _records(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Records of one segment that are whole as far as their headers tell, by offset.

        From the last one back payloads are read too, until one is whole: a crash may have torn
        those behind it.
        """
        size = self.segments.size(number)
        found: list[tuple[int, bytes]] = []
        at = 0
        while at < size:
            data = self._header(number, at)
            if data is None:
                self.counts["headers_unreadable"] += 1
                at = self._next(number, at + PAGE, size)
                continue
            total = fmt.sizes(data)[1]
            if at + total > size:
                self.counts["records_torn"] += 1
                break
            found.append((at, data))
            at += total
        whole = len(found)
        for at, data in reversed(found):
            if self._verifies(number, at, data):
                break
            self.counts["records_torn"] += 1
            whole -= 1
        yield from found[:whole]

    def _header(self, number: int, at: int) -> bytes | None:
        data = self.segments.pread(number, at, PAGE)
        try:
            size, _ = fmt.sizes(data)
            if size > PAGE:
                data = self.segments.pread(number, at, size)
            fmt.unpack(data)
            return data[:size]
        except HeaderError:
            return None

    def _next(self, number: int, at: int, size: int) -> int:
        """The next page from `at` on that begins as a record does, or the end."""
        while at < size:
            block = self.segments.pread(number, at, _SCAN_BYTES)
            for i in range(0, len(block), PAGE):
                if block[i : i + len(fmt.MAGIC)] == fmt.MAGIC:
                    return at + i
            at += _SCAN_BYTES
        return size

    def _verifies(self, number: int, at: int, data: bytes) -> bool:
        header = fmt.unpack(data)
        at += header.payload_at
        for section in header.sections:
            if fmt.digest_of(self.segments.pread(number, at, section.length)) != section.digest:
                return False
            at += section.length
        return True

    def _unlock(self) -> None:
        for fd in self._locks.values():
            os.close(fd)
        self._locks = {}


def _check_format(root: Path, read_only: bool) -> bool:
    """Whether the format file must be written; ValueError for a folder that must be left alone."""
    file = root / FORMAT_FILE
    names = sorted(path.name for path in root.iterdir()) if root.exists() else []
    # Its new form may be there, of a crash or of another process that opens the folder just now.
    names = [name for name in names if not (name.startswith(FORMAT_FILE) and name != FORMAT_FILE)]
    if not names:
        if read_only:
            raise ValueError(f"got {root}, which holds no store")
        return True
    try:
        text = json.loads(file.read_bytes())
        version = int(text["lmc_store_format"])
        if text["xxh3_64"] != _version_digest(version):
            return True  # no lmc wrote this: the records say their format themselves
    except FileNotFoundError:
        if "segments" not in names:
            raise ValueError(
                f"got {root}, which is no store and not empty (it has {names[0]}); "
                "name a folder that is empty, missing or a store"
            ) from None
        return True
    except (ValueError, KeyError, TypeError, IsADirectoryError):
        return True
    if version > fmt.FORMAT:
        raise ValueError(
            f"{root} is a store of format {version}, which this version of lmc cannot read "
            f"(it reads {fmt.FORMAT}): use another folder, or a newer lmc"
        )
    if version < fmt.FORMAT:
        raise ValueError(
            f"{root} is a store of format {version}, which this version of lmc cannot read "
            f"(it reads {fmt.FORMAT}): use another folder, or remove this one: its chunks are "
            "computed again"
        )
    return False


def _make_folder(path: Path) -> None:
    """Make a folder, and those it is in, whose names are durable."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    fsync_folder(path.parent)


def _version_digest(version: int) -> str:
    return xxhash.xxh3_64(b"lmc-store %d" % version).hexdigest()


def _write_format(root: Path) -> None:
    text = {"lmc_store_format": fmt.FORMAT, "xxh3_64": _version_digest(fmt.FORMAT)}
    new = root / f"{FORMAT_FILE}.{os.getpid()}"
    fd = os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
        os.write(fd, json.dumps(text).encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    if (root / FORMAT_FILE).is_dir():
        (root / FORMAT_FILE).rmdir()  # only if there is nothing in it
    new.rename(root / FORMAT_FILE)
    fsync_folder(root)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
