"""Segment files: numbered, appended to, never changed but for the state of a record."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmc.store.disk.files import File, Files, name
from lmc.store.disk.header import PAGE, STATE_AT, Header, same, unpack

# What one system call reads: large enough for any disk, small enough to look up between two. What
# is copied out of the page cache is checked while it is still in the processor's own.
READ_BYTES = (4 << 20) + 2 * PAGE
COPY_BYTES = 256 << 10
IOV_MAX = 512
_NAME = re.compile(r"([0-9]{8})\.seg")


@dataclass(frozen=True)
class Located:
    """Where a record is: segment, offset, and its header's bytes."""

    segment: int
    at: int
    header: bytes

    def unpack(self) -> Header:
        """Raises HeaderError where the index is damaged."""
        return unpack(self.header)


class Segments:
    """The files of one folder, by number; a number is never used twice.

    Files are opened when first needed, with O_DIRECT for what the page cache does not hold where
    the file system can, and some stay open: the last used ones, as long as they are in the folder.
    Nothing but plain files of the folder's owner is opened. Errors of the disk come through as
    OSError.

    Args:
        folder: exists.
        read_only: nothing is ever written.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self._read_only = read_only
        self._files = Files(folder, read_only)

    def numbers(self) -> list[int]:
        """Numbers of the files that are there, ascending."""
        try:
            place = self._files.folder()
        except FileNotFoundError:
            return []
        with os.scandir(place.fd) as entries:
            names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
        return sorted(int(found[1]) for n in names if (found := _NAME.fullmatch(n)))

    def create(self, number: int) -> bool:
        """A new, empty file, whose name is durable; False when there is something of that name."""
        place = self._files.folder()
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
        try:
            os.close(os.open(name(number), flags, 0o600, dir_fd=place.fd))
        except FileExistsError:
            return False
        os.fsync(place.fd)
        return True

    def there(self) -> bool:
        """Whether the folder is still the one that was opened, under its name."""
        return self._files.there()

    def size(self, number: int) -> int:
        """Bytes of a file; FileNotFoundError when it is gone."""
        place = self._files.folder()
        return os.stat(name(number), dir_fd=place.fd, follow_symlinks=False).st_size

    def appendable(self, number: int) -> int | None:
        """Bytes of a file, by no other name than its own; None where it has another."""
        file = self._written(number)
        found = os.fstat(file.fd)
        return found.st_size if found.st_nlink == 1 else None

    def free(self) -> int:
        """Bytes that the file system has left for anybody."""
        place = self._files.folder()
        found = os.fstatvfs(place.fd)
        return found.f_bfree * found.f_frsize

    def append(self, number: int, at: int, buffers: Sequence[np.ndarray]) -> None:
        """Write whole pages at the end `at` of a file, or raise with some of them written.

        Args:
            buffers: `aligned` ones, or the file is written through the page cache from now on.
        """
        views = [b.data for b in buffers]
        direct = True
        while views:
            file = self._written(number, direct)
            try:
                done = os.pwritev(file.fd, views[:IOV_MAX], at)
            except OSError as e:
                if not self._files.not_direct(number, file, e):
                    raise
                continue
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
        file = self._written(number)
        os.fdatasync(file.fd)

    def truncate(self, number: int, end: int) -> None:
        """Cut off what was never acknowledged."""
        file = self._written(number)
        os.ftruncate(file.fd, end)

    def mark(self, number: int, at: int, state: int, header: bytes) -> bool:
        """Change the state of the record at `at`; False when its header is another than this."""
        file = self._written(number)
        if not same(os.pread(file.fd, len(header), at), header):
            return False
        os.pwrite(file.fd, bytes([state]), at + STATE_AT)
        return True

    def mark_all(self, places: Iterable[Located], state: int) -> int:
        """Mark records where they are what is known of them; of how many their headers are others.

        What cannot be written stays as it is: an index made again has it, alive, once more.
        """
        others = 0
        for located in places:
            with contextlib.suppress(OSError):
                others += not self.mark(located.segment, located.at, state, located.header)
        return others

    def unlink(self, number: int) -> None:
        """Remove a file; who reads it goes on reading."""
        place = self._files.folder()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name(number), dir_fd=place.fd)
        self.forget({number})

    def forget(self, numbers: set[int]) -> None:
        """Close files, so that those removed give their space back."""
        self._files.forget(numbers)

    def opened(self) -> set[int]:
        """Numbers of files that are open here."""
        return self._files.numbers()

    def view(self, number: int, at: int, length: int) -> np.ndarray | None:
        """Bytes `[at, at + length)` without a copy, uint8; None unless the page cache has them.

        A view of what is not in memory would read the disk in page faults, slowly, and kill the
        process where the disk fails or the file was cut short.
        """
        mapped = self._files.mapped(number, at + length)
        if mapped is None or not mapped.resident(at, length):
            return None
        return mapped.data[at : at + length]

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
        done = 0
        while done < total:
            file = self._files.opened(number, direct)
            try:
                n = os.preadv(file.fd, _first(views, most), at + done)
            except OSError as e:
                if not self._files.not_direct(number, file, e):
                    raise
                continue
            if n == 0:
                raise EOFError(f"the file ends at {at + done}")
            done += n
            _advance(views, n)
            if last is not None and done >= total:
                into[-1][-rest:] = last[:rest]
            if arrived is not None:
                arrived(total if done >= total else min(done, total - rest))
            direct = direct and n % PAGE == 0  # cut short

    def pread(self, number: int, at: int, length: int) -> bytes:
        """Up to `length` bytes from `at`, through the page cache."""
        file = self._files.opened(number, direct=False)
        return os.pread(file.fd, length, at)

    def data_from(self, number: int, at: int) -> int:
        """Where from page `at` on the first page is that is no hole; the end where none is."""
        file = self._files.opened(number, direct=False)
        try:
            return max(at, os.lseek(file.fd, at, os.SEEK_DATA) // PAGE * PAGE)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return self.size(number)
            raise

    def close(self) -> None:
        """Close all files; they are opened again if they are needed."""
        self._files.close()

    def _written(self, number: int, direct: bool = False) -> File:
        """The file, to write to it."""
        if self._read_only:
            raise PermissionError("the store is open for reading only")
        return self._files.opened(number, direct)


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
