"""A disk of one's own that can be damaged, filled and hung while a server uses it.

An ext4 image behind a loop device, mounted for the length of a run, so nothing else suffers with
it. It needs root, `mount` and `fsfreeze`, and a kernel with the block I/O controller of cgroups,
version 1 or 2 (only version 1 has been run).
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lmc.store.disk.header import FRONT, MAGIC, STATE_AT

FLIP_EVERY = 256 << 10  # bytes of a file for each byte that is changed in it
PAGE = 4096
IN_HEADER = (STATE_AT + 1, FRONT)  # bytes of one that matter
V1 = Path("/sys/fs/cgroup/blkio")
V2 = Path("/sys/fs/cgroup")


class SickDisk:
    """What `sick_disk` makes.

    Attributes:
        store: where the tier's folder may be made.
        done: how often each thing was done to it, by name.
    """

    def __init__(self, mount: Path, group: Path, rng: random.Random) -> None:
        self.store = mount / "store"
        what = ("bytes_flipped", "index_flipped", "filled", "hung", "frozen", "hung_met_by_nobody")
        self.done = dict.fromkeys(what, 0)
        self._mount, self._group, self._rng = mount, group, rng
        self._ballast = mount / "ballast"
        device = os.stat(mount).st_dev
        self._device = f"{os.major(device)}:{os.minor(device)}"
        self._frozen = False

    def beneath(self, command: Sequence[str]) -> list[str]:
        """A command whose processes are hit when this disk hangs."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", enter, str(self._group / "cgroup.procs"), *command]

    def flip(self) -> None:
        """Change bytes of half of the segment files, which the server goes on using."""
        files = sorted((self.store / "segments").glob("*.seg"))
        for file in self._rng.sample(files, len(files) // 2):
            with contextlib.suppress(FileNotFoundError):  # the server has evicted it just now
                size = file.stat().st_size
                times = -(-size // FLIP_EVERY)
                self._change(file, [self._rng.randrange(size) for _ in range(times)])
                self.done["bytes_flipped"] += times

    def flip_index(self) -> None:
        """Change a byte of every header in the index, and of the head of every eighth page."""
        with contextlib.suppress(FileNotFoundError):
            file = self.store / "index" / "data.mdb"
            with file.open("rb") as index:
                there = index.read(os.lseek(index.fileno(), 0, os.SEEK_HOLE))  # a hole is behind
            places = [
                found.start() + self._rng.randrange(*IN_HEADER)
                for found in re.finditer(MAGIC, there)
            ]
            heads = range(2 * PAGE, len(there), 8 * PAGE)  # not of LMDB's two meta pages
            places += [at + self._rng.randrange(64) for at in heads]
            self._change(file, places)
            self.done["index_flipped"] += len(places)

    def _change(self, file: Path, places: Sequence[int]) -> None:
        fd = os.open(file, os.O_RDWR)
        try:
            for at in places:
                if byte := os.pread(fd, 1, at):
                    os.pwrite(fd, bytes([byte[0] ^ self._rng.randrange(1, 256)]), at)
        finally:
            os.close(fd)

    def fill(self) -> None:
        """Take all space that is left; to be called again as the server makes room for itself."""
        fd = os.open(self._ballast, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            size = 64 << 20
            while size >= PAGE:
                try:
                    os.posix_fallocate(fd, os.fstat(fd).st_size, size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2
        finally:
            os.close(fd)
        self.done["filled"] += 1

    def empty(self) -> None:
        """Give back the space."""
        self._ballast.unlink(missing_ok=True)

    def hang(self, frozen: bool) -> None:
        """No read or write of the device returns for the server, and no sync, before `let_go`.

        Args:
            frozen: nor does anything that would change the file system: a write into the page
                cache, a file that is made, a store into a mapped file.
        """
        for file in (self.store / "segments").glob("*.seg"):
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(file, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
        if frozen:
            subprocess.run(["fsfreeze", "--freeze", self._mount], check=True)
            self._frozen = True
            self.done["frozen"] += 1
        self._limit(1)
        self.done["hung"] += 1

    def let_go(self) -> None:
        """What hangs returns."""
        self._limit(None)
        if self._frozen:
            subprocess.run(["fsfreeze", "--unfreeze", self._mount], check=True)
            self._frozen = False

    def _limit(self, bytes_a_second: int | None) -> None:
        """A byte a second is none: a request is let through when all of it has been waited for."""
        if self._group.is_relative_to(V1):
            for way in ("read", "write"):
                file = self._group / f"blkio.throttle.{way}_bps_device"
                file.write_text(f"{self._device} {bytes_a_second or 0}")
        else:
            most = bytes_a_second or "max"
            (self._group / "io.max").write_text(f"{self._device} rbps={most} wbps={most}")


@contextmanager
def sick_disk(work: Path, nbytes: int, seed: int) -> Iterator[SickDisk]:
    """A disk of `nbytes` in the folder `work`; gone in the end, whatever hangs on it.

    Raises:
        OSError, subprocess.CalledProcessError: this user or kernel cannot.
    """
    image, mount = work / "disk.img", work / "disk"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(nbytes)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop,noatime", image, mount], check=True)
    try:
        if not V1.is_dir():
            (V2 / "cgroup.subtree_control").write_text("+io")
        group = (V1 if V1.is_dir() else V2) / f"lmc-soak-{os.getpid()}"
        group.mkdir()
        try:
            disk = SickDisk(mount, group, random.Random(f"disk {seed}"))
            try:
                yield disk
            finally:
                disk.let_go()
        finally:
            group.rmdir()
    finally:
        subprocess.run(["umount", mount], check=True)
