"""Who opens a folder, uses it, writes to it and says what he computes: flock on four files.

Locks of flock belong to the open file, which a forked child shares: it would keep what its dead
parent held, and let go of what its parent holds. Those of `fcntl.lockf` do not survive a fork, but
a process loses them when it closes any descriptor of the file, as whoever copies the folder does,
and they do not keep its threads apart. So it is flock, and a child closes what it inherited before
anything else: whatever forks and goes on in Python calls what is registered below, and what runs
another program has no descriptors of ours. No lock file is opened during a fork, since a child
would not know of it.

Hosts that share a folder need a file system whose locks reach all of them: a mount that keeps
them to itself (`nolock`, `local_lock`, `localflock`) cannot be told from one that is used alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
import weakref

OPEN, USERS, WRITER, FLIGHTS = "open.lock", "users.lock", "writer.lock", "flights.lock"

_forking = threading.Lock()
_forks = threading.local()
_all: dict[int, weakref.ref[Locks]] = {}


class Locks:
    """The lock files of one folder, for one that has it open.

    Attributes:
        forked: this is a child's copy of what its parent has open; nothing in it may be used.

    Args:
        place: descriptor of the folder.
        read_only: there are none; it only tells of forks.

    Raises:
        OSError: a file that cannot be made or is no plain file, or locks that lock nobody out.
    """

    def __init__(self, place: int, read_only: bool = False) -> None:
        self.forked = False
        self._place = place
        self._fds: dict[str, int] = {}
        with _forking:
            _all[id(self)] = weakref.ref(self)
            if read_only:
                return
            try:
                for name in (OPEN, USERS, WRITER, FLIGHTS):
                    self._fds[name] = self._open(name)
            except BaseException:
                self._close()
                raise

    def take(self, name: str, patience_s: float = 0.0, shared: bool = False) -> bool:
        """Lock a file; False when others have kept it for so long."""
        until = time.monotonic() + patience_s
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        pause = 0.002
        while True:
            try:
                fcntl.flock(self._fds[name], kind | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= until:
                    return False
            except KeyError:
                raise OSError(errno.EBADF, f"{name} could not be opened again") from None
            time.sleep(pause)
            pause = min(0.05, 1.1 * pause)

    def drop(self, name: str) -> None:
        """Unlock a file, whatever the system says to that."""
        try:
            fcntl.flock(self._fds[name], fcntl.LOCK_UN)
        except (OSError, KeyError):  # a lock goes with its last descriptor, too
            with _forking:
                if name in self._fds:
                    os.close(self._fds.pop(name))
                with contextlib.suppress(OSError):  # and whoever wants to take it is told
                    self._fds[name] = self._open(name)

    def check(self) -> None:
        """Raise OSError where a lock locks nobody out; the caller has taken `OPEN`."""
        with _forking:
            other = self._open(OPEN)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            finally:
                os.close(other)
        raise OSError(
            errno.ENOLCK,
            "file locks lock nobody out on this file system, and two writers would destroy each "
            "other's chunks: mount it with locks, use another one, or open it for reading only",
        )

    def close(self) -> None:
        """Let go of all of them."""
        with _forking:
            self._close()

    def _open(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self._place)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, f"{name} is no plain file")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _close(self) -> None:
        _all.pop(id(self), None)
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __del__(self) -> None:
        _all.pop(id(self), None)
        while self._fds:
            os.close(self._fds.popitem()[1])


def _before_fork() -> None:
    # Not for ever: a file system may hang while one is opened.
    _forks.waited = _forking.acquire(timeout=1.0)


def _after_in_parent() -> None:
    if _forks.waited:
        _forking.release()


def _after_in_child() -> None:
    global _forking
    _forking = threading.Lock()
    for known in list(_all.values()):
        locks = known()
        if locks is not None:
            locks.forked = True
            locks._close()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
