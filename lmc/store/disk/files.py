"""Open segment files: a few at a time, plain files of the folder's owner, none that is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from lmc.store.disk.maps import Map

# Open at a time: the rest of the process needs descriptors too. Maps have none.
MOST_FILES = 64
MOST_MAPS = 1024
# How often files are closed that others removed, whose space is not free before: always, and when
# another is opened.
SWEEP_S = 0.5
SWEEP_OPENING_S = 0.02


class File:
    """An open file, closed when nobody has it any more: who reads may be another thread.

    Who hands `fd` to the system holds on to the file until the call returns, or the number may be
    another file's by then.

    Attributes:
        direct: past the page cache.
    """

    def __init__(self, fd: int, direct: bool = False) -> None:
        self.fd = fd
        self.direct = direct

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # also at exit
        close(self.fd)


class Files:
    """The files of one folder that are open or mapped, by number: those used last.

    Args:
        folder: exists.
        read_only: they are opened for reading.
    """

    def __init__(self, folder: Path, read_only: bool) -> None:
        self._folder = folder
        self._read_only = read_only
        self._lock = threading.Lock()
        self._place: File | None = None
        self._owners: set[int] = set()
        self._open: OrderedDict[tuple[int, bool], File] = OrderedDict()  # what was used last: last
        self._maps: OrderedDict[int, Map] = OrderedDict()
        # O_DIRECT and maps, until the system says no; to the former it may say so of one file only.
        self._direct = self._mappable = True
        self._buffered: set[int] = set()
        self._most = max(4, min(MOST_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
        self._swept = 0.0  # `time.monotonic()`
        self._sweeper: threading.Thread | None = None
        self._closed = threading.Event()

    def folder(self) -> File:
        """The folder; what is in it is named from here, wherever its path leads by now."""
        place = self._place
        if place is None:
            place = File(os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW))
            self._owners = {os.geteuid(), os.fstat(place.fd).st_uid}
            self._place = place
        return place

    def there(self) -> bool:
        """Whether what has the folder's name is the folder."""
        ours = os.fstat(self.folder().fd)
        try:
            found = os.stat(self._folder, follow_symlinks=False)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)

    def opened(self, number: int, direct: bool) -> File:
        """The file; FileNotFoundError for what is no plain file of the folder's owner.

        Args:
            direct: past the page cache, where the system can.
        """
        key = (number, direct and self._direct and number not in self._buffered)
        with self._lock:
            file = self._open.get(key)
            if file is not None:
                self._open.move_to_end(key)
                return file
            if key[1]:
                try:
                    file = self._opening(number, direct=True)
                except FileNotFoundError:
                    raise
                except OSError:  # tmpfs, some network file systems
                    self._direct = False
                    key = (number, False)
                    file = self._open.get(key)
            if file is None:
                file = self._opening(number, direct=False)
            self._open[key] = file
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        if time.monotonic() > self._swept + SWEEP_OPENING_S:
            self.sweep()
        self._keep_sweeping()
        return file

    def not_direct(self, number: int, file: File, fault: OSError) -> bool:
        """Whether a call failed since it went past the page cache: from now on none does."""
        refused = file.direct and fault.errno == errno.EINVAL
        if refused:
            self._buffered.add(number)
        return refused

    def mapped(self, number: int, end: int) -> Map | None:
        """The file in memory as far as `end` at least; None where that cannot be.

        Raises:
            EOFError: the file is shorter.
        """
        mapped = self._maps.get(number)
        if mapped is not None and mapped.nbytes >= end:
            return mapped
        if not self._mappable:
            return None
        file = self.opened(number, direct=False)
        there = os.fstat(file.fd).st_size
        if there < end:
            raise EOFError(f"the file ends at {there}, not at {end}")
        try:
            # What is appended is seen through the same map.
            mapped = Map(file.fd, max(2 * there, 1 << 20))
        except OSError:
            return None
        # Of a file that the process may not write Linux says that all of it is in memory: also of
        # what lies behind its end.
        if mapped.resident(mapped.nbytes - 1, 1):
            self._mappable = False
            return None
        with self._lock:
            self._maps[number] = mapped
            while len(self._maps) > MOST_MAPS:
                self._maps.popitem(last=False)
        return mapped

    def numbers(self) -> set[int]:
        """Of the files that are open."""
        with self._lock:
            return {number for number, _ in self._open} | self._maps.keys()

    def forget(self, numbers: set[int]) -> None:
        """Close files, so that those removed give their space back."""
        with self._lock:
            for key in [key for key in self._open if key[0] in numbers]:
                del self._open[key]
            for number in numbers & self._maps.keys():
                del self._maps[number]  # unmapped when the last view of it is gone
            self._buffered -= numbers

    def sweep(self) -> None:
        """Close files that are in the folder no more."""
        self._swept = time.monotonic()
        place, gone = self._place, set()
        if place is None:
            return
        for number in self.numbers():
            try:
                os.stat(name(number), dir_fd=place.fd, follow_symlinks=False)
            except FileNotFoundError:
                gone.add(number)
            except OSError:  # no answer does not mean that it is gone
                continue
        self.forget(gone)

    def close(self) -> None:
        """Close all; what is needed is opened again."""
        self.forget(self.numbers())
        with self._lock:
            self._place = None
            self._sweeper = None
            self._closed.set()

    # -- parts -------------------------------------------------------------------------------

    def _opening(self, number: int, direct: bool) -> File:
        """Open a file; where there are no more descriptors, in place of others."""
        flags = os.O_RDONLY if self._read_only else os.O_RDWR
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK  # or a pipe of that name would have to be waited for
        flags |= os.O_DIRECT if direct else 0
        place = self.folder()
        while True:
            try:
                file = File(os.open(name(number), flags, dir_fd=place.fd), direct)
                break
            except OSError as e:
                if e.errno == errno.ELOOP:
                    raise FileNotFoundError(f"segment {number} is a link") from e
                if e.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                    raise
                for _ in range(-(-len(self._open) // 2)):
                    self._open.popitem(last=False)
        found = os.fstat(file.fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in self._owners:
            raise FileNotFoundError(f"segment {number} is no plain file of the folder's owner")
        return file

    def _keep_sweeping(self) -> None:
        """Have a thread notice what others remove, as long as files are open."""
        with self._lock:
            if self._sweeper is not None and self._sweeper.is_alive():
                return
            self._closed = threading.Event()
            self._sweeper = threading.Thread(
                target=_sweep, args=(weakref.ref(self), self._closed), daemon=True
            )
            with contextlib.suppress(RuntimeError):  # no more threads, or the interpreter ends
                self._sweeper.start()

    def idle(self) -> bool:
        """Whether no file is open; then nobody sweeps any more."""
        with self._lock:
            if self._open or self._maps:
                return False
            self._sweeper = None
            return True


def name(number: int) -> str:
    """A segment file's name in its folder."""
    return f"{number:08d}.seg"


def _sweep(of: weakref.ref[Files], closed: threading.Event) -> None:
    while not closed.wait(SWEEP_S):
        files = of()
        if files is None:
            return
        files.sweep()
        if files.idle():
            return
        del files
