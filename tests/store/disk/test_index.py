"""An index that rotted, was forged or cut short, is another's, is full, or is only being made."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import threading
import time
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from lmc.store.disk import env as lmdb_env
from lmc.store.disk import folder as folders
from lmc.store.disk import place, seal
from lmc.store.disk.rebuild import Rebuild
from lmc.store.disk.tier import Disk
from tests.store.disk.chunks import Spec, forked, held, opened, served
from tests.store.disk.test_index_faults import Fault, injected


def data_of(root: Path) -> Path:
    return root / "index" / "data.mdb"


def rot(root: Path, what: bytes) -> int:
    """Flip a bit of each place of the index where `what` is; how many there are."""
    fd = os.open(data_of(root), os.O_RDWR)
    end = n = 0
    try:
        while True:  # it is a file of many gigabytes, most of them holes
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            data, at = os.pread(fd, end - start, start), 0
            while (at := data.find(what, at)) >= 0:
                os.pwrite(fd, bytes([what[0] ^ 1]), start + at)
                at, n = at + 1, n + 1
    except OSError as error:
        if error.errno != errno.ENXIO:  # no more data
            raise
    finally:
        os.close(fd)
    return n


def test_an_index_that_rotted_is_not_sealed(tmp_path: Path) -> None:
    """Whatever of it is another than what was written: here a use that nobody asks for."""
    root = tmp_path / "kv"
    disk = opened(root)
    specs = [Spec(i, 0, 20) for i in range(20)]
    disk.put([spec.item() for spec in specs])
    assert rot(root, specs[3].record().key) > 0
    disk.close()
    assert disk.counts["index_unsound"] == 1 and not (root / "index" / "seal").exists()
    disk = opened(root)
    assert disk.counts["index_rebuilt"] == 1 and all(served(disk, spec) for spec in specs)
    disk.close()


def test_an_index_that_rotted_heals_while_it_is_open(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    disk, other = opened(root), opened(root)
    specs = [Spec(i, 0, 20) for i in range(20)]
    disk.put([spec.item() for spec in specs])
    before = data_of(root).stat().st_ino
    assert all(served(other, spec) for spec in specs)
    tokens = specs[3].record().tokens
    assert rot(root, np.frombuffer(tokens, "<i8").astype("<u4").tobytes()) > 0
    until = time.monotonic() + 20
    while not served(disk, specs[3]) and time.monotonic() < until:
        time.sleep(0.01)
    assert all(served(disk, spec) for spec in specs)
    assert disk.counts["index_condemned"] == 1 and data_of(root).stat().st_ino != before
    # The other one takes the new index, without being told.
    assert other.put([Spec(100, 0, 20).item()]) == ["stored"]
    assert all(served(tier, spec) for tier in (disk, other) for spec in [*specs, Spec(100, 0, 20)])
    other.close()
    disk.close()
    assert seal.sealed(root / "index") is not None


def test_an_index_that_is_cut_short_under_a_reader_heals(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    specs = [Spec(i, 0, 20) for i in range(50)]

    def reading(pipe: int) -> None:
        disk = opened(root)
        disk.put([spec.item() for spec in specs])
        os.truncate(data_of(root), 8192)
        disk.folder._next_look = 0.0
        served(disk, specs[0])
        disk.folder.settle()
        assert all(served(disk, spec) for spec in specs)
        assert disk.put([Spec(100, 0, 20).item()]) == ["stored"]
        disk.close()

    pid, _ = forked(reading)
    assert os.waitpid(pid, 0)[1] == 0
    disk = opened(root)
    assert disk.counts["index_rebuilt"] == 0 and len(held(disk)) == 51
    disk.close()


@pytest.mark.parametrize("size", [0, 4096, 8192, 40960])
@pytest.mark.parametrize("then", ["get", "put", "grow", "sync", "epoch", "close"])
def test_an_index_that_is_cut_short_kills_nobody(tmp_path: Path, size: int, then: str) -> None:
    """Whatever comes first: what would tell how long the index is may be gone with the rest."""
    root = tmp_path / "kv"
    specs = [Spec(i, 0, 20) for i in range(50)]

    def work(pipe: int) -> None:
        disk = opened(root)
        disk.put([spec.item() for spec in specs])
        env = disk.folder.catalog.env
        file = os.open(data_of(root), os.O_RDWR)
        assert os.fstat(file).st_size > size
        disk.folder._next_look = time.monotonic() + (60 if then == "get" else 0)
        os.truncate(file, size)
        if then == "get":
            served(disk, specs[0])
        elif then == "put":
            disk.put([Spec(100, 0, 20).item()])
        elif then == "grow":
            assert not env.grow()
        elif then in ("sync", "epoch"):
            with pytest.raises(lmdb.CorruptedError):
                env.sync() if then == "sync" else disk.folder.catalog.epoch
        if then != "close":
            assert env.broken
            # Also where it is as long as before again, with nothing in it.
            os.truncate(file, 1 << 20)
            disk.folder._next_look = 0.0
            served(disk, specs[0])
            disk.folder.settle(10)
            assert all(served(disk, spec) for spec in specs) and not env.sound(time.monotonic() + 1)
        del env
        disk.close()

    pid, _ = forked(work)
    assert os.waitpid(pid, 0)[1] == 0
    disk = opened(root)
    assert all(served(disk, spec) for spec in specs)
    disk.close()


@pytest.mark.parametrize("forge", ["zeros", "noise", "meta pages alone"])
def test_a_forged_seal_ends_nothing(tmp_path: Path, forge: str) -> None:
    """A seal that is right about a file that is not; LMDB itself may end the process once."""
    root = tmp_path / "kv"
    disk = opened(root)
    specs = [Spec(i, 0, 20) for i in range(20)]
    disk.put([spec.item() for spec in specs])
    disk.close()
    data = bytearray(data_of(root).read_bytes())
    if forge == "zeros":
        data[8192:] = bytes(len(data) - 8192)
    elif forge == "noise":
        data[8192:] = os.urandom(len(data) - 8192)
    else:
        data[:] = data[:8192].ljust(len(data), b"\xff")
    data_of(root).write_bytes(data)
    seal.seal(root / "index", disk.folder.identity, len(data))

    def opening(pipe: int) -> None:
        disk = opened(root)
        assert all(served(disk, spec) for spec in specs)
        disk.close()

    ends = [os.waitpid(forked(opening)[0], 0)[1] for _ in range(2)]
    assert ends[1] == 0
    disk = opened(root)
    assert all(served(disk, spec) for spec in specs)
    disk.close()


def test_another_folders_index_is_not_believed(tmp_path: Path) -> None:
    """Of the same sizes, with its seal, as from the wrong backup; nor is any record marked."""
    folders = {}
    for name, base in (("a", 0), ("b", 1000)):
        specs = [Spec(base + i, 0, 20) for i in range(40)]
        disk = opened(tmp_path / name)
        disk.put([spec.item() for spec in specs])
        disk.close()
        folders[name] = specs
    shutil.rmtree(tmp_path / "a" / "index")
    shutil.copytree(tmp_path / "b" / "index", tmp_path / "a" / "index")
    disk = opened(tmp_path / "a")
    assert disk.counts["index_rebuilt"] == 1
    assert not any(served(disk, spec) for spec in folders["b"])
    assert all(served(disk, spec) for spec in folders["a"]) and disk.counts["quarantined"] == 0
    disk.close()


def test_an_identity_outlives_its_file(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    disk = opened(root)
    disk.put([Spec(1, 0, 20).item()])
    identity = disk.folder.identity
    disk.close()
    assert len(identity) == 16
    (root / place.FORMAT_FILE).write_bytes(b"{")
    for _ in range(2):
        disk = opened(root)
        assert disk.folder.identity == identity and disk.counts["index_rebuilt"] == 0
        assert served(disk, Spec(1, 0, 20))
        disk.close()


@pytest.mark.parametrize("page", [4096, 16384, 32768, 65536])
def test_pages_of_any_system_are_read(tmp_path: Path, page: int) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([Spec(1, 0, 20).item()])
    disk.close()
    data = data_of(tmp_path / "kv").read_bytes()
    metas = []
    for meta in (data[:4096], data[4096:8192]):
        new = bytearray(meta.ljust(page, b"\0"))
        struct.pack_into("<I", new, 40, page)
        metas.append(bytes(new))
    data_of(tmp_path / "kv").write_bytes(b"".join(metas) + bytes(page * (len(data) // 4096 - 2)))
    assert seal.complete(tmp_path / "kv" / "index")
    os.truncate(data_of(tmp_path / "kv"), page * 2)
    assert not seal.complete(tmp_path / "kv" / "index")


def test_the_map_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beneath another process, and while somebody reads."""
    monkeypatch.setattr(lmdb_env, "MAP_BYTES", 1 << 18)
    root = tmp_path / "kv"
    specs = [Spec(i, 0, 4) for i in range(1500)]
    disk, end = opened(root), threading.Event()
    wrong: list[object] = []

    def reading() -> None:
        i = 0
        while not end.is_set():
            i += 1
            found = served(disk, specs[i % 100])
            if found is False:
                wrong.append(specs[i % 100])

    def other(pipe: int) -> None:
        theirs = opened(root)
        os.write(pipe, b"ready")
        assert os.read(go[0], 1)
        assert all(served(theirs, spec) for spec in specs[::10])
        assert theirs.put([Spec(9999, 0, 4).item()]) == ["stored"]
        theirs.close()

    go = os.pipe()
    pid, out = forked(other)
    assert os.read(out, 5) == b"ready"
    thread = threading.Thread(target=reading)
    thread.start()
    for i in range(0, len(specs), 50):
        assert {*disk.put([spec.item() for spec in specs[i : i + 50]])} == {"stored"}
    os.write(go[1], b"x")
    assert os.waitpid(pid, 0)[1] == 0
    end.set()
    thread.join()
    assert disk.folder.catalog.env.info()["map_size"] > 1 << 18
    assert all(served(disk, spec) for spec in specs[::10]) and served(disk, Spec(9999, 0, 4))
    assert wrong == [] and disk.counts["evicted"] == disk.counts["index_condemned"] == 0
    disk.close()


