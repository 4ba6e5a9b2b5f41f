"""Forks of a process that has a folder open: two writers, two owners of locks, one who dies."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmc.store.disk import locks
from lmc.store.disk.env import ClosedError
from lmc.store.disk.tier import Disk
from tests.store.disk.chunks import Spec, forked, held, leaked, opened, served
from tests.store.disk.test_life import descriptors

SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass
class Totals:
    forks: int = 0
    acknowledged: int = 0
    lost: int = 0
    wrong: int = 0

    def __str__(self) -> str:
        return (
            f"fork: {self.forks} forks, {self.acknowledged} puts acknowledged by both, "
            f"{self.lost} lost, {self.wrong} wrong"
        )


def putting(disk: Disk, first: int, n: int) -> list[int]:
    """Put n contents in twos, and get what was put before; which were acknowledged."""
    done: list[int] = []
    for content in range(first, first + n, 2):
        some = [Spec(content + i, 0, 30) for i in range(2)]
        put = disk.put([spec.item() for spec in some])
        done += [spec.content for spec, ok in zip(some, put, strict=True) if ok == "stored"]
        if done:
            assert served(disk, Spec(done[0], 0, 30)) is not False
    return done


def reported(child: tuple[int, int]) -> list[int]:
    pid, out = child
    with open(out, "rb") as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    done: list[int] = json.loads(said)
    return done


@pytest.mark.parametrize("forks", [6, pytest.param(150, marks=SLOW)])
def test_parent_and_child_both_put(
    forks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the tier that was open, while other threads of the parent put and get, too."""
    totals = Totals(forks)
    disk = opened(tmp_path / "kv", 256 << 20)
    # What is imported when it is first needed is imported now: a lock of that may not survive.
    acknowledged = putting(disk, 0, 2)
    end = threading.Event()

    def busy(base: int) -> None:
        i = 0
        while not end.is_set():
            acknowledged.extend(putting(disk, base + 2 * i, 2))
            i += 1
            time.sleep(0.002)

    threads = [threading.Thread(target=busy, args=(1_000_000 * k,)) for k in (1, 2)]
    for thread in threads:
        thread.start()
    for i in range(forks):
        first = 1000 * (i + 1)

        def child(pipe: int, first: int = first) -> None:
            done = putting(disk, first, 8)
            if first % 2000:
                disk.close()
            os.write(pipe, json.dumps(done).encode())

        born = forked(child)
        acknowledged += putting(disk, first + 500, 8)
        acknowledged += reported(born)
    end.set()
    for thread in threads:
        thread.join()
    totals.acknowledged = len(acknowledged)
    for again in (False, True):
        if again:
            disk.close()
            before, disk = disk, opened(tmp_path / "kv", 256 << 20)
            assert disk.counts["index_rebuilt"] == 0, before.counts
        there = [served(disk, Spec(content, 0, 30)) for content in acknowledged]
        totals.lost += there.count(None)
        totals.wrong += there.count(False)
    assert leaked(disk) == 0
    disk.close()
    with capsys.disabled():
        print(f"\n{totals}")
    assert (totals.lost, totals.wrong) == (0, 0)
    assert totals.acknowledged >= 16 * forks - 8  # of a child that could not open it, none


@pytest.mark.parametrize("how", ["close", "leave", "drop"])
def test_a_child_ends_nothing_of_its_parents(tmp_path: Path, how: str) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([Spec(1, 0, 20).item()])

    def child(pipe: int) -> None:
        nonlocal disk
        if how == "close":
            disk.close()
            assert served(disk, Spec(1, 0, 20)) is None
        elif how == "drop":
            del disk

    def another(pipe: int) -> None:
        with closing(opened(tmp_path / "kv")) as theirs:
            assert theirs.put([Spec(3, 0, 20).item()]) == ["stored"]

    with closing(disk):
        assert os.waitpid(forked(child)[0], 0)[1] == 0
        assert disk.put([Spec(2, 0, 20).item()]) == ["stored"]
        assert os.waitpid(forked(another)[0], 0)[1] == 0
        assert all(served(disk, Spec(i, 0, 20)) for i in (1, 2, 3))
        assert disk.counts["index_faults"] == 0
    disk = opened(tmp_path / "kv")
    assert disk.counts["index_rebuilt"] == 0 and len(held(disk)) == 3
    disk.close()


