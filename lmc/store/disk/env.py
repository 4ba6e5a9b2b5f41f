"""The LMDB environment of an index, watched.

LMDB checks nothing that it reads. So the sizes of its file are compared before it is used, and a
digest of all that the tables hold is kept with them: what is read in the end, entry by entry, must
add up to it, or the file is not what was written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lmdb

from lmc.store.disk.header import HeaderError
from lmc.store.disk.sums import Summed, adds_up

# Address space, about ten million records; it grows where that does not do.
MAP_BYTES = 1 << 34
FULL = 0.75  # of the map, when it grows
READERS = 4096  # transactions that read at a time, of all processes
_LOCK_BYTES = 64 * (READERS + 1)  # of LMDB's lock file
READER_CHECK_S = 1.0  # how often the places of dead ones are given back
REUSED_S = 1.0  # how long a file that is closed may be taken for one that is open
GATE_S = 1.0  # how long anybody waits because the map grows

_IDENTITY, _BUILDING = b"identity", b"building"  # in the table `meta`

# What LMDB says without anything being wrong with the index.
_PASSING = (
    lmdb.MapFullError, lmdb.MapResizedError, lmdb.ReadersFullError, lmdb.TxnFullError,
    lmdb.DiskError, lmdb.MemoryError,
)  # fmt: skip
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSALS = (*FULL_DISK, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE)


class ClosedError(OSError):
    """The folder is closed, or was opened by the process that this one was forked from."""


def condemns(fault: BaseException) -> bool:
    """Whether an index that gave rise to a fault must not be believed any more.

    A header that does not unpack came out of the index: those in segments are only compared.
    """
    if isinstance(fault, lmdb.Error):
        return not isinstance(fault, _PASSING) and getattr(fault, "code", 0) not in _REFUSALS
    return isinstance(fault, HeaderError | struct.error | UnicodeDecodeError)


def key_of(folder: Path | str, place: int | None = None) -> tuple[int, int]:
    """What tells an index from all others that are there: device and inode of its file.

    Raises:
        OSError: there is none, or it is no plain file.
    """
    found = os.stat(f"{folder}/data.mdb", dir_fd=place, follow_symlinks=False)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{folder}/data.mdb is no plain file")
    return found.st_dev, found.st_ino


class Env:
    """An open environment. Transactions are short, or the map could not grow.

    Attributes:
        key: as `key_of`.
        tables: the databases, by name.
        broken: something was read or written that cannot be; it must not be believed any more.
    """

    def __init__(
        self, folder: Path, tables: Sequence[str], dups: Collection[str], new: bool = False
    ) -> None:
        if not new:
            key_of(folder)
        _allocate(folder / "lock.mdb")
        self.broken = False
        self._env: Any = _open(folder, len(tables), new)
        self._lock = threading.Lock()
        self._gate = threading.Condition(self._lock)
        self._inside = 0
        self._growing = False
        self._checked = 0.0
        self._complete = False
        self._writing: Summed | None = None
        self._file, self._most, self._cut = -1, 0, False
        self.tables: dict[str, Any] = {}
        try:
            self._file = os.open(folder / "data.mdb", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            self.key = key_of(folder)
            self._page = self._opened().stat()["psize"]
            self._extend()
            with self._env.begin(write=True) as txn:  # what one that reads opens is closed with it
                for name in tables:
                    self.tables[name] = self._env.open_db(
                        name.encode(), txn=txn, create=new,
                        dupsort=name in dups, dupfixed=name in dups,
                    )  # fmt: skip
        except BaseException:
            self.close()  # or nobody in this process could open it again
            raise
        # By database: what sets its entries apart from other ones', and whether it has duplicates.
        self.seeds = {db: (i, name in dups) for i, (name, db) in enumerate(self.tables.items())}

    # -- transactions ------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether nobody can use it any more."""
        return self._env is None

    def begin(self, db: Any = None, write: bool = False, buffers: bool = False) -> _Transaction:
        """A transaction, to be entered by `with`; one that writes is all or nothing.

        Raises:
            lmdb.Error: by `broken` one knows whether it is the index that is at fault.
        """
        return _Transaction(self, db, write, buffers)

    def info(self) -> dict[str, int]:
        """As LMDB has it."""
        return dict(self._opened().info())

    @property
    def building(self) -> bool:
        """Whether something is missing that the segments have."""
        if not self._complete:
            with self.begin() as txn:
                self._complete = txn.get(_BUILDING, db=self.tables["meta"]) is None
        return not self._complete

    def complete(self) -> None:
        """Nothing is missing from now on."""
        with self.begin(write=True) as txn:
            txn.delete(_BUILDING, db=self.tables["meta"])

    @property
    def identity(self) -> bytes:
        """Of the folder that it is the index of."""
        with self.begin() as txn:
            return bytes(txn.get(_IDENTITY, b"", db=self.tables["meta"]))

    @property
    def nbytes(self) -> int:
        """Of the file, as far as its last page."""
        return (self.info()["last_pgno"] + 1) * self._page

    def whole(self) -> bool:
        """Whether the file reaches as far as its own last page: touching it would be fatal."""
        try:
            return self._size() >= self.nbytes
        except lmdb.CorruptedError:
            return False

    def sound(self, until: float) -> bool:
        """Whether all that is in it is what was written; also False where that takes too long.

        Args:
            until: `time.monotonic()`.
        """
        if self.broken or not self.whole():
            return False
        with self.begin() as txn:
            return adds_up(txn, self.seeds, self.tables["meta"], until)

    def grow(self) -> bool:
        """More address space; False where there is none."""
        try:
            self._resize(2 * self.info()["map_size"])
            return True
        except (lmdb.Error, OSError):
            return False

    def sync(self) -> None:
        """Return when the file is on the disk."""
        self._enter()
        try:
            self._opened().sync(True)
        finally:
            self._leave()

    def close(self) -> None:
        """Nobody uses it any more."""
        env, self._env = self._env, None
        if env is not None:
            env.close()
            self._close_file()

    def __del__(self) -> None:
        if self.__dict__.get("_env") is not None:  # LMDB's own goes with the last transaction
            self._close_file()

    def _close_file(self) -> None:
        fd, self._file = self._file, -1
        if fd >= 0:
            os.close(fd)

    # -- parts -------------------------------------------------------------------------------

    def _opened(self) -> Any:
        """LMDB's own, just before its map is touched; what was cut off of that would be fatal.

        Its file never shrinks. Where the pages are gone that say how long it is, LMDB must not even
        be asked that.

        Raises:
            ClosedError: nobody can use it any more.
            lmdb.CorruptedError: the file was shorter than before, once.
        """
        env, most = self._env, self._most  # before its size: it may be growing
        if env is None:
            raise ClosedError("the index is closed")
        size = self._size()
        if size < most or self._cut:
            self._cut = self.broken = True
            raise lmdb.CorruptedError("the index was cut short")
        self._most = size
        return env

    def _size(self) -> int:
        return os.lseek(self._file, 0, os.SEEK_END)  # the quickest way to be told

    def _enter(self) -> None:
        with self._lock:  # the condition's, and quicker
            if self._growing and not self._gate.wait_for(lambda: not self._growing, GATE_S):
                raise TimeoutError("the index has been growing all the time")
            self._inside += 1

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._growing:
                self._gate.notify_all()

    def _resize(self, size: int) -> None:
        """Another size of the map, which ends all transactions of this process.

        size: 0 for that which another process has given it.
        """
        with self._gate:
            if self._growing:
                return
            self._growing = True
            try:
                if not self._gate.wait_for(lambda: self._inside == 0, GATE_S):
                    raise TimeoutError("somebody has been reading the index all the time")
                self._opened().set_mapsize(size)
                self._extend()
            finally:
                self._growing = False
                self._gate.notify_all()

    def _check_readers(self) -> None:
        """Give back the places of those that died, and with them the pages that they kept."""
        now = time.monotonic()
        if now > self._checked + READER_CHECK_S:
            self._checked = now
            self._opened().reader_check()

    def pause(self, until: float) -> bool | None:
        """Let nobody in; whether nobody is in by then. None where the map is growing."""
        with self._gate:
            if self._growing:
                return None
            self._growing = True
            left = until - time.monotonic()
            return self._gate.wait_for(lambda: self._inside == 0, max(0.0, left))

    def inherited(self) -> tuple[Any, ...]:
        """Let go of what is the parent's; what LMDB has of it, which ends when it is dropped."""
        kept = self._env, dict(self.tables), dict(self.seeds), self._writing
        self._env = self._writing = None
        self.tables.clear()
        self.seeds.clear()
        self._close_file()
        return kept

    def resume(self) -> None:
        """As before `pause`."""
        with self._gate:
            self._growing = False
            self._gate.notify_all()

    def _extend(self) -> None:
        # LMDB believes damaged pages: what they may name must be there, and a hole takes no space.
        with contextlib.suppress(OSError):
            end = self.info()["map_size"]
            if self._size() < end:
                os.ftruncate(self._file, end)
            self._opened()


