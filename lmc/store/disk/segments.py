"""Segment files: numbered, appended to, never changed but for the state of a record."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lmc.store.disk.header import PAGE, STATE_AT

# What one system call reads: large enough for any disk, small enough to look up between two.
READ_BYTES = 8 << 20
_libc = ctypes.CDLL(None, use_errno=True)


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
        self._read_only = read_only
        self._lock = threading.Lock()
        self._fds: dict[tuple[int, bool], int] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._direct = True  # until the file system says no

    def numbers(self) -> list[int]:
        """Numbers of the files that are there, ascending."""
        names = (path.stem for path in self._folder.glob("*.seg"))
        return sorted(int(name) for name in names if len(name) == 8 and name.isdecimal())

    def create(self, number: int) -> None:
        """A new, empty file, whose name is durable."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        os.close(os.open(self._path(number), flags, 0o600))
        fsync_folder(self._folder)

    def size(self, number: int) -> int:
        """Bytes of a file; FileNotFoundError when it is gone."""
        return os.stat(self._path(number)).st_size

    def append(self, number: int, at: int, buffers: Sequence[np.ndarray]) -> None:
        """Write whole pages at the end `at` of a file, or raise with some of them written."""
        views = [memoryview(b) for b in buffers if b.nbytes]
        direct = _aligned(buffers)
        while views:
            with self._opened(number, direct, write=True) as fd:
                done = os.pwritev(fd, views[:512], at)
            at += done
            direct = direct and done % PAGE == 0  # cut short, as by a disk that is full
            while views and done >= views[0].nbytes:
                done -= views.pop(0).nbytes
            if done:
                views[0] = views[0][done:]

    def copy(self, source: int, at: int, target: int, to: int, length: int) -> None:
        """Append what lies at `at` in one file to another, whose end is `to`."""
        data = aligned(length)
        self.read(source, at, data)
        self.append(target, to, [data])

    def sync(self, number: int) -> None:
        """Return when what was appended is on the disk."""
        with self._opened(number, direct=False, write=True) as fd:
            os.fdatasync(fd)

    def truncate(self, number: int, end: int) -> None:
        """Cut off what was never acknowledged."""
        with self._opened(number, direct=False, write=True) as fd:
            os.ftruncate(fd, end)

    def mark(self, number: int, at: int, state: int) -> None:
        """Change the state of the record at `at`."""
        with self._opened(number, direct=False, write=True) as fd:
            os.pwrite(fd, bytes([state]), at + STATE_AT)

    def unlink(self, number: int) -> None:
        """Remove a file; who reads it goes on reading."""
        self._path(number).unlink(missing_ok=True)
        self.forget({number})

    def forget(self, numbers: set[int]) -> None:
        """Close files, so that those removed give their space back."""
        with self._lock:
            for key in [key for key in self._fds if key[0] in numbers]:
                os.close(self._fds.pop(key))
            for number in numbers & self._maps.keys():
                del self._maps[number]  # unmapped when the last view of it is gone

    def opened(self) -> set[int]:
        """Numbers of files that are open here."""
        with self._lock:
            return {number for number, _ in self._fds} | self._maps.keys()

    def view(self, number: int, at: int, length: int) -> np.ndarray | None:
        """Bytes `[at, at + length)` without a copy, uint8; None unless the page cache has them.

        A view of what is not in memory would read the disk in page faults, slowly, and kill the
        process where the disk fails.
        """
        with self._lock:
            mapped = self._maps.get(number)
            if mapped is None or len(mapped) < at + length:
                with self._opened(number, direct=False, locked=True) as fd:
                    end = os.fstat(fd).st_size
                    if end < at + length:
                        raise EOFError(f"the file ends at {end}, not at {at + length}")
                    mapped = self._maps[number] = mmap.mmap(fd, end, prot=mmap.PROT_READ)
        if self.size(number) < at + length:  # touching it would be fatal
            raise EOFError(f"the file ends before {at + length}")
        data = np.frombuffer(mapped, np.uint8, length, at)
        return data if _resident(data) else None

    def read(
        self,
        number: int,
        at: int,
        into: np.ndarray,
        cached: bool = False,
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        """Fill `into`, contiguous uint8, from `at` on.

        Args:
            cached: through the page cache; else past it, as far as pages are whole and the file
                system can.
            arrived: called with the number of bytes that are there, as they come.

        Raises:
            EOFError: the file is shorter.
        """
        whole = into.nbytes // PAGE * PAGE
        direct = not cached and at % PAGE == 0 and _aligned([into])
        done = 0
        while done < into.nbytes:
            direct = direct and done % PAGE == 0 and done < whole
            end = whole if direct else into.nbytes
            piece = into[done : min(done + READ_BYTES, end)]
            with self._opened(number, direct) as fd:
                n = os.preadv(fd, [memoryview(piece)], at + done)
            if n == 0:
                raise EOFError(f"the file ends at {at + done}")
            done += n
            if arrived is not None:
                arrived(done)

    def pread(self, number: int, at: int, length: int) -> bytes:
        """Up to `length` bytes from `at`, through the page cache."""
        with self._opened(number, direct=False) as fd:
            return os.pread(fd, length, at)

    def close(self) -> None:
        """Close all files."""
        self.forget(self.opened())

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.seg"

    @contextlib.contextmanager
    def _opened(
        self, number: int, direct: bool, write: bool = False, locked: bool = False
    ) -> Iterator[int]:
        """A descriptor of the file, kept open."""
        if write and self._read_only:
            raise PermissionError("the store is open for reading only")
        key = (number, direct and self._direct)
        with contextlib.nullcontext() if locked else self._lock:
            if key not in self._fds:
                flags = os.O_RDONLY if self._read_only else os.O_RDWR
                if key[1]:
                    try:
                        self._fds[key] = os.open(self._path(number), flags | os.O_DIRECT)
                    except FileNotFoundError:
                        raise
                    except OSError:  # tmpfs, some network file systems
                        self._direct = False
                        key = (number, False)
                if key not in self._fds:
                    self._fds[key] = os.open(self._path(number), flags)
            # A duplicate: another thread may close the file while this one reads.
            fd = os.dup(self._fds[key])
        try:
            yield fd
        finally:
            os.close(fd)


def aligned(nbytes: int) -> np.ndarray:
    """Uninitialised memory that O_DIRECT takes, uint8 `[nbytes]`, in whole pages."""
    return np.frombuffer(mmap.mmap(-1, max(PAGE, -(-nbytes // PAGE) * PAGE)), np.uint8)[:nbytes]


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


def _resident(data: np.ndarray) -> bool:
    """Whether all pages of mapped memory are in the page cache."""
    first = data.ctypes.data // PAGE * PAGE
    length = data.ctypes.data + data.nbytes - first
    pages = (ctypes.c_ubyte * -(-length // PAGE))()
    if _libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(length), pages) != 0:
        return False
    return bool((np.frombuffer(pages, np.uint8) & 1).all())
