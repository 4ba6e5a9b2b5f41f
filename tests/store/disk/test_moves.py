"""Records that are moved, replaced or unreadable while somebody wants them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmc.store.disk.header import LIVE, STATE_AT
from lmc.store.disk.segments import Segments
from lmc.store.disk.tier import Disk
from tests.store.disk.chunks import Spec, after, find, held, leaked, opened, served


def located(disk: Disk, spec: Spec) -> tuple[int, int]:
    """Segment and offset of a record."""
    with disk.folder.catalog.reading() as index:
        ((_, found),) = index.parts(spec.record().id)
    return found.segment, found.at


def move(disk: Disk, spec: Spec) -> None:
    """Have a record copied to another file, by making a gap in the one that it is in."""
    segment, _ = before = located(disk, spec)
    near = [other for other in held(disk).values() if located(disk, other)[0] == segment]
    disk.evict([next(other for other in near if other != spec).record()])
    with disk.folder.writing():
        assert disk.room.compact_one(disk.folder.catalog.segments())
    assert located(disk, spec) != before


@contextmanager
def bad_sector(number: int, call: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One segment cannot be read by `call`."""
    sound = getattr(Segments, call)

    def failing(self: Segments, segment: int, *arguments: Any, **options: Any) -> Any:
        if segment == number:
            raise OSError(errno.EIO, "a bad sector")
        return sound(self, segment, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Segments, call, failing)
        yield


def test_a_segment_number_is_never_used_twice(tmp_path: Path) -> None:
    """Or a writer that has the old file open would append to that, acknowledge, and lose it."""
    one, other = opened(tmp_path / "kv"), opened(tmp_path / "kv")
    first, second, third = (Spec(i, 0, 30) for i in range(3))
    assert other.put([first.item()]) == ["stored"]
    one.evict([first.record()])  # and with it goes the file
    assert one.put([second.item()]) == ["stored"]
    assert other.put([third.item()]) == ["stored"]
    for disk in (one, other):
        assert served(disk, second) and served(disk, third)
        disk.close()
    disk = opened(tmp_path / "kv")
    assert served(disk, second) and served(disk, third) and leaked(disk) == 0
    disk.close()