class _Transaction:
    """What `with` enters."""

    def __init__(self, env: Env, db: Any, write: bool, buffers: bool) -> None:
        self._env, self._db, self._write, self._buffers = env, db, write, buffers
        self._txn: Any = None

    def __enter__(self) -> Any:
        env = self._env
        if self._write and env.nbytes > FULL * env.info()["map_size"]:
            env.grow()
        for resized in (False, True):
            env._enter()
            try:
                if self._write:
                    env._check_readers()
                txn = env._opened().begin(db=self._db, write=self._write, buffers=self._buffers)
                self._txn = Summed(txn, env.seeds, env.tables["meta"]) if self._write else txn
                if self._write:
                    env._writing = self._txn
                return self._txn
            except lmdb.MapResizedError:  # by another process
                env._leave()
                if resized:
                    raise
                env._resize(0)
            except BaseException as e:
                env._leave()
                env.broken = env.broken or condemns(e)
                raise

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        env, txn = self._env, self._txn
        try:
            if error is not None:
                txn.abort()
                env.broken = env.broken or condemns(error)
                return
            txn.commit()
            if self._write:
                env._extend()
        except lmdb.Error as e:
            env.broken = env.broken or condemns(e)
            raise
        finally:
            env._writing = None if self._write else env._writing
            env._leave()


