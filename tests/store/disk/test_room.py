"""Which records go, and how the room of the dead comes back."""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from lmc.cli.store import upkeep
from lmc.policies import POLICIES
from lmc.store.disk import room as rooms
from lmc.store.disk.catalog import Catalog
from lmc.store.disk.folder import Folder
from lmc.store.disk.segments import Segments
from lmc.store.disk.tier import Disk
from tests.store.disk.chunks import Spec, held, leaked, opened, served


def put(disk: Disk, contents: range | list[int]) -> None:
    """Chunks in one put, as far as there is room for them at a time."""
    disk.put([Spec(content, content % 200, 20).item() for content in contents])


def there(disk: Disk) -> set[int]:
    return {spec.content for spec in held(disk).values()}


@pytest.mark.parametrize("policy", ["lru", "leaf_lru", "arc", "lfu", "s3fifo"])
def test_what_is_hot_stays_though_the_clock_goes_back(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order is counted: a clock that is set, forth and back, changes nothing."""
    rng, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + rng.uniform(-1e7, 1e7))
    hot = range(1000, 1010)
    disk = opened(tmp_path / "kv", 1 << 20, policy=policy)
    put(disk, hot)
    for content in range(0, 200, 10):
        for i in hot:
            assert served(disk, Spec(i, i % 200, 20))
        put(disk, range(content, content + 10))
        if content % 100 == 0:  # what is known of the past is in the folder
            disk.close()
            disk = opened(tmp_path / "kv", 1 << 20, policy=policy)
    assert disk.counts["evicted"] > 50 and set(hot) <= there(disk)
    disk.close()


def test_what_is_gone_is_told_by_its_id(tmp_path: Path) -> None:
    """Evicted for others, by whoever asks, or to make room on a full disk; each that was there."""
    disk = opened(tmp_path / "kv", 1 << 20)
    put(disk, range(20))
    before = held(disk)
    assert not disk.removed
    records = [spec.item()[0] for spec in list(before.values())[:3]]
    disk.evict(records)
    assert set(disk.removed) == {record.id for record in records}
    put(disk, range(100, 200))
    gone = {spec.item()[0].id for key, spec in before.items() if key not in held(disk)}
    assert len(gone) > 3 and gone <= set(disk.removed)
    assert not set(disk.removed) & {spec.item()[0].id for spec in held(disk).values()}
    disk.close()


def test_the_order_outlives_the_process_and_a_lost_index(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv", 1 << 20)
    put(disk, range(60))
    for content in range(20):
        served(disk, Spec(content, content, 20))
    disk.close()
    for lost in (False, True):
        folder = tmp_path / f"copy{lost}"
        shutil.copytree(tmp_path / "kv", folder)
        if lost:
            (folder / "index" / "seal").unlink()
        disk = opened(folder, 1 << 20)
        new = iter(range(1000, 2000))
        while not disk.counts["evicted"]:
            put(disk, [next(new)])
        gone = set(range(60)) - there(disk)
        first = set(range(len(gone))) if lost else set(range(20, 20 + len(gone)))
        assert gone == first
        disk.close()


class Looks:
    """Counts what is read of the order of puts and reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = self.most = 0
        since = Catalog.since

        def counted(catalog: Catalog, after: bytes, most: int) -> Any:
            found = since(catalog, after, most)
            self.rows += len(found)
            return found

        monkeypatch.setattr(Catalog, "since", counted)
        for name in ("records", "uses"):

            def all_of_it(catalog: Catalog, name: str = name) -> None:
                raise AssertionError(f"all {name} are read")

            monkeypatch.setattr(Catalog, name, all_of_it)

    def of(self, disk: Disk, content: int) -> int:
        self.rows = 0
        put(disk, [content])
        self.most = max(self.most, self.rows)
        return self.rows


@pytest.mark.parametrize("policy", sorted({*POLICIES.names()} - {"belady"}))
def test_a_put_tells_the_policy_of_a_bounded_number(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder just opened, however much is in it, the first eviction too."""
    monkeypatch.setattr(rooms, "SOME", 8)
    disk = opened(tmp_path / "kv", 4 << 20, policy=policy)
    put(disk, range(390))
    disk.close()
    disk = opened(tmp_path / "kv", 4 << 20, policy=policy)
    looks = Looks(monkeypatch)
    for content in range(1000, 1060):
        looks.of(disk, content)
    assert disk.counts["evicted"] > 10 and disk.counts["puts"] == 60
    # A policy that would rather refuse a newcomer is told more.
    assert looks.most <= (100 if policy not in ("leaf_lru", "wtinylfu") else 600)
    disk.close()


def test_the_policy_comes_to_know_all(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv", 64 << 20)
    for start in range(0, 600, 100):
        disk.put([Spec(i, i % 200, 5).item() for i in range(start, start + 100)])
    disk.close()
    disk = opened(tmp_path / "kv", 64 << 20)
    for content in range(2000, 2010):
        put(disk, [content])
    assert len(disk.room._items) >= 600
    disk.close()


def test_what_others_do_is_learned_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two writers each evicts what the other has put, and holds what there is, about."""
    monkeypatch.setattr(rooms, "MOST", 50)
    one, other = opened(tmp_path / "kv", 1 << 20), opened(tmp_path / "kv", 1 << 20)
    for content in range(0, 600, 6):
        # The first does most of it; and it reads what is to stay.
        put(other if content % 42 == 0 else one, range(content, content + 6))
        one.get(Spec(5, 5, 20).record())
    live = len(one.folder.catalog)
    assert 0 < live < 200 and 5 in there(one)
    assert other.counts["evicted"] > 0 and one.counts["put_failed:no_room"] == 0
    for disk in (one, other):
        put(disk, range(5000, 5010))
        assert len(disk.room._items) <= 3 * live + 100
        assert all(served(disk, spec) for spec in held(disk).values())
        disk.close()


def test_an_index_of_another_folder_marks_nothing(tmp_path: Path) -> None:
    """Restored from the wrong backup: what it asks for is not there, and nothing is spoilt."""
    for name, base in (("a", 0), ("b", 1000)):
        disk = opened(tmp_path / name)
        disk.put([Spec(base + i, 0, 20).item() for i in range(30)])
        disk.close()
    shutil.rmtree(tmp_path / "a" / "index")
    shutil.copytree(tmp_path / "b" / "index", tmp_path / "a" / "index")
    disk = opened(tmp_path / "a")
    for i in range(30):
        assert served(disk, Spec(1000 + i, 0, 20)) is None
    disk.close()
    shutil.rmtree(tmp_path / "a" / "index", ignore_errors=True)
    disk = opened(tmp_path / "a")
    assert sum(served(disk, Spec(i, 0, 20)) is True for i in range(30)) == 30
    disk.close()


def test_verify_quarantines_what_it_has_read_and_nothing_put_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = opened(tmp_path / "kv")
    spec = Spec(1, 0, 20)
    disk.put([spec.item(), Spec(2, 0, 20).item()])
    with disk.folder.catalog.reading() as index:
        ((_, located),) = index.parts(spec.record().id)
    with open(tmp_path / "kv" / "segments" / f"{located.segment:08d}.seg", "r+b") as file:
        file.seek(located.at + 4096 + 100)
        file.write(b"rot")
    folder, writing, once = Folder(tmp_path / "kv"), Folder.writing, []

    @contextlib.contextmanager
    def late(self: Folder, patience_s: float = 10.0) -> Iterator[None]:
        if self is folder and not once:  # a server comes first
            once.append(True)
            assert served(disk, spec) is None
            assert disk.put([spec.item()]) == ["stored"]
        with writing(self, patience_s):
            yield

    monkeypatch.setattr(Folder, "writing", late)
    found = upkeep.verify_all(folder)
    assert once and [fault.quarantined for fault in found.faults] == [False]
    assert served(disk, spec) is True
    found = upkeep.verify_all(folder)
    assert found.records == 2 and not found.faults
    folder.close()
    disk.close()


def full(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is written."""

    def append(self: Segments, *arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Segments, "append", append)


def test_a_writer_that_gains_nothing_gives_up_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has the removed files open: the store is not drained for nothing."""
    disk = opened(tmp_path / "kv", 4 << 20)
    put(disk, range(200))
    before = len(disk.folder.segments.numbers())
    free = [0]
    monkeypatch.setattr(Segments, "free", lambda self: free[0])
    with monkeypatch.context() as patch:
        full(disk, patch)
        for content in range(300, 310):
            assert disk.put([Spec(content, 0, 20).item()]) == ["full"]
        assert len(disk.folder.segments.numbers()) == before - 1
        assert disk.counts["put_failed:disk_full"] == 10
        free[0] = 200 << 10  # they have let go of some: if that is not enough, there is one more
        for content in range(300, 310):
            assert disk.put([Spec(content, 0, 20).item()]) == ["full"]
        assert len(disk.folder.segments.numbers()) == before - 2
    kept = held(disk).values()
    assert len(kept) > 100 and all(served(disk, spec) for spec in kept)
    put(disk, [999])
    assert served(disk, Spec(999, 999 % 200, 20)) and leaked(disk) == 0
    disk.close()


def test_a_segment_that_is_given_up_and_an_index_that_cannot_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = opened(tmp_path / "kv", 4 << 20)
    put(disk, range(200))
    before = set(disk.folder.segments.numbers())
    change, fail = Catalog.change, [False]
    monkeypatch.setattr(Segments, "free", lambda self: 0)

    @contextlib.contextmanager
    def failing(catalog: Catalog) -> Iterator[Any]:
        with change(catalog) as made:
            yield made
            if set(disk.folder.segments.numbers()) != before:
                fail[0] = True
                raise lmdb.DiskError("no space")

    with monkeypatch.context() as patch:
        full(disk, patch)
        patch.setattr(Catalog, "change", failing)
        assert disk.put([Spec(300, 0, 20).item()]) == ["full"]
    assert fail[0] and len(disk.folder.segments.numbers()) == len(before) - 1
    put(disk, [301])
    assert served(disk, Spec(301, 101, 20)) and leaked(disk) == 0
    kept = held(disk).values()
    assert len(kept) > 100 and all(served(disk, spec) for spec in kept)
    assert disk.counts["quarantined"] == 0
    disk.close()


def test_nothing_is_appended_to_a_file_of_two_names(tmp_path: Path) -> None:
    """A copy of the folder by hard links stays what it was, and a foreign file too."""
    disk = opened(tmp_path / "kv")
    put(disk, range(10))
    disk.close()
    shutil.copytree(
        tmp_path / "kv", tmp_path / "copy", copy_function=lambda a, b: Path(b).hardlink_to(a)
    )
    for file in (tmp_path / "copy").glob("index/*"):
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
    before = (tmp_path / "copy" / "segments" / "00000001.seg").read_bytes()
    disk = opened(tmp_path / "kv")
    put(disk, range(10, 20))
    assert all(served(disk, Spec(i, i, 20)) for i in range(20))
    assert (tmp_path / "copy" / "segments" / "00000001.seg").read_bytes() == before
    disk.close()