def test_of_one_content_chunks_are_put_one_after_the_other(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv")
    variants = [Spec(1, context, 20) for context in range(3)]
    assert disk.put([spec.item() for spec in variants]) == ["stored"] * 3
    record = variants[0].record()
    assert [Spec.of(r) for r in find(disk, record)] == variants[1:]

    tails = [Spec(2, 0, T, tail=True) for T in (20, 10, 30)]
    assert disk.put([spec.item() for spec in tails]) == ["stored", "known", "stored"]
    record = tails[0].record()
    found = after(disk, record)
    assert [Spec.of(r) for r in found] == [tails[2]]
    assert disk.contains([spec.record() for spec in tails]) == [False, False, True]

    # What is held when the batch begins may be replaced within it.
    alone = [Spec(3, context, 20, "isolated").item() for context in range(3)]
    assert disk.put([alone[1]]) == ["stored"] and disk.put([alone[2]]) == ["stored"]
    assert disk.put([alone[0], alone[1]]) == ["stored", "stored"]
    disk.close()


def test_what_is_known_of_records_goes_with_them(tmp_path: Path) -> None:
    """A writer that runs for weeks sees far more records than a folder holds."""
    disk = opened(tmp_path / "kv", 1 << 20)
    for content in range(3000):
        disk.put([Spec(content, content % 200, 20).item()])
    live = len(disk.folder.catalog)
    assert 0 < live < 2000
    assert len(disk.room._items) <= live + 100
    assert len(disk.room._ends) <= len(disk.room._items)
    disk.close()


def test_a_tail_that_was_replaced_stays_so(tmp_path: Path) -> None:
    """A process that dies between the index and the mark in the file leaves both as if alive."""
    disk = opened(tmp_path / "kv")
    short, long = (Spec(1, 0, T, tail=True) for T in (10, 20))
    disk.put([short.item()])
    number, at = located(disk, short)
    disk.put([long.item()])
    disk.close()
    with open(tmp_path / "kv" / "segments" / f"{number:08d}.seg", "r+b") as file:
        file.seek(at + STATE_AT)
        assert file.read(1) != bytes([LIVE])
        file.seek(at + STATE_AT)
        file.write(bytes([LIVE]))
    (tmp_path / "kv" / "index" / "seal").unlink()
    disk = opened(tmp_path / "kv")
    assert list(held(disk).values()) == [long]
    record = long.record()
    found = after(disk, record)
    assert [Spec.of(r) for r in found] == [long]
    disk.close()


def test_of_two_tails_the_later_put_stays_wherever_they_lie(tmp_path: Path) -> None:
    """One that was moved may lie in front of the one whose place it took."""
    for turned in (False, True):
        disk = opened(tmp_path / str(turned))
        parts = []
        for seq, spec in enumerate(Spec(1, 0, T, tail=True) for T in (10, 20)):
            header, data, _ = disk._encode(*spec.item()).numbered(seq)
            parts.append((header, (1, seq << 20), data))
        with disk.folder.writing(), disk.folder.catalog.change() as change:
            for part in reversed(parts) if turned else parts:
                change.add(*part)
        assert [spec.T for spec in held(disk).values()] == [20]
        assert [record.T for record in after(disk, Spec(1, 0, 20, tail=True).record())] == [20]
        disk.close()


def test_a_reader_follows_a_record_however_often_it_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = opened(tmp_path / "kv"), opened(tmp_path / "kv")
    spec = Spec(0, 0, 20)
    writer.put([Spec(i, 0, 20).item() for i in range(8)])
    moves, view = [1, 2, 3], reader.folder.segments.view

    def late(number: int, at: int, length: int) -> np.ndarray | None:
        if moves:
            moves.pop()
            move(writer, spec)
        return view(number, at, length)

    monkeypatch.setattr(reader.folder.segments, "view", late)
    assert served(reader, spec) is True and moves == []
    assert reader.counts["quarantined"] == 0
    reader.close()
    writer.close()


def test_what_was_moved_before_it_is_set_aside_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = opened(tmp_path / "kv"), opened(tmp_path / "kv")
    spec = Spec(0, 0, 20)
    writer.put([Spec(i, 0, 20).item() for i in range(8)])
    writing = reader.folder.writing

    @contextmanager
    def late(patience_s: float = 10.0) -> Iterator[None]:
        move(writer, spec)
        with writing(patience_s):
            yield

    def gone(number: int, at: int, length: int) -> None:
        raise EOFError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(reader.folder, "writing", late)
        patch.setattr(reader.folder.segments, "view", gone)
        assert served(reader, spec) is None
    assert reader.counts["damaged:truncated"] == 1 and reader.counts["quarantined"] == 0
    assert served(reader, spec) is True and served(writer, spec) is True
    reader.close()
    writer.close()


def test_what_cannot_be_read_at_the_start_is_there_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [Spec(i, 0, 40) for i in range(40)]
    disk = opened(tmp_path / "kv", 4 << 20)
    assert {*disk.put([spec.item() for spec in specs])} == {"stored"}
    lost = {spec for spec in specs if located(disk, spec)[0] == 2}
    disk.close()
    assert 0 < len(lost) < 40
    (tmp_path / "kv" / "index" / "seal").unlink()
    new = Spec(100, 0, 40)
    with bad_sector(2, "pread", monkeypatch):
        disk = opened(tmp_path / "kv", 4 << 20)
        assert disk.counts["segments_unreadable"] == 1
        assert {spec for spec in specs if not served(disk, spec)} == lost
        assert disk.put([new.item()]) == ["stored"]
        disk.evict([specs[0].record()])
        disk.close()
    disk = opened(tmp_path / "kv", 4 << 20)
    assert all(served(disk, spec) for spec in [*specs[1:], new]) and leaked(disk) == 0
    disk.close()


def test_an_index_that_could_not_be_made_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opens the folder next in this process makes another."""
    disk = opened(tmp_path / "kv")
    disk.put([Spec(1, 0, 20).item()])
    disk.close()
    (tmp_path / "kv" / "index" / "seal").unlink()

    def failing(self: Segments) -> list[int]:
        raise OSError(errno.EIO, "the folder cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(Segments, "numbers", failing)
        with pytest.raises(OSError, match="cannot be read"):
            opened(tmp_path / "kv")
    disk = opened(tmp_path / "kv")
    assert served(disk, Spec(1, 0, 20))
    disk.close()
    assert os.path.exists(tmp_path / "kv" / "index" / "seal")
