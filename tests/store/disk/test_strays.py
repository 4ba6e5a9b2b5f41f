"""An index is believed in no loss: whatever it says, nothing goes that is a record."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmc.store.disk.segments import Segments
from lmc.store.disk.sums import Summed
from lmc.store.disk.tier import Disk
from tests.store.disk.chunks import Spec, forked, live_bytes, opened, served

CAPACITY = 4 << 20
SPECS = [Spec(i, 0, 40) for i in range(60)]


def filled(path: Path) -> Disk:
    disk = opened(path, CAPACITY)
    for i in range(0, len(SPECS), 10):
        assert {*disk.put([spec.item() for spec in SPECS[i : i + 10]])} == {"stored"}
    return disk


def all_there(disk: Disk, path: Path) -> None:
    """All that was acknowledged, when it has healed, and when it is opened again."""
    for again in range(2):
        assert disk.folder.settle(30.0)
        assert [served(disk, spec) for spec in SPECS] == [True] * len(SPECS)
        assert disk.put([Spec(1000 + again, 0, 40).item()]) == ["stored"]
        disk.close()
        disk = opened(path, CAPACITY)
    disk.close()


@pytest.mark.parametrize("kept", [10, 30, 50])
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved since"])
def test_an_older_index_put_back_while_it_is_open(tmp_path: Path, kept: int, moved: bool) -> None:
    disk = opened(tmp_path / "kv", CAPACITY)
    passing = [Spec(3000 + i, 0, 40) for i in range(kept)]
    for spec, other in zip(SPECS, passing, strict=False):
        disk.put([spec.item(), other.item()])
    disk.close()
    shutil.copytree(tmp_path / "kv" / "index", tmp_path / "older")
    disk = opened(tmp_path / "kv", CAPACITY)
    disk.put([spec.item() for spec in SPECS[kept:]])
    if moved:
        disk.evict([spec.record() for spec in passing])
        with disk.folder.writing():
            while disk.room.compact_one(disk.folder.catalog.segments()):
                pass
    for file in ("data.mdb", "lock.mdb"):
        (tmp_path / "kv" / "index" / file).unlink()
    shutil.copy(tmp_path / "older" / "data.mdb", tmp_path / "kv" / "index" / "data.mdb")
    for i in range(3):  # one at least fails, and none costs anything
        assert disk.put([Spec(500 + i, 0, 40).item()])[0] in ("stored", "failed")
    all_there(disk, tmp_path / "kv")


@pytest.mark.parametrize("field", range(3))
@pytest.mark.parametrize("value", [0, 8192, 1 << 40])
def test_numbers_of_a_segment_that_are_wrong(tmp_path: Path, field: int, value: int) -> None:
    """Where it ends, how much of it is alive, how many records."""
    disk = filled(tmp_path / "kv")
    catalog = disk.folder.catalog
    with catalog._env.begin(write=True) as txn:
        for number, use in catalog.segments().items():
            fields = [use.end, use.live, use.records]
            fields[field] = value
            key = number.to_bytes(4, "big")
            txn.put(key, struct.pack("<QQQ", *fields), db=catalog._db["segments"])
    for i in range(3):
        disk.put([Spec(500 + i, 0, 40).item()])
        disk.evict([Spec(500 + i, 0, 40).record()])
    all_there(disk, tmp_path / "kv")


def test_segments_that_were_moved_away(tmp_path: Path) -> None:
    """A backup put in their place: what has their name by now is another folder."""
    disk = filled(tmp_path / "kv")
    (tmp_path / "kv" / "segments").rename(tmp_path / "away")
    shutil.copytree(tmp_path / "away", tmp_path / "kv" / "segments")
    before = {file.name: file.stat().st_size for file in (tmp_path / "away").iterdir()}
    assert disk.put([Spec(500, 0, 40).item()]) == ["failed"]
    assert disk.counts["put_failed:gone"] == 1
    assert before == {file.name: file.stat().st_size for file in (tmp_path / "away").iterdir()}
    disk.close()
    all_there(opened(tmp_path / "kv", CAPACITY), tmp_path / "kv")


@pytest.mark.parametrize("number", [errno.EFBIG, errno.ENOSPC])
def test_nothing_is_given_up_where_that_gains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A limit of the process; a disk that says that it is full, and is not."""
    disk = filled(tmp_path / "kv")

    def full(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        for i in range(5):
            assert disk.put([Spec(500 + i, 0, 40).item()]) == ["full"]
    assert disk.counts["evicted"] == 0
    all_there(disk, tmp_path / "kv")


def test_what_a_killed_writer_left_is_cut_off_or_kept(tmp_path: Path) -> None:
    """Beside one that has the folder open: torn it goes, whole it may come back."""
    disk = filled(tmp_path / "kv")
    last = max((tmp_path / "kv" / "segments").iterdir())
    data = last.read_bytes()
    with open(last, "ab") as file:
        file.write(data[:8192])  # the header of a record that is there, and some of its bytes
    assert disk.put([Spec(500, 0, 40).item()])[0] in ("stored", "failed")
    all_there(disk, tmp_path / "kv")


def test_what_a_dead_writer_left_takes_no_more_room_than_there_is(tmp_path: Path) -> None:
    """It dies behind its sync, before anybody knows what it wrote: that is alive, and counts."""
    disk = filled(tmp_path / "kv")
    found = 0
    for i in range(30):
        some = [Spec(2000 + 20 * i + j, 0, 40) for j in range(20)]

        def child(pipe: int, some: list[Spec] = some) -> None:
            Summed.commit = lambda self: os._exit(0)  # type: ignore[method-assign]
            disk.put([spec.item() for spec in some])

        os.waitpid(forked(child)[0], 0)
        assert disk.put([Spec(5000 + i, 0, 40).item()]) == ["stored"]
        assert live_bytes(disk) <= disk.room.limit
        found += sum(served(disk, spec) is True for spec in some)
    assert found > 100 and disk.counts["evicted"] > 0
    disk.close()


def dying(disk: Disk, method: str, act: Callable[[Disk], object]) -> None:
    """A child that has the folder open too, and dies as soon as it calls a method of its files."""

    def child(pipe: int) -> None:
        with disk_of(disk.folder.root) as own:
            setattr(Segments, method, lambda *_: os._exit(7))
            act(own)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(child)[0], 0)[1]) == 7