def _open(folder: Path, tables: int, new: bool) -> Any:
    """LMDB's environment.

    LMDB's module tells files by their inodes, and forgets one just after it has been closed: when
    another thread may have made the next file, with the same number.
    """
    until = time.monotonic() + REUSED_S
    while True:
        try:
            # No spare transactions: a child of a fork would end its parent's.
            return lmdb.open(
                os.fsencode(folder), map_size=MAP_BYTES, max_dbs=tables, mode=0o600, create=new,
                sync=False, max_readers=READERS,
            )  # fmt: skip
        except lmdb.Error as e:
            if "already open" not in str(e) or time.monotonic() > until:
                raise
        time.sleep(0.002)


def _allocate(path: Path) -> None:
    """Make the lock file of an environment, with all of its pages.

    LMDB maps it and writes there: on a disk that is full, a page that is missing is fatal.

    Raises:
        OSError: there is no room for it, or something else there.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, f"{path} is no plain file")
        if found.st_size < _LOCK_BYTES:
            os.posix_fallocate(fd, 0, _LOCK_BYTES)
    finally:
        os.close(fd)


def make(folder: Path, tables: Sequence[str], dups: Collection[str], identity: bytes) -> None:
    """A new, empty one in a folder that is there, known to be incomplete: `Env.building`."""
    env = Env(folder, tables, dups, new=True)
    with env.begin(write=True) as txn:
        txn.put(_IDENTITY, identity, db=env.tables["meta"])
        txn.put(_BUILDING, b"1", db=env.tables["meta"])
    env.close()
