"""Segment files: numbered, appended to, never changed but for the state of a record."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lmc.store.disk.header import PAGE, STATE_AT

# What one system call reads: large enough for any disk, small enough to look up between two. What
# is copied out of the page cache is checked while it is still in the processor's own.
READ_BYTES = (4 << 20) + 2 * PAGE
COPY_BYTES = 256 << 10
IOV_MAX = 512
_mincore = ctypes.CDLL(None).mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


class _File:
    """An open file, closed when nobody has it any more: who reads may be another thread."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # also at exit
        close(self.fd)


class Segments:
    """The files of one folder, by number; a number is never used twice.

    Files are opened when first needed, with O_DIRECT for what the page cache does not hold where
    the file system can, and stay open. Errors of the disk come through as OSError.

    Args:
        folder: exists.
        read_only: nothing is ever written.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self._folder = folder
        self._root = str(folder)  # a Path takes longer to join than the kernel to look up
        self._read_only = read_only
        self._lock = threading.Lock()
        self._files: dict[tuple[int, bool], _File] = {}
        self._maps: dict[int, tuple[np.ndarray, int]] = {}  # and its address
        self._direct = True  # until the file system says no

    def numbers(self) -> list[int]:
        """Numbers of the files that are there, ascending."""
        paths = [path for path in self._folder.glob("*.seg") if path.is_file()]
        names = [path.stem for path in paths if len(path.stem) == 8 and path.stem.isdecimal()]
        return sorted(int(name) for name in names)

    def create(self, number: int) -> bool:
        """A new, empty file, whose name is durable; False when there is something of that name."""
        try:
            os.close(os.open(self._path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        fsync_folder(self._folder)
        return True

    def size(self, number: int) -> int:
        """Bytes of a file; FileNotFoundError when it is gone."""
        return os.stat(self._path(number)).st_size

    def append(self, number: int, at: int, buffers: Sequence[np.ndarray]) -> None:
        """Write whole pages at the end `at` of a file, or raise with some of them written."""
        views = [b.data for b in buffers if b.nbytes]
        direct = _aligned(buffers)
        while views:
            file = self._opened(number, direct, write=True)
            done = os.pwritev(file.fd, views[:IOV_MAX], at)
            at += done
            direct = direct and done % PAGE == 0  # cut short, as by a disk that is full
            _advance(views, done)

    def copy(self, source: int, at: int, target: int, to: int, length: int) -> None:
        """Append what lies at `at` in one file to another, whose end is `to`."""
        data = aligned(length)
        self.read(source, at, [data])
        self.append(target, to, [data])

    def sync(self, number: int) -> None:
        """Return when what was appended is on the disk."""
        os.fdatasync(self._opened(number, direct=False, write=True).fd)

    def truncate(self, number: int, end: int) -> None:
        """Cut off what was never acknowledged."""
        os.ftruncate(self._opened(number, direct=False, write=True).fd, end)

    def mark(self, number: int, at: int, state: int) -> None:
        """Change the state of the record at `at`."""
        file = self._opened(number, direct=False, write=True)
        os.pwrite(file.fd, bytes([state]), at + STATE_AT)

    def unlink(self, number: int) -> None:
        """Remove a file; who reads it goes on reading."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(number))
        self.forget({number})

    def forget(self, numbers: set[int]) -> None:
        """Close files, so that those removed give their space back."""
        with self._lock:
            for key in [key for key in self._files if key[0] in numbers]:
                del self._files[key]
            for number in numbers & self._maps.keys():
                del self._maps[number]  # unmapped when the last view of it is gone

    def opened(self) -> set[int]:
        """Numbers of files that are open here."""
        with self._lock:
            return {number for number, _ in self._files} | self._maps.keys()

    def view(self, number: int, at: int, length: int) -> np.ndarray | None:
        """Bytes `[at, at + length)` without a copy, uint8; None unless the page cache has them.

        A view of what is not in memory would read the disk in page faults, slowly, and kill the
        process where the disk fails.
        """
        with self._lock:
            mapped, address = self._maps.get(number, (None, 0))
            if mapped is None or len(mapped) < at + length:
                fd = self._opened(number, direct=False, locked=True).fd
                end = os.fstat(fd).st_size
                if end < at + length:
                    raise EOFError(f"the file ends at {end}, not at {at + length}")
                mapped = np.frombuffer(mmap.mmap(fd, end, prot=mmap.PROT_READ), np.uint8)
                address = mapped.ctypes.data
                self._maps[number] = mapped, address
        if self.size(number) < at + length:  # touching it would be fatal
            raise EOFError(f"the file ends before {at + length}")
        return mapped[at : at + length] if _resident(address + at, length) else None

    def read(
        self,
        number: int,
        at: int,
        into: Sequence[np.ndarray],
        cached: bool = False,
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        """Fill buffers, contiguous uint8, one after another from `at` on.

        All but the last are whole pages, and so is what the file has there.

        Args:
            cached: through the page cache; else past it where the file system can.
            arrived: called with the number of bytes that are there, as they come.

        Raises:
            EOFError: the file is shorter.
        """
        views = [b.data for b in into]
        total = sum(view.nbytes for view in views)
        direct = not cached and at % PAGE == 0 and _aligned(into)
        rest = total % PAGE if direct else 0
        last = aligned(PAGE) if rest else None  # O_DIRECT reads whole pages
        if last is not None:
            views[-1:] = [views[-1][:-rest], last.data]
        most = COPY_BYTES if cached else READ_BYTES
        file = self._opened(number, direct)
        done = 0
        while done < total:
            n = os.preadv(file.fd, _first(views, most), at + done)
            if n == 0:
                raise EOFError(f"the file ends at {at + done}")
            done += n
            _advance(views, n)
            if last is not None and done >= total:
                into[-1][-rest:] = last[:rest]
            if arrived is not None:
                arrived(total if done >= total else min(done, total - rest))
            if n % PAGE:  # cut short
                file = self._opened(number, direct=False)

    def pread(self, number: int, at: int, length: int) -> bytes:
        """Up to `length` bytes from `at`, through the page cache."""
        return os.pread(self._opened(number, direct=False).fd, length, at)

    def data_from(self, number: int, at: int) -> int:
        """Where from page `at` on the first page is that is no hole; the end where none is."""
        fd = self._opened(number, direct=False).fd
        try:
            return max(at, os.lseek(fd, at, os.SEEK_DATA) // PAGE * PAGE)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return self.size(number)
            raise

    def close(self) -> None:
        """Close all files."""
        self.forget(self.opened())

    def _path(self, number: int) -> str:
        return f"{self._root}/{number:08d}.seg"

    def _opened(
        self, number: int, direct: bool, write: bool = False, locked: bool = False
    ) -> _File:
        """The file, kept open."""
        if write and self._read_only:
            raise PermissionError("the store is open for reading only")
        key = (number, direct and self._direct)
        with contextlib.nullcontext() if locked else self._lock:
            if key not in self._files:
                flags = os.O_RDONLY if self._read_only else os.O_RDWR
                if key[1]:
                    try:
                        fd = os.open(self._path(number), flags | os.O_DIRECT)
                    except FileNotFoundError:
                        raise
                    except OSError:  # tmpfs, some network file systems
                        self._direct = False
                        key = (number, False)
                if not key[1]:
                    fd = os.open(self._path(number), flags)
                self._files[key] = _File(fd)
            return self._files[key]


def aligned(nbytes: int) -> np.ndarray:
    """Memory that O_DIRECT takes, uint8 `[nbytes]`, with whatever was in it before."""
    memory = np.empty(nbytes + PAGE, np.uint8)  # which comes back without page faults if it can
    skip = -memory.ctypes.data % PAGE
    return memory[skip : skip + nbytes]


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _aligned(buffers: Sequence[np.ndarray]) -> bool:
    """Whether O_DIRECT may be given these: addresses of whole sectors (512)."""
    return all(b.ctypes.data % 512 == 0 for b in buffers)


def _advance(views: list[memoryview], done: int) -> None:
    """Take the first `done` bytes off."""
    while views and done >= views[0].nbytes:
        done -= views.pop(0).nbytes
    if done:
        views[0] = views[0][done:]


def _first(views: Sequence[memoryview], most: int) -> list[memoryview]:
    """Of buffers, the first `most` bytes."""
    out = []
    for view in views[:IOV_MAX]:
        out.append(view[:most])
        most -= out[-1].nbytes
        if most <= 0:
            break
    return out


def _resident(address: int, length: int) -> bool:
    """Whether all pages of mapped memory are in the page cache."""
    first = address // PAGE * PAGE
    length += address - first
    pages = np.zeros(-(-length // PAGE), np.uint8)
    found = pages.ctypes.data
    # What is not there begins as a rule with its first page, and to ask for one is quick.
    if _mincore(first, PAGE, found) != 0 or not pages[0] & 1:
        return False
    return _mincore(first, length, found) == 0 and bool(np.bitwise_and.reduce(pages) & 1)
