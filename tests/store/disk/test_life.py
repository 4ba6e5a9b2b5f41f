"""From opening to closing: twice, after the end, never, beside who is stopped, in other places."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lmc.store.disk import folder as folders
from lmc.store.disk import seal
from lmc.store.disk.tier import Disk
from tests.store.disk.chunks import (
    LAYOUT,
    Spec,
    after,
    empty,
    find,
    forked,
    held,
    leaked,
    opened,
    served,
)  # fmt: skip

ROOT = Path(__file__).parents[3]
ONE, TWO, THREE = (Spec(i, 0, 20) for i in range(3))


def descriptors(root: Path) -> list[str]:
    """What this process has open in a folder."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return [path for path in found if path.startswith(str(root))]


def test_a_tier_that_is_closed_has_nothing_and_takes_nothing(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([ONE.item()])
    disk.close()
    begun = time.monotonic()
    disk.close()
    record = ONE.record()
    into = empty(ONE.forms(), 7)
    assert disk.get(record) is None and disk.get(record, into) is None
    assert (into[0].parts[0] == 7).all()
    assert disk.contains([record]) == [False] and disk.put([TWO.item()]) == ["failed"]
    assert find(disk, record) == []
    assert after(disk, record) == []
    disk.evict([record])
    assert disk.evict_ids([record.id]) == 0 and disk.size == 0
    assert disk.counts["closed"] > 5 and time.monotonic() - begun < 5
    assert descriptors(tmp_path) == []
    disk = opened(tmp_path / "kv")
    assert disk.counts["index_rebuilt"] == 0 and served(disk, ONE)
    disk.close()


def test_a_tier_that_is_dropped_is_closed(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([ONE.item()])
    del disk
    gc.collect()
    assert descriptors(tmp_path) == [] and seal.sealed(tmp_path / "kv" / "index")


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "raise ValueError", "del disk"])
def test_a_tier_that_is_open_at_the_end_is_closed(tmp_path: Path, end: str) -> None:
    code = (
        "from pathlib import Path; from tests.store.disk.chunks import *\n"
        f"disk = opened(Path({str(tmp_path / 'kv')!r})); disk.put([Spec(1, 0, 20).item()])\n{end}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, stderr=subprocess.DEVNULL)
    disk = opened(tmp_path / "kv")
    assert disk.counts["index_rebuilt"] == 0 and served(disk, Spec(1, 0, 20))
    disk.close()


def test_a_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    disk = opened(Path("kv"))
    disk.put([ONE.item()])
    monkeypatch.chdir(tmp_path / "other")
    assert disk.put([TWO.item()]) == ["stored"] and served(disk, ONE) and served(disk, TWO)

    def child(pipe: int) -> None:
        assert served(disk, TWO) and disk.put([THREE.item()]) == ["stored"]

    assert os.waitpid(forked(child)[0], 0)[1] == 0
    disk.close()
    assert list((tmp_path / "other").iterdir()) == []
    disk = opened(tmp_path / "kv")
    assert len(held(disk)) == 3
    disk.close()


def test_names_of_all_kinds(tmp_path: Path) -> None:
    for name in ("ü/日本語/🙂 x", "new\nline", b"no text \xff".decode(errors="surrogateescape")):
        for again in (False, True):
            disk = opened(tmp_path / name)
            assert disk.put([ONE.item()]) == ["known" if again else "stored"] and served(disk, ONE)
            assert disk.counts["index_rebuilt"] == 0
            disk.close()


def test_a_folder_that_was_removed_is_not_the_one_that_came_after(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([ONE.item()])
    shutil.rmtree(tmp_path / "kv")
    assert disk.put([TWO.item()]) == ["failed"] and disk.counts["put_failed:gone"] == 1
    new = opened(tmp_path / "kv")
    assert new.put([THREE.item()]) == ["stored"]
    assert disk.put([TWO.item()]) == ["failed"] and served(disk, THREE) is not False
    disk.close()
    assert len(held(new)) == 1 and leaked(new) == 0 and new.put([TWO.item()]) == ["stored"]
    new.close()
    new = opened(tmp_path / "kv")
    assert new.counts["index_rebuilt"] == 0 and len(held(new)) == 2
    new.close()


def test_reading_and_writing_in_one_process(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([ONE.item()])
    disk.close()
    reader = opened(tmp_path / "kv", read_only=True)
    for spec in (TWO, THREE):
        disk = opened(tmp_path / "kv")
        assert disk.put([spec.item()]) == ["stored"] and disk.counts["index_rebuilt"] == 0
        assert served(reader, ONE) and served(disk, ONE)
        disk.evict([spec.record()])
        disk.close()
    reader.close()
    assert descriptors(tmp_path) == []


def test_a_stopped_writer_holds_up_nobody_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither who opens, nor who reads, nor who closes; who puts is told."""
    monkeypatch.setattr(folders, "CLOSE_PATIENCE_S", 6.0)
    root = tmp_path / "kv"
    disk = opened(root)
    disk.put([ONE.item()])

    def writer(pipe: int) -> None:
        theirs = opened(root)

        def stop(fd: int) -> None:
            os.write(pipe, b"in")
            os.kill(os.getpid(), signal.SIGSTOP)

        os.fdatasync = stop  # type: ignore[assignment]
        theirs.put([TWO.item()])

    pid, out = forked(writer)
    try:
        assert os.read(out, 2) == b"in"
        begun = time.monotonic()
        assert served(disk, ONE)
        with pytest.raises(TimeoutError), disk.folder.writing(0.1):
            pass
        other = Disk(root, 64 << 20, layout=LAYOUT)
        assert served(other, ONE) is True
        disk.close()
        other.close()
        assert time.monotonic() - begun < 20
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    disk = opened(root)
    assert served(disk, ONE) and disk.put([THREE.item()]) == ["stored"]
    disk.close()


def test_a_disk_that_hangs_is_let_go_of_when_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a put has begun is its own until it is done: nobody else is let in before."""
    disk = opened(tmp_path / "kv")
    disk.put([ONE.item()])
    within, go, real = threading.Event(), threading.Event(), os.fdatasync

    def hang(fd: int) -> None:
        within.set()
        assert go.wait(30)
        real(fd)

    done: list[list[str]] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", hang)
        thread = threading.Thread(target=lambda: done.append(disk.put([TWO.item()])))
        thread.start()
        assert within.wait(10)
        begun = time.monotonic()
        disk.folder.close(1.0)
        assert time.monotonic() - begun < 10
        assert descriptors(tmp_path)
        go.set()
        thread.join(10)
    assert done == [["stored"]] and descriptors(tmp_path) == []
    disk = opened(tmp_path / "kv")
    assert served(disk, TWO) and disk.counts["index_rebuilt"] == 0
    disk.close()


def test_an_opener_that_was_stopped_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "OPEN_PATIENCE_S", 0.2)
    disk = opened(tmp_path / "kv")
    disk.put([ONE.item()])
    fd = os.open(tmp_path / "kv" / "open.lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(TimeoutError, match="opening or closing"):
        opened(tmp_path / "kv")
    begun = time.monotonic()
    disk.close()
    assert time.monotonic() - begun < 15
    os.close(fd)
    disk = opened(tmp_path / "kv")
    assert served(disk, ONE)
    disk.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO, errno.EINTR])
def test_locks_that_fail_cost_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([ONE.item()])

    def failing(fd: int, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", failing)
        assert disk.put([TWO.item()]) == ["failed"] and served(disk, ONE)
        with pytest.raises(OSError, match=os.strerror(number)):
            opened(tmp_path / "other")
    assert disk.put([TWO.item()]) == ["stored"]
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", failing)
        disk.close()
    assert descriptors(tmp_path) == []


def test_an_unlock_that_fails_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = opened(tmp_path / "kv"), opened(tmp_path / "kv")
    real = fcntl.flock

    def failing(fd: int, kind: int) -> None:
        if kind == fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, "no locks")
        real(fd, kind)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", failing)
        for i in range(3):
            assert one.put([Spec(10 + i, 0, 20).item()]) == ["stored"]
            assert other.put([Spec(20 + i, 0, 20).item()]) == ["stored"]
    one.close()
    other.close()


def test_locks_that_lock_nobody_out_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda fd, kind: None)
    with pytest.raises(OSError, match="file locks lock nobody out") as error:
        opened(tmp_path / "kv")
    assert error.value.errno == errno.ENOLCK
    monkeypatch.undo()
    opened(tmp_path / "kv").close()
    monkeypatch.setattr(fcntl, "flock", lambda fd, kind: None)
    opened(tmp_path / "kv", read_only=True).close()


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG, errno.ENOSPC])
def test_what_has_no_room_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    disk = opened(tmp_path / "kv")

    def full(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        assert disk.put([ONE.item()]) == ["full"]
    assert disk.counts["put_failed:disk_full"] == 1
    assert disk.put([ONE.item()]) == ["stored"] and leaked(disk) == 0
    disk.close()
