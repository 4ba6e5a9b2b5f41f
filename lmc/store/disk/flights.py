"""What processes that share a folder are computing just now, as `lmc.store.flights` has it.

Each has one file in `flights/`, of names and tokens, which all others read. Its time of change says
when it was last renewed; times are compared with that of the reader's own file, so that clocks of
different hosts do not matter. The files mean nothing by themselves: a name that should not be there
makes somebody wait in vain for a while, one that is missing makes something be computed twice.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from lmc.store.disk import place
from lmc.store.disk.faults import FAULTS, kind_of
from lmc.store.disk.folder import Folder
from lmc.store.disk.locks import FLIGHTS
from lmc.store.flights import LASTS_S, NAME_BYTES

FOLDER = "flights"
VERSION_BYTES = 16  # in front, anew whenever names change
ENTRY = struct.Struct(f"<{NAME_BYTES}sI")
MOST = 1 << 18  # names of one process: of some thirty prompts of 128,000 tokens
GONE_S = 60.0  # the file of one that was not there for so long may be removed by anybody
PATIENCE_S = 0.5
FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
NEW = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC

_Known = dict[bytes, int]


class FolderFlights:
    """The names of one process that has a folder open, and a view of all others'.

    Args:
        counts: of the tier: `flights_failed:{kind}`.
    """

    def __init__(self, folder: Folder, counts: Counter[str]) -> None:
        self._folder, self._counts = folder, counts
        self._file = os.urandom(8).hex()
        self._ours: dict[bytes, tuple[int, int]] = {}  # how often it was begun, and tokens
        self._told = False
        self._read: dict[str, tuple[bytes, _Known]] = {}  # by file, its version and what is in it
        self._lock = threading.Lock()

    def begin(
        self, requests: Sequence[tuple[Mapping[bytes, int], Collection[bytes]]]
    ) -> list[_Known]:
        """As `Flights.begin`."""
        others = _Known()
        with self._counted(), self._inside() as fd:
            if not self._folder.locks.take(FLIGHTS, PATIENCE_S):
                raise TimeoutError
            try:
                others = self._others(fd)
                for names, _ in requests:
                    self._take({n: tokens for n, tokens in names.items() if n not in others})
                self._write(fd)
            finally:
                self._folder.locks.drop(FLIGHTS)
        return [
            {n: others[n] for n in {*names, *asked} if n in others} for names, asked in requests
        ]

    def others(self, asked: Collection[bytes]) -> _Known:
        """As `Flights.others`."""
        others = _Known()
        with self._counted(), self._inside() as fd:
            others = self._others(fd)
        return {name: others[name] for name in asked if name in others}

    def end(self, names: Iterable[bytes]) -> None:
        """As `Flights.end`."""
        with self._counted(), self._inside() as fd:
            for name in names:
                times, tokens = self._ours.pop(name, (0, 0))
                if times > 1:
                    self._ours[name] = times - 1, tokens
            self._write(fd)

    def renew(self) -> None:
        """As `Flights.renew`."""
        with self._counted(), self._inside() as fd:
            self._now(fd)

    def close(self) -> None:
        """As `Flights.close`."""
        if not self._told:
            return
        with self._counted(), self._inside() as fd:
            self._ours, self._told = {}, False
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._file, dir_fd=fd)

    # -- parts -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """What goes wrong is counted, and that is all."""
        try:
            yield
        except (ValueError, *FAULTS) as e:
            self._counts[f"flights_failed:{kind_of(e)}"] += 1

    @contextlib.contextmanager
    def _inside(self) -> Iterator[int]:
        """The folder of the files."""
        with self._lock, self._folder:
            root, above = self._folder.root, self._folder.place
            place.subfolder(root, above, FOLDER, make=True, read_only=False)
            fd = os.open(FOLDER, FLAGS | os.O_DIRECTORY, dir_fd=above)
            try:
                yield fd
            finally:
                os.close(fd)

    def _take(self, names: _Known) -> None:
        if len(self._ours) + len(names) <= MOST:
            for name, tokens in names.items():
                self._ours[name] = self._ours.get(name, (0, 0))[0] + 1, tokens

    def _write(self, fd: int) -> None:
        names = b"".join([ENTRY.pack(name, tokens) for name, (_, tokens) in self._ours.items()])
        new = f"{self._file}.new"
        with open(os.open(new, NEW, 0o600, dir_fd=fd), "wb") as file:
            file.write(os.urandom(VERSION_BYTES) + names)
        self._told = True
        os.rename(new, self._file, src_dir_fd=fd, dst_dir_fd=fd)

    def _now(self, fd: int) -> float:
        """Renew what is told, and the time at the folder."""
        try:
            os.utime(self._file, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            self._write(fd)
        return os.stat(self._file, dir_fd=fd, follow_symlinks=False).st_mtime

    def _others(self, fd: int) -> _Known:
        now, others, read = self._now(fd), _Known(), dict[str, tuple[bytes, _Known]]()
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.name.startswith(self._file):
                    continue
                with contextlib.suppress(OSError):  # of this one alone
                    there = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(there.st_mode):
                        continue
                    age = abs(now - there.st_mtime)  # ahead of now, if a clock was set back
                    if age > GONE_S:
                        os.unlink(entry.name, dir_fd=fd)
                    elif age <= LASTS_S and "." not in entry.name:
                        read[entry.name] = self._names(fd, entry.name)
                        others |= read[entry.name][1]
        self._read = read
        return others

    def _names(self, fd: int, name: str) -> tuple[bytes, _Known]:
        with open(os.open(name, FLAGS, dir_fd=fd), "rb") as file:
            version = file.read(VERSION_BYTES)
            if (known := self._read.get(name)) and known[0] == version:
                return known
            data = file.read(MOST * ENTRY.size)
        whole = len(data) - len(data) % ENTRY.size
        return version, dict(ENTRY.iter_unpack(data[:whole]))
