"""Opening and letting go where the disk or the place is not as it should be."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lmc.store.disk import folder as folders
from lmc.store.disk import seal
from lmc.store.disk.segments import Segments
from tests.store.disk.chunks import Spec, forked, opened, served
from tests.store.disk.test_index_faults import Fault, injected
from tests.store.disk.test_life import descriptors

ONE, TWO = (Spec(i, 0, 20) for i in range(2))


def test_an_index_that_is_made_while_the_disk_hangs_is_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who closes does not wait for it, and what is open then is closed when it ends."""

    def crash(pipe: int) -> None:
        disk = opened(tmp_path / "kv")
        assert disk.put([ONE.item()]) == ["stored"]
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(forked(crash)[0], 0)
    within, go, real = threading.Event(), threading.Event(), Segments.pread

    def hang(self: Segments, number: int, at: int, nbytes: int) -> bytes:
        if threading.current_thread().name == "lmc-index":
            within.set()
            assert go.wait(30)
        return real(self, number, at, nbytes)

    monkeypatch.setattr(folders, "CLOSE_PATIENCE_S", 0.2)
    monkeypatch.setattr(folders, "REBUILD_PATIENCE_S", 0.0)
    monkeypatch.setattr(Segments, "pread", hang)
    before = threading.active_count()
    disk = folders.Folder(tmp_path / "kv")
    assert within.wait(10)
    begun = time.monotonic()
    disk.close(1.0)
    assert time.monotonic() - begun < 10 and descriptors(tmp_path)
    go.set()
    until = time.monotonic() + 20
    while descriptors(tmp_path) or threading.active_count() > before:  # others' may have ended
        assert time.monotonic() < until
        time.sleep(0.01)
    tier = opened(tmp_path / "kv")
    assert served(tier, ONE) and tier.put([TWO.item()]) == ["stored"]
    tier.close()
    assert seal.sealed(tmp_path / "kv" / "index") is not None


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("call", ["open", "fstat", "stat", "fsync", "pread", "lseek", "flock"])
def test_what_fails_in_an_opening_leaves_nothing_open(
    tmp_path: Path, call: str, sealed: bool
) -> None:
    root = tmp_path / "kv"
    disk = opened(root)
    disk.put([ONE.item()])
    disk.close()
    came = 0
    for when in range(1, 40):
        if not sealed:
            (root / "index" / "seal").unlink(missing_ok=True)
        fault = Fault(when, lambda: OSError(errno.EIO, "injected"))
        with injected(call, fault), contextlib.suppress(OSError):
            disk = opened(root)
            disk.close()
        until = time.monotonic() + 5
        while descriptors(root) and time.monotonic() < until:  # of an index made in the background
            time.sleep(0.005)
        assert descriptors(root) == [], when
        if not fault.injected:
            break
        came += 1
    assert came > 0
    disk = opened(root)
    assert served(disk, ONE) is True
    disk.close()


@pytest.mark.parametrize("name", ["segments", "index"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_in_it_that_others_may_write_is_refused(
    tmp_path: Path, name: str, mode: int
) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([ONE.item()])
    disk.close()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kv").rglob("*")}
    os.chmod(tmp_path / "kv" / name, mode)
    with pytest.raises(PermissionError, match=f"/{name} may be written by others .*{mode:o}"):
        opened(tmp_path / "kv")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kv").rglob("*")} == before
    assert descriptors(tmp_path) == []
    disk = opened(tmp_path / "kv", read_only=True)
    assert served(disk, ONE)
    disk.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
@pytest.mark.parametrize("name", ["segments", "index"])
def test_a_folder_in_it_of_another_user_is_refused(tmp_path: Path, name: str) -> None:
    opened(tmp_path / "kv").close()
    os.chown(tmp_path / "kv" / name, 12345, 12345)
    with pytest.raises(PermissionError, match=f"/{name} belongs to user 12345"):
        opened(tmp_path / "kv")
