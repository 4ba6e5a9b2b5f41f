"""The folder of a store: who has it open, who writes, and that its index is made again."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lmdb

from lmc.store.disk import place, seal
from lmc.store.disk.catalog import Catalog
from lmc.store.disk.env import ClosedError, condemns
from lmc.store.disk.faults import FAULTS, GoneError, NoIndexError
from lmc.store.disk.index import INDEX, Index
from lmc.store.disk.locks import OPEN, USERS, WRITER, Locks
from lmc.store.disk.segments import Segments

# How long others are waited for: who opens or closes takes no time, unless it is stopped.
OPEN_PATIENCE_S = 10.0
CLOSE_PATIENCE_S = 20.0
# An index that is soon made again is there when the folder is open.
REBUILD_PATIENCE_S = 0.5
RETRY_S = 5.0  # after it could not be made, as far as nobody writes
LOOK_S = 0.1  # how often a process that reads looks whether the index is another one


class Folder:
    """An open folder. Several processes may have it open; one at a time changes it.

    Layout: `lmc-store.json` (format and identity), `segments/NNNNNNNN.seg` (records), `index/`
    (LMDB), `flights/` (what is being computed), and lock files. All files are 0600, folders 0700.
    The index is never trusted: where it fails, or is another folder's, all processes let go of it,
    and it is made again from the segments. What it has by then can be asked for meanwhile, and
    nothing be written.

    It is entered (`with folder:`) by whoever uses it, so that nothing is closed beneath him; a
    child of a fork cannot enter what its parent opened.

    Attributes:
        root: absolute. place: its descriptor.
        locks: of its files.
        counts: what happened, by kind.

    Args:
        root: made when missing.
        read_only: nothing in it is changed; the index is this process's own, as of now.

    Raises:
        ValueError: a folder that is no store and not empty, one of another format, or with links
            where files should be.
        OSError: it cannot be made or opened, is another user's, may be written by others, or others
            have been opening it all the time.
    """

    def __init__(
        self, root: Path, read_only: bool = False, counts: Counter[str] | None = None
    ) -> None:
        self.root = Path(os.path.realpath(root))
        self.read_only = read_only
        self.counts: Counter[str] = Counter() if counts is None else counts
        self._writer_thread = threading.Lock()
        self._lock = threading.Lock()
        self._inside = threading.Condition(self._lock)
        self._users, self._closing, self._released = 0, False, False
        self._healer: threading.Thread | None = None  # while it makes the index
        self._left_to_healer = False  # to let go of all, after that
        self._failure: Exception | None = None  # of the last attempt to make the index again
        self._next_look = 0.0
        self.place = place.open_folder(self.root, read_only)
        try:
            self._key = _key(os.fstat(self.place))
            known = place.identity_in(self.root, self.place)
            place.subfolder(self.root, self.place, "segments", not read_only, read_only)
            place.subfolder(self.root, self.place, INDEX, False, read_only)
            self.locks = Locks(self.place, read_only)
        except BaseException:
            os.close(self.place)
            raise
        self.segments = Segments(self.root / "segments", read_only)
        this = weakref.ref(self)  # what is dropped goes at once

        def stopped() -> bool:
            folder = this()
            return folder is None or folder._closing

        self._index = Index(self.root, self.place, self.segments, self.counts, read_only, stopped)
        try:
            if read_only:
                self._index.identity = known or b""
                if not self._index.private(seal.sealed(self.root / INDEX) is not None):
                    self._heal(held=True)
            else:
                self._open()
            self.settle(REBUILD_PATIENCE_S)
            self._raise_failure()
        except BaseException as e:
            self.close()
            if isinstance(e, FAULTS) and not isinstance(e, OSError):
                raise OSError(f"the index of {root} cannot be made: {e}") from e
            raise

    # -- using it ----------------------------------------------------------------------------

    def __enter__(self) -> Folder:
        """Raises ClosedError."""
        if self.locks.forked:
            raise ClosedError("it was opened by the process that this one was forked from")
        with self._lock:  # the condition's, and quicker
            if self._closing:
                raise ClosedError("it is closed")
            self._users += 1
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            if not self._index.look(0.0):
                self._heal()
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            last = self._closing and self._users == 0
            if last:
                self._inside.notify_all()
        if last:
            self._let_go()

    @property
    def forked(self) -> bool:
        """Whether it was opened by the process that this one was forked from."""
        return self.locks.forked

    @property
    def identity(self) -> bytes:
        """16 random bytes that no other folder has."""
        return self._index.identity

    @property
    def catalog(self) -> Catalog:
        """The index, as far as it is made; another one whenever it was made again.

        Raises:
            NoIndexError: there is none now.
        """
        return self._index.catalog

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until the index has all that the segments have; whether it does."""
        healer = self._healer
        if healer is not None:
            healer.join(timeout_s)
        return self._index.ready

    def index_fault(self, fault: Exception) -> bool:
        """Tell of what the catalog raised, wherever it is caught; whether it is of the index.

        What shows that the index is damaged ends its use, for all processes.
        """
        if not isinstance(fault, lmdb.Error) and not condemns(fault):
            return False
        self.counts["index_faults"] += 1
        with contextlib.suppress(NoIndexError):
            catalog = self.catalog
            # An error of LMDB may be of an index that is gone by now: the one of this is marked.
            damaged = not isinstance(fault, lmdb.Error) or catalog.env.broken
            if damaged and self._index.condemn(catalog):
                self._heal()
        return True

    @contextlib.contextmanager
    def writing(self, patience_s: float = 10.0) -> Iterator[None]:
        """Be the one who changes the folder, with an index that has all of it.

        Raises:
            TimeoutError: another process has been it for all of `patience_s` seconds, or has been
                making the index.
            PermissionError: the folder is open for reading only.
            ClosedError: it is closed, or the parent's of this process.
            GoneError: what has its name by now is another folder.
            NoIndexError: the index cannot be made.
        """
        if self.read_only:
            raise PermissionError("the store is open for reading only")
        until = time.monotonic() + patience_s
        for again in (False, True):
            self._take(until)
            try:
                self._check_place()
                if self._index.look():
                    yield
                    return
            finally:
                self._give()
            if again:
                break
            self._heal()
            if not self.settle(max(0.0, until - time.monotonic())) and self._failure is None:
                raise TimeoutError("the index has been made all the time")
            until = max(until, time.monotonic() + 0.1)
        raise NoIndexError(f"the index cannot be made: {self._failure}")

    # -- the end -----------------------------------------------------------------------------

    def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        """Let go; the last user leaves the index in a state that the next one can trust.

        What takes longer, as where a disk hangs, is done later, when it can be: until then nothing
        is let go of that others could take for theirs. A second time nothing happens.
        """
        if self.locks.forked:
            return
        with self._inside:
            if self._closing:
                return
            self._closing = True
        thread = threading.Thread(target=self._finish, args=(patience_s / 2,), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is at its end
            self._finish(0.0)
        else:
            thread.join(patience_s)

    def _finish(self, patience_s: float) -> None:
        with self._inside:
            if not self._inside.wait_for(lambda: self._users == 0, patience_s):
                self.counts["closed_later"] += 1
                return
        self._let_go()

    def _let_go(self) -> None:
        """Nobody is inside any more."""
        with self._inside:
            if self._released:
                return
            self._released = True
            healer = self._healer
        if healer is not None:
            healer.join(CLOSE_PATIENCE_S)  # it looks whether it must end
        with self._inside:
            if self._healer is not None:  # a disk hangs: it does it, when it can
                self._left_to_healer = True
                return
        self._release()

    def _release(self) -> None:
        """Nobody is inside, and no index is being made."""
        try:
            alone = not self.read_only and self.locks.take(WRITER, 1.0)
            if alone and self.locks.take(OPEN, 2.0) and self.locks.take(USERS):
                self._index.seal()
        except FAULTS:  # then it is made again
            self.counts["not_sealed"] += 1
        self._index.let_go()
        self._failure = None  # which has hold of what it came from
        self.segments.close()
        self.locks.close()
        fd, self.place = self.place, -1
        os.close(fd)

    def __del__(self) -> None:
        # Of a parent's, in its child; all else that is open goes with what holds it.
        if "_index" in self.__dict__ and self.forked and self.place >= 0:
            os.close(self.place)

    # -- parts -------------------------------------------------------------------------------

    def _open(self) -> None:
        if not self.locks.take(OPEN, OPEN_PATIENCE_S):
            raise TimeoutError(
                f"somebody else has been opening or closing {self.root} for {OPEN_PATIENCE_S:.0f} s"
            )
        try:
            self.locks.check()
            known = place.identity_in(self.root, self.place)
            self._index.identity = known or self._index.find_identity()
            if known is None:
                place.write_format(self.place, self.identity)
            if not self.locks.take(USERS):
                if not self._index.look():
                    self._heal()
            elif not self._index.trust():
                self._take(time.monotonic() + 1.0)  # of nobody else: the caller is alone
                try:
                    self._index.renew()
                except BaseException:
                    self._give()
                    raise
                self._heal(held=True)
            self.locks.take(USERS, shared=True)
        finally:
            self.locks.drop(OPEN)

    def _heal(self, held: bool = False) -> None:
        """Have the index made again in the background.

        held: the caller is the folder's writer, and has made an empty one; the thread is it then.
        """
        with self._inside:
            if self._closing or self._healer is not None:
                return
            healer = threading.Thread(
                target=self._heal_now, args=(held,), name="lmc-index", daemon=True
            )
            with contextlib.suppress(RuntimeError):  # no thread to be had: the next one tries
                healer.start()
                self._healer = healer
                return
        if held and not self.read_only:
            self._give()

    def _heal_now(self, held: bool) -> None:
        try:
            self._make_index(held)
        finally:
            with self._inside:
                self._healer = None
                left = self._left_to_healer
            if left:
                self._release()

    def _make_index(self, held: bool) -> None:
        self._failure = None
        try:
            if self.read_only:
                if not held:
                    self._index.private(copied=False)
                self._index.fill()
                return
            if not held and not self._wait_to_write():
                return
            try:
                self._check_place()
                if held or not self._index.look():
                    if self._index.blocked:
                        raise NoIndexError("the index that is there cannot be opened here")
                    if not held:
                        self._index.renew()
                    self._index.fill()
            finally:
                self._give()
        except ClosedError:
            pass
        except FAULTS as e:
            self._failure = e
            self._next_look = time.monotonic() + RETRY_S
            self.counts["index_not_made"] += 1

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wait_to_write(self) -> bool:
        """Become the writer, however long it takes; False when the folder is closed before."""
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                self._take(time.monotonic() + 1.0)
                return True
        return False

    def _take(self, until: float) -> None:
        """Become the writer. Raises TimeoutError, ClosedError."""
        if self.locks.forked:
            raise ClosedError("it was opened by the process that this one was forked from")
        if not self._writer_thread.acquire(timeout=max(0.0, until - time.monotonic())):
            raise TimeoutError("another thread has been writing to the store all the time")
        try:
            if not self.locks.take(WRITER, until - time.monotonic()):
                raise TimeoutError("another process has been writing to the store all the time")
        except BaseException:
            self._writer_thread.release()
            raise

    def _give(self) -> None:
        self.locks.drop(WRITER)
        self._writer_thread.release()

    def _check_place(self) -> None:
        try:
            here = _key(os.stat(self.root)) == self._key and self.segments.there()
        except OSError:
            here = False
        if not here:
            raise GoneError(errno.ESTALE, f"{self.root} is another folder by now, or gone")


def _key(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