@contextlib.contextmanager
def disk_of(root: Path) -> Iterator[Disk]:
    disk = opened(root, CAPACITY)
    try:
        yield disk
    finally:
        disk.close()


EVICTED = [spec.record() for spec in SPECS[:20]]
# What a writer does, and what it does not come to do any more.
DEATHS: dict[str, tuple[str, Callable[[Disk], object]]] = {
    "evicts": ("mark", lambda disk: disk.evict(EVICTED)),
    "puts in the place of others": (
        "mark", lambda disk: disk.put([Spec(i, 1, 40, "isolated").item() for i in range(40)]),
    ),
    "grows a tail": ("mark", lambda disk: disk.put([Spec(70, 70, 50, tail=True).item()])),
    "compacts": ("unlink", lambda disk: disk.room.compact_one(disk.folder.catalog.segments())),
}  # fmt: skip


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("beside", [True, False], ids=["beside another", "alone"])
def test_a_writer_dies_before_it_marks_or_removes_what_is_dead(
    tmp_path: Path, death: str, beside: bool
) -> None:
    """Whoever comes next believes the index, loses nothing, and can let go of all of it."""
    disk = opened(tmp_path / "kv", CAPACITY)
    others = [Spec(i, 0, 40, "blended") for i in range(40)]
    tail = Spec(70, 70, 30, tail=True)
    some = SPECS if death in ("evicts", "compacts") else [*others, tail]
    for i in range(0, len(some), 10):
        assert {*disk.put([spec.item() for spec in some[i : i + 10]])} == {"stored"}
    if death == "compacts":
        disk.evict([spec.record() for spec in some[::2]])
    before = {id for id, _ in disk.folder.catalog.records()}
    if not beside:
        disk.close()
    dying(disk, *DEATHS[death])
    if not beside:
        disk = opened(tmp_path / "kv", CAPACITY)
    after = {id for id, _ in disk.folder.catalog.records()}
    if death in ("evicts", "compacts"):
        assert len(before - after) <= len(EVICTED) * (death == "evicts")
    for _ in range(3):
        held = list({id for id, _ in disk.folder.catalog.records()})
        assert disk.put([Spec(500, 0, 40).item()]) == ["stored"]
        disk.evict_ids([*held, Spec(500, 0, 40).record().id])
        for spec in some:
            assert served(disk, spec) is not False
    assert disk.counts["index_condemned"] == disk.counts["put_failed:index"] == 0
    assert len(disk.folder.catalog) == 0 and disk.size == 0
    disk.close()
    # Nor does it come back with an index made from the files.
    (tmp_path / "kv" / "index" / "seal").unlink()
    disk = opened(tmp_path / "kv", CAPACITY)
    assert disk.counts["index_rebuilt"] == 1 and len(disk.folder.catalog) == 0
    disk.close()