def test_dead_readers_pin_no_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_env, "READER_CHECK_S", 0.0)
    root = tmp_path / "kv"
    disk = opened(root, 2 << 20)
    disk.put([Spec(i, 0, 4).item() for i in range(100)])

    def dying(pipe: int) -> None:
        theirs = opened(root, 2 << 20)
        with theirs.folder.catalog.env.begin() as txn:
            txn.stat()
            os.kill(os.getpid(), 9)

    assert os.waitpid(forked(dying)[0], 0)[1] == 9
    sizes = []
    for k in range(1, 40):
        disk.put([Spec(100 * k + i, 0, 4).item() for i in range(20)])
        disk.evict([Spec(100 * k + i, 0, 4).record() for i in range(20)])
        sizes.append(data_of(root).stat().st_size)
    assert sizes[-1] < 1.5 * sizes[10]
    disk.close()


def test_iterating_holds_no_transaction(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([Spec(i, 0, 4).item() for i in range(30)])
    walk = disk.folder.catalog.records()
    next(walk)
    assert disk.folder.catalog.env._inside == 0
    assert disk.folder.catalog.env.grow()
    assert len(list(walk)) == 29
    disk.close()


def test_no_place_for_a_reader_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([Spec(1, 0, 4).item()])
    assert disk.folder.catalog.env._env.max_readers() >= 4000
    fault = Fault(1, lambda: lmdb.ReadersFullError("full"))
    with injected("begin", fault):
        assert served(disk, Spec(1, 0, 4)) is None
        assert disk.counts["index_faults"] == 1 and disk.counts["index_condemned"] == 0
        assert served(disk, Spec(1, 0, 4))
    disk.close()


def whole(disk: Disk) -> bool:
    return disk.folder.settle(0)


def test_gets_go_on_while_the_index_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening waits for nothing, also that of others; what is indexed is served, puts wait."""
    root = tmp_path / "kv"
    specs = [Spec(i, 0, 40) for i in range(100)]
    disk = opened(root, 4 << 20)
    assert {*disk.put([spec.item() for spec in specs])} == {"stored"}
    disk.close()
    (root / "index" / "seal").unlink()
    monkeypatch.setattr(folders, "REBUILD_PATIENCE_S", 0.0)
    go, add, calls = threading.Event(), Rebuild._add, []

    def slow(self: Rebuild, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 5:
            assert go.wait(30)
        add(self, *arguments)

    monkeypatch.setattr(Rebuild, "_add", slow)
    one, two = (Disk(root, 4 << 20, layout=disk.layout) for _ in range(2))
    until = time.monotonic() + 10
    while len(calls) < 6 and time.monotonic() < until:
        time.sleep(0.01)
    for tier in (one, two):
        assert not whole(tier)
        there = [served(tier, spec) for spec in specs]
        assert 0 < there.count(True) < 100 and there.count(False) == 0
    with pytest.raises(TimeoutError), one.folder.writing(0.05):
        pass
    go.set()
    assert two.put([Spec(1000, 0, 40).item()]) == ["stored"]
    assert all(served(tier, spec) for tier in (one, two) for spec in [*specs, Spec(1000, 0, 40)])
    assert one.counts["index_rebuilt"] + two.counts["index_rebuilt"] == 1
    two.close()
    one.close()
    assert seal.sealed(root / "index") is not None


def test_who_dies_while_making_the_index_is_followed_by_others(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    specs = [Spec(i, 0, 40) for i in range(100)]
    disk = opened(root, 4 << 20)
    disk.put([spec.item() for spec in specs])
    disk.close()
    (root / "index" / "seal").unlink()

    def dying(pipe: int) -> None:
        add, calls = Rebuild._add, []

        def last(self: Rebuild, *arguments: Any) -> None:
            calls.append(1)
            if len(calls) == 5:
                os.write(pipe, b"x")
                time.sleep(60)
            add(self, *arguments)

        Rebuild._add = last  # type: ignore[method-assign]
        opened(root, 4 << 20)

    pid, out = forked(dying)
    assert os.read(out, 1) == b"x"
    disk = Disk(root, 4 << 20, layout=disk.layout)
    assert not whole(disk)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert disk.folder.settle(20)
    assert all(served(disk, spec) for spec in specs)
    assert disk.put([Spec(1000, 0, 40).item()]) == ["stored"]
    disk.close()
