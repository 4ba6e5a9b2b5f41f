"""Opening and letting go where the disk or the place is not as it should be."""

from __future__ import annotations

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
    while descriptors(tmp_path) and time.monotonic() < until:
        time.sleep(0.01)
    assert descriptors(tmp_path) == [] and threading.active_count() == before
    tier = opened(tmp_path / "kv")
    assert served(tier, ONE) and tier.put([TWO.item()]) == ["stored"]
    tier.close()
    assert seal.sealed(tmp_path / "kv" / "index") is not None