def test_a_child_reads_and_puts_with_locks_of_its_own(tmp_path: Path) -> None:
    """As a worker of multiprocessing does, which nobody closes."""
    disk = opened(tmp_path / "kv")
    disk.put([Spec(i, 0, 20).item() for i in range(5)])
    context = multiprocessing.get_context("fork")

    def work(results: multiprocessing.SimpleQueue[object], base: int) -> None:
        served_here = [served(disk, Spec(i, 0, 20)) for i in range(5)]
        results.put((served_here, disk.put([Spec(base, 0, 20).item()])))

    results = context.SimpleQueue()
    workers = [context.Process(target=work, args=(results, 100 + i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for _ in workers:
        assert results.get() == ([True] * 5, ["stored"])
    assert all(served(disk, Spec(100 + i, 0, 20)) for i in range(3))
    disk.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_what_was_entered_before_cannot_be_used(tmp_path: Path, read_only: bool) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([Spec(1, 0, 20).item()])
    disk.close()
    disk = opened(tmp_path / "kv", read_only=read_only)

    def child(pipe: int) -> None:
        folder = disk.folder
        with pytest.raises(ClosedError):
            folder.__enter__()
        if not read_only:
            with pytest.raises(ClosedError), folder.writing():
                pass
        folder.close()
        assert served(disk, Spec(1, 0, 20)) is True and disk.folder is not folder

    assert os.waitpid(forked(child)[0], 0)[1] == 0
    assert served(disk, Spec(1, 0, 20)) is True
    disk.close()


def in_a_put(monkeypatch_sync: Callable[[], None], disk: Disk) -> threading.Thread:
    """A thread that is held up where its put waits for the disk."""
    real = os.fdatasync

    def slow(fd: int) -> None:
        monkeypatch_sync()
        real(fd)

    os.fdatasync = slow
    thread = threading.Thread(target=lambda: disk.put([Spec(2, 0, 20).item()]), daemon=True)
    thread.start()
    return thread


def test_a_child_that_lives_on_holds_up_nobody(tmp_path: Path) -> None:
    """Forked in the midst of another thread's put; then the parent is killed."""
    folder = tmp_path / "kv"

    def parent(pipe: int) -> None:
        disk = opened(folder)
        disk.put([Spec(1, 0, 20).item()])
        within = threading.Event()

        def hold() -> None:
            within.set()
            time.sleep(60)

        in_a_put(hold, disk)
        assert within.wait(10)
        child = os.fork()
        if child == 0:
            os.write(pipe, b"%d %d\n" % (os.getpid(), len(locks._all)))
            time.sleep(60)
            os._exit(0)
        time.sleep(60)

    pid, out = forked(parent)
    assert select.select([out], [], [], 20)[0]
    child, _ = (int(word) for word in os.read(out, 100).split())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        begun = time.monotonic()
        disk = opened(folder)
        assert disk.put([Spec(3, 0, 20).item()]) == ["stored"]
        assert served(disk, Spec(1, 0, 20)) and time.monotonic() - begun < 8
        disk.close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_of_the_midst_of_a_put_acts_on_nothing(tmp_path: Path) -> None:
    """A thread of its parent was within the index: it cannot be used here, and nothing waits."""
    disk = opened(tmp_path / "kv")
    disk.put([Spec(1, 0, 20).item()])
    within, go, real = threading.Event(), threading.Event(), os.fdatasync

    def hold() -> None:
        within.set()
        go.wait(30)

    try:
        thread = in_a_put(hold, disk)
        assert within.wait(10)

        def child(pipe: int) -> None:
            os.fdatasync = real
            assert served(disk, Spec(1, 0, 20)) is None
            os.write(pipe, b"born\n")
            assert disk.put([Spec(3, 0, 20).item()]) == ["failed"]
            disk.close()

        pid, out = forked(child)
        assert os.read(out, 5) == b"born\n"
        go.set()
        thread.join(10)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        os.fdatasync = real
    assert all(served(disk, Spec(i, 0, 20)) for i in (1, 2))
    assert disk.put([Spec(4, 0, 20).item()]) == ["stored"]
    assert disk.counts["index_faults"] == disk.counts["index_rebuilt"] == 0
    disk.close()


def test_forks_while_folders_are_opened_leak_no_lock(tmp_path: Path) -> None:
    """A child knows of every lock file that it inherited, whenever it was forked."""
    end = threading.Event()

    def opening() -> None:
        while not end.is_set():
            opened(tmp_path / "kv").close()

    thread = threading.Thread(target=opening)
    thread.start()

    def child(pipe: int) -> None:
        links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
        paths = [os.readlink(link) for link in links if os.path.islink(link)]
        assert not [path for path in paths if path.endswith(".lock")]

    try:
        for _ in range(30):
            assert os.waitpid(forked(child)[0], 0)[1] == 0
    finally:
        end.set()
        thread.join()


def test_children_of_children_have_no_more_open_than_the_first(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv")
    assert disk.put([Spec(0, 0, 20).item()]) == ["stored"] and served(disk, Spec(0, 0, 20))
    gc.disable()  # nothing is left to it
    counts = [len(descriptors(tmp_path))]

    def use(pipe: int) -> None:
        generation = len(counts)
        assert served(disk, Spec(0, 0, 20))
        assert disk.put([Spec(generation, 0, 20).item()]) == ["stored"]
        counts.append(len(descriptors(tmp_path)))
        if generation < 4:
            assert os.waitpid(forked(use)[0], 0)[1] == 0
        else:
            assert counts == [counts[0]] * len(counts), counts

    try:
        assert os.waitpid(forked(use)[0], 0)[1] == 0
    finally:
        gc.enable()
    disk.close()
