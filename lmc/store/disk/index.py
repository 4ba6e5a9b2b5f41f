"""The index of a folder, whichever it is by now: taken, doubted, let go of and made again."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from lmc.store.disk import seal
from lmc.store.disk.catalog import Catalog
from lmc.store.disk.env import ClosedError, key_of
from lmc.store.disk.envs import OPEN_S
from lmc.store.disk.faults import FAULTS, NoIndexError
from lmc.store.disk.rebuild import Rebuild, identity_of
from lmc.store.disk.segments import Segments

INDEX = "index"
SEAL_S = 20.0  # what is read of an index before it is sealed, at most


class Index:
    """What finds the records of one folder that is open. Every index made is a folder of its own.

    So whoever has one open that is damaged can go on until he looks: its name is another's.

    Attributes:
        blocked: it is there and could not be opened, for now or in this process.

    Args:
        place: descriptor of the folder `root`.
        read_only: the index is this process's own, and in no folder.
        stopped: asked by what takes long.
    """

    def __init__(
        self,
        root: Path,
        place: int,
        segments: Segments,
        counts: Counter[str],
        read_only: bool,
        stopped: Callable[[], bool],
    ) -> None:
        self.identity = b""
        self.blocked = False
        self._path = root / INDEX
        self._root = root
        self._place = place
        self._segments = segments
        self._counts = counts
        self._read_only = read_only
        self._stopped = stopped
        self._catalog: Catalog | None = None
        self._swapping = threading.Lock()

    @property
    def catalog(self) -> Catalog:
        """Raises NoIndexError where there is none."""
        catalog = self._catalog
        if catalog is None:
            raise NoIndexError("the index has to be made again")
        return catalog

    @property
    def ready(self) -> bool:
        """Whether there is one that has all that the segments have."""
        with contextlib.suppress(*FAULTS):
            return not self.catalog.env.building
        return False

    # -- what is there -----------------------------------------------------------------------

    def find_identity(self) -> bytes:
        """Of a folder whose format file is lost, or new."""
        return seal.sealed(self._path) or identity_of(self._segments) or os.urandom(16)

    def trust(self) -> bool:
        """Take the index as its last user left it; False where it has to be made again.

        The caller is alone in the folder.
        """
        for entry in os.listdir(self._place):
            if entry.startswith(f"{INDEX}."):  # of those who died
                self._remove(entry)
        if seal.sealed(self._path) != self.identity:
            return False
        try:
            seal.break_seal(self._path)  # what kills its reader is not believed a second time
            catalog = self._open()
            known = {number: use.end for number, use in catalog.segments().items()}
            there = {number: self._segments.size(number) for number in self._segments.numbers()}
            if known == there and not catalog.env.building:
                self._catalog = catalog
        except FAULTS:
            return False
        return self._catalog is not None

    def look(self, patience_s: float = OPEN_S) -> bool:
        """Take the index that has the name now; whether it has all that the segments have."""
        catalog = self._catalog
        if catalog is None or self._stale(catalog):
            with self._swapping:
                if self._catalog is catalog:
                    self._catalog = None
            self.blocked = False
            if not self._read_only:
                try:
                    catalog = self._open(patience_s)
                    with self._swapping:
                        self._catalog = catalog
                except FAULTS as e:
                    self.blocked = isinstance(e, TimeoutError | ClosedError)
        return self.ready

    def condemn(self, catalog: Catalog) -> bool:
        """Nobody shall use this index any more; False where nobody here does."""
        catalog.env.broken = True
        with self._swapping:
            if self._catalog is not catalog:
                return False
            self._catalog = None
            self._counts["index_condemned"] += 1
            if not self._read_only:
                with contextlib.suppress(OSError):
                    if key_of(INDEX, self._place) == catalog.env.key:
                        self._discard()
        return True

    # -- a new one ---------------------------------------------------------------------------

    def renew(self) -> None:
        """An empty index in the place of what is there; the caller is the folder's writer."""
        if os.path.lexists(self._path) or self._segments.numbers():
            self._counts["index_rebuilt"] += 1
        new = f"{INDEX}.{os.urandom(8).hex()}"
        os.mkdir(new, 0o700, dir_fd=self._place)
        try:
            self._discard()  # first: it may be its space that is needed
            Catalog.make(self._root / new, self.identity)
            os.rename(new, INDEX, src_dir_fd=self._place, dst_dir_fd=self._place)
        except BaseException:
            self._remove(new)
            raise
        catalog = Catalog(self._path)
        with self._swapping:
            self._catalog = catalog

    def private(self, copied: bool) -> bool:
        """An index that is nobody else's: a copy of one that is sealed, or an empty one.

        Returns:
            Whether it is a copy.
        """
        with tempfile.TemporaryDirectory(prefix="lmc-index-") as temporary:  # what is open stays
            catalog = self._copy(Path(temporary)) if copied else None
            copied = catalog is not None
            if catalog is None:
                self._counts["index_rebuilt"] += 1
                self.identity = self.identity or identity_of(self._segments) or bytes(16)
                new = Path(temporary, "new")
                new.mkdir()
                Catalog.make(new, self.identity)
                catalog = Catalog(new)
        with self._swapping:
            self._catalog = catalog
        return copied

    def fill(self) -> None:
        """Put into the empty index what is in the segments; the caller is the folder's writer.

        Raises:
            ClosedError: it was stopped.
            What is in `FAULTS`: it cannot be done.
        """
        catalog = self.catalog
        with os.scandir(self._root / "segments") as entries:
            others = [e for e in entries if not e.is_file(follow_symlinks=False)]
        self._counts["segments_unreadable"] += len(others)
        rebuild = Rebuild(
            self._segments, self._counts, self._stopped, self._read_only, self.identity
        )
        rebuild(catalog)
        catalog.env.complete()

    def seal(self) -> None:
        """Leave it to the next user, if nothing is wrong with it; the caller is alone."""
        env = self.catalog.env
        if self._stale(self.catalog) or env.building:
            return
        if not env.sound(time.monotonic() + SEAL_S):
            self._counts["index_unsound"] += 1
            return
        env.sync()
        nbytes = env.nbytes
        env.close()
        seal.seal(self._path, self.identity, nbytes)

    def let_go(self) -> None:
        """It is used no more."""
        self._catalog = None

    # -- parts -------------------------------------------------------------------------------

    def _open(self, patience_s: float = OPEN_S) -> Catalog:
        if not seal.complete(self._path):
            raise NoIndexError("there is no index, or it was cut short")
        catalog = Catalog(self._path, patience_s)
        if catalog.env.broken or catalog.env.identity != self.identity:
            raise NoIndexError("the index is damaged, or another folder's")
        return catalog

    def _copy(self, folder: Path) -> Catalog | None:
        fd = os.open(folder / "data.mdb", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            identity = seal.sealed(self._path, fd)
        finally:
            os.close(fd)
        if identity is None or self.identity not in (b"", identity):
            return None
        with contextlib.suppress(*FAULTS):
            catalog = Catalog(folder)
            if not catalog.env.building and catalog.env.identity == identity:
                self.identity = identity
                return catalog
        return None

    def _stale(self, catalog: Catalog) -> bool:
        """Whether an index must not be used any more."""
        try:
            if catalog.env.broken or not catalog.env.whole():
                return True
            return not self._read_only and key_of(INDEX, self._place) != catalog.env.key
        except OSError:
            return True

    def _discard(self) -> None:
        """Take away the index that is there, whole: who has it open can tell by its name."""
        old = f"{INDEX}.{os.urandom(8).hex()}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(INDEX, old, src_dir_fd=self._place, dst_dir_fd=self._place)
            self._remove(old)

    def _remove(self, name: str) -> None:
        shutil.rmtree(self._root / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._place)
