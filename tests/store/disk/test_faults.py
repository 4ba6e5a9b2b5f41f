"""Disks that are full or may not be written, and several processes in one folder."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.disk.chunks import Spec, forked, held, leaked, opened, put, right, served


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(path: Path) -> None:
    """Take all that is left of a file system."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        while os.write(fd, bytes(4096)):
            pass
    except OSError:
        assert shutil.disk_usage(path.parent).free == 0
    finally:
        os.close(fd)


def test_a_full_disk_is_a_smaller_one(small_disk: Path) -> None:
    """Beyond the disk's end puts make room or fail; gets go on; what is freed is used again."""
    disk = opened(small_disk / "kv", 64 << 20)
    acknowledged = 0
    specs = [Spec(i, 0, 100) for i in range(600)]  # 26 KB each
    for i, spec in enumerate(specs):
        acknowledged += put(disk, spec)
        assert served(disk, specs[i // 2]) is not False
    assert acknowledged > 300  # more than there is room for: it goes on
    there = held(disk).values()
    assert len(there) > 50 and all(served(disk, spec) for spec in there)
    assert leaked(disk) == 0
    # Others fill the rest, to the last byte.
    fill(small_disk / "others")
    alive = list(held(disk).values())
    failed = [put(disk, Spec(1000 + i, 0, 100)) for i in range(20)]
    kept = [spec for spec in alive if spec.record().id in held(disk)]
    assert all(served(disk, spec) for spec in kept)
    assert leaked(disk) == 0
    assert not all(failed) or disk.counts["evicted"]
    (small_disk / "others").unlink()
    assert disk.put([Spec(2000, 0, 100).item()]) == ["stored"]
    assert served(disk, Spec(2000, 0, 100))
    disk.close()
    disk = opened(small_disk / "kv", 64 << 20)
    assert served(disk, Spec(2000, 0, 100)) and leaked(disk) == 0
    disk.close()


def test_a_disk_too_full_for_an_index_can_be_read(small_disk: Path) -> None:
    disk = opened(small_disk / "kv", 4 << 20)
    specs = [Spec(i, 0, 50) for i in range(20)]
    disk.put([spec.item() for spec in specs])
    disk.close()
    (small_disk / "kv" / "index" / "seal").unlink()  # as after a crash
    fill(small_disk / "others")
    try:
        disk = opened(small_disk / "kv", 4 << 20)
    except OSError:
        # A clear refusal; reading alone makes the index elsewhere.
        disk = opened(small_disk / "kv", 4 << 20, read_only=True)
    assert sum(bool(served(disk, spec)) for spec in specs) == 20
    disk.close()
    (small_disk / "others").unlink()
    disk = opened(small_disk / "kv", 4 << 20)
    assert sum(bool(served(disk, spec)) for spec in specs) == 20
    assert disk.put([Spec(99, 0, 10).item()]) == ["stored"]
    disk.close()


def test_a_folder_that_may_not_be_written_is_read(small_disk: Path) -> None:
    disk = opened(small_disk / "kv", 4 << 20)
    specs = [Spec(i, 0, 20) for i in range(10)]
    disk.put([spec.item() for spec in specs])
    disk.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = {p: p.stat().st_mtime_ns for p in small_disk.rglob("*")}
    for _ in range(2):
        disk = opened(small_disk / "kv", 4 << 20, read_only=True)
        assert all(served(disk, spec) for spec in specs)
        assert disk.put([Spec(99, 0, 20).item()]) == ["failed"]
        assert disk.counts["put_failed:read_only"] == 1
        disk.evict([specs[0].record()])
        assert served(disk, specs[0])
        disk.close()
    with pytest.raises(OSError, match="Read-only file system"):
        opened(small_disk / "kv", 4 << 20)
    assert {p: p.stat().st_mtime_ns for p in small_disk.rglob("*")} == before
    # Without a seal, as after a crash, an index is made elsewhere.
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    (small_disk / "kv" / "index" / "seal").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    disk = opened(small_disk / "kv", 4 << 20, read_only=True)
    assert all(served(disk, spec) for spec in specs)
    disk.close()


def reading(folder: Path, seconds: float, pipe: int) -> None:
    """Get whatever is there for a while; say how many gets there were, and how many were wrong."""
    disk = opened(folder, 2 << 20)
    rng, gets, wrong = random.Random(os.getpid()), 0, 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        spec = Spec(rng.randrange(400), 0, 30)
        got = disk.get(spec.record())
        gets += got is not None
        wrong += got is not None and not right(got, spec)
    disk.close()
    os.write(pipe, b"%d %d" % (gets, wrong))


def writing(folder: Path, contents: range, pipe: int, capacity: int = 2 << 20) -> None:
    """Put contents one after another; say how many were acknowledged."""
    disk = opened(folder, capacity)
    done = sum(put(disk, Spec(i, 0, 30)) for i in contents)
    disk.close()
    os.write(pipe, b"%d" % done)


def said(child: tuple[int, int]) -> list[int]:
    pid, out = child
    with open(out, "rb") as pipe:
        words = pipe.read().split()
    assert os.waitpid(pid, 0)[1] == 0
    return [int(word) for word in words]


def test_readers_go_on_while_a_writer_evicts_and_compacts(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    readers = [forked(lambda pipe: reading(folder, 3.0, pipe)) for _ in range(2)]
    disk = opened(folder, 2 << 20)
    rng, begun = random.Random(0), time.monotonic()
    busy, puts = False, 0  # a slow machine takes longer to get there
    while puts < 2000 if not busy else time.monotonic() < begun + 3.0:
        puts += 1
        disk.put([Spec(rng.randrange(400), 0, 30).item()])
        disk.get(Spec(rng.randrange(400), 0, 30).record())
        busy = disk.counts["evicted"] > 10 and disk.counts["segments_compacted"] > 3
    assert busy
    disk.close()
    for reader in readers:
        gets, wrong = said(reader)
        assert gets > 10 and wrong == 0


def test_two_writers_take_turns(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    children = [
        forked(lambda pipe, some=some: writing(folder, some, pipe, 16 << 20))
        for some in (range(0, 150), range(150, 300))
    ]
    assert [said(child) for child in children] == [[150], [150]]
    disk = opened(folder, 16 << 20)
    assert disk.counts["index_rebuilt"] == 0
    assert all(served(disk, Spec(i, 0, 30)) for i in range(300))
    assert leaked(disk) == 0
    disk.close()


def test_a_segment_removed_under_a_reader_is_a_miss(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv", 4 << 20)
    specs = [Spec(i, 0, 40) for i in range(40)]
    disk.put([spec.item() for spec in specs])
    reader = opened(tmp_path / "kv", 4 << 20)
    shutil.rmtree(tmp_path / "kv" / "segments")
    (tmp_path / "kv" / "segments").mkdir()
    assert all(served(reader, spec) is None for spec in specs)
    assert reader.counts["damaged:missing"] == 40
    reader.close()
    disk.close()


def test_a_segment_cut_under_a_reader_is_a_miss(tmp_path: Path) -> None:
    """Also where its pages are mapped: touching them would kill the process."""
    disk = opened(tmp_path / "kv", 64 << 20)
    specs = [Spec(i, 0, 40) for i in range(10)]
    disk.put([spec.item() for spec in specs])
    (segment,) = (tmp_path / "kv" / "segments").iterdir()
    segment.read_bytes()
    assert all(served(disk, spec) for spec in specs)
    os.truncate(segment, 4096)
    assert all(served(disk, spec) is None for spec in specs)
    assert disk.counts["damaged:truncated"] == 10
    disk.close()
