"""Segment files: what is opened and for how long, and what the system may refuse."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmc.store.disk import files, maps, write
from lmc.store.disk.header import PAGE
from lmc.store.disk.segments import Segments, aligned
from tests.store.disk.chunks import Spec, opened


def data(number: int, pages: int = 2) -> np.ndarray:
    """What the tests write to a segment: another one's is another everywhere."""
    out = aligned(pages * PAGE)
    out[:] = np.random.default_rng(number).integers(1, 256, out.nbytes, np.uint8)
    return out


def filled(folder: Path, numbers: range, pages: int = 2) -> Segments:
    folder.mkdir(exist_ok=True)
    segments = Segments(folder)
    for number in numbers:
        assert segments.create(number)
        segments.append(number, 0, [data(number, pages)])
    return segments


def read(segments: Segments, number: int, cached: bool = False, pages: int = 2) -> np.ndarray:
    into = aligned(pages * PAGE)
    into[:] = 0xEE
    segments.read(number, 0, [into], cached)
    return into


def names() -> list[str]:
    """What the process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # of the listing itself
            continue
    return found


@pytest.mark.parametrize(
    ("system", "call"),
    [
        ("fdatasync", lambda s: s.sync(1)),
        ("ftruncate", lambda s: s.truncate(1, PAGE)),
        ("pread", lambda s: s.pread(1, 0, 8)),
        ("preadv", lambda s: read(s, 1)),
        ("preadv", lambda s: read(s, 1, cached=True)),
        ("pwritev", lambda s: s.append(1, 2 * PAGE, [data(1)])),
        ("pwrite", lambda s: s.mark(1, 0, 1, data(1)[:64].tobytes())),
        ("fstat", lambda s: s.appendable(1)),
        ("fstat", lambda s: s.view(1, 0, PAGE)),
    ],
)
def test_a_call_goes_to_the_file_it_is_meant_for(
    system: str, call: Callable[[Segments], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though others close that file meanwhile, and open others under its number."""
    segments = filled(tmp_path / "s", range(1, 2))
    segments.pread(1, 0, 1)
    innocent = tmp_path / "innocent"
    innocent.write_bytes(b"x" * 10 * PAGE)
    real, went, others = getattr(os, system), [], []

    def between(fd: int, *arguments: Any) -> Any:
        segments.forget({1})
        gc.collect()
        others.extend(os.open(innocent, os.O_RDWR) for _ in range(8))
        went.append(os.readlink(f"/proc/self/fd/{fd}"))
        return real(fd, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, system, between)
        call(segments)
    for fd in others:
        os.close(fd)
    assert went and set(went) == {str(tmp_path / "s" / "00000001.seg")}
    assert innocent.read_bytes() == b"x" * 10 * PAGE


def test_few_files_are_open_however_many_there_are(tmp_path: Path) -> None:
    numbers = range(1, 3 * files.MOST_FILES)
    segments = filled(tmp_path / "s", numbers)
    before = len(names())
    for how in (False, True):
        for number in numbers:
            assert np.array_equal(read(segments, number, how), data(number))
            view = segments.view(number, 0, 2 * PAGE)
            assert view is None or np.array_equal(view, data(number))
    inside = [name for name in names() if name.endswith(".seg")]
    assert 0 < len(inside) <= files.MOST_FILES
    assert len(names()) <= before + files.MOST_FILES
    segments.close()
    assert not [name for name in names() if name.startswith(str(tmp_path))]


def test_without_descriptors_files_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = filled(tmp_path / "s", range(1, 20))
    segments.close()
    real, refused = os.open, []

    def scarce(path: Any, *arguments: Any, **options: Any) -> int:
        if sum(name.endswith(".seg") for name in names()) >= 3:
            refused.append(path)
            raise OSError(errno.EMFILE, "too many open files")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", scarce)
    for how in (False, True):
        for number in range(1, 20):
            assert np.array_equal(read(segments, number, how), data(number))
            segments.append(number, 2 * PAGE, [data(number)])
            segments.sync(number)
    assert refused


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_what_the_system_does_not_do_past_the_page_cache_goes_through_it(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = filled(tmp_path / "s", range(1, 3))
    real, refused = getattr(os, call), []

    def refusing(fd: int, *arguments: Any) -> int:
        name = os.readlink(f"/proc/self/fd/{fd}")
        if name.endswith("1.seg") and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(name)
            raise OSError(errno.EINVAL, "not so")
        done: int = real(fd, *arguments)
        return done

    monkeypatch.setattr(os, call, refusing)
    for _ in range(3):
        for number in (1, 2):
            segments.append(number, 2 * PAGE, [data(number)])
            assert np.array_equal(read(segments, number), data(number))
            assert segments.pread(number, 2 * PAGE, PAGE) == data(number)[:PAGE].tobytes()
    assert len(refused) <= 1  # and it is not asked again

    def failing(fd: int, *arguments: Any) -> int:
        raise OSError(errno.EINVAL, "never")

    monkeypatch.setattr(os, call, failing)
    again: Callable[[], object] = lambda: segments.append(1, 0, [data(1)])  # noqa: E731
    if call == "preadv":
        again = lambda: read(segments, 1)  # noqa: E731
    with pytest.raises(OSError, match="never"):
        again()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "foreign", "dangling"])
def test_nothing_but_plain_files_of_the_owner_is_touched(kind: str, tmp_path: Path) -> None:
    segments = filled(tmp_path / "s", range(1, 2))
    outside = tmp_path / "outside"
    outside.write_bytes(data(7).tobytes())
    place = tmp_path / "s" / "00000002.seg"
    if kind == "link":
        place.symlink_to(outside)
    elif kind == "dangling":
        place.symlink_to(tmp_path / "new")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        if os.geteuid() != 0:
            pytest.skip("only root can make a file somebody else's")
        place.write_bytes(data(7).tobytes())
        os.chown(place, 12345, 12345)
    calls: list[Callable[[], object]] = [
        lambda: read(segments, 2),
        lambda: segments.pread(2, 0, 8),
        lambda: segments.view(2, 0, PAGE),
        lambda: segments.append(2, 0, [data(2)]),
        lambda: segments.sync(2),
        lambda: segments.truncate(2, 0),
        lambda: segments.mark(2, 0, 1, data(7)[:64].tobytes()),
    ]
    for call in calls:
        with pytest.raises(OSError, match=r"segment 2|directory"):
            call()
    assert segments.create(2) is False
    assert segments.numbers() == ([1, 2] if kind == "foreign" else [1])
    assert outside.read_bytes() == data(7).tobytes() and not (tmp_path / "new").exists()


def test_a_folder_that_is_a_link_is_no_folder(tmp_path: Path) -> None:
    filled(tmp_path / "s", range(1, 2))
    (tmp_path / "link").symlink_to(tmp_path / "s")
    segments = Segments(tmp_path / "link")
    for call in (segments.numbers, lambda: segments.create(2), lambda: read(segments, 1)):
        with pytest.raises(OSError, match="link"):
            call()


def test_names_are_those_of_the_folder_that_was_opened(tmp_path: Path) -> None:
    """Wherever its path leads by now."""
    segments = filled(tmp_path / "s", range(1, 2))
    (tmp_path / "s").rename(tmp_path / "moved")
    (tmp_path / "s").symlink_to(tmp_path)
    assert segments.create(2) and (tmp_path / "moved" / "00000002.seg").exists()
    segments.unlink(2)
    assert segments.numbers() == [1] and np.array_equal(read(segments, 1), data(1))


def deleted() -> set[str]:
    """Removed files of segments that the process keeps, by name."""
    lines = [*names(), *Path("/proc/self/maps").read_text().splitlines()]
    return {line.split("/")[-1][:8] for line in lines if ".seg (deleted)" in line}


def test_a_reader_lets_go_of_what_others_remove(tmp_path: Path) -> None:
    """Even when it reads nothing any more; but what is in use stays readable."""
    filled(tmp_path / "s", range(1, 9)).close()
    reader = Segments(tmp_path / "s")
    views = {number: reader.view(number, 0, 2 * PAGE) for number in range(1, 9)}
    for number in range(1, 9):
        read(reader, number)
    kept = views[3]
    views.clear()
    for number in range(1, 8):
        os.unlink(tmp_path / "s" / f"{number:08d}.seg")
    until = time.monotonic() + 30
    most = {"00000003"} if kept is not None else set()
    while deleted() - most and time.monotonic() < until:
        time.sleep(0.05)
    assert deleted() == most and reader.opened() == {8}
    if kept is not None:
        assert np.array_equal(kept, data(3))
        del kept
        assert deleted() == set()
    with pytest.raises(FileNotFoundError):
        read(reader, 1)
    assert np.array_equal(read(reader, 8), data(8))
    reader.close()


@pytest.mark.parametrize("runs", [1, 3])
def test_a_write_that_fails_keeps_no_file_open(
    runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the space of that file would not come back before the collector runs."""
    monkeypatch.setattr(write, "FIRST_BYTES", 1 if runs > 1 else 1 << 30)
    disk = opened(tmp_path / "kv")
    specs = [Spec(i, 0, 20) for i in range(runs)]
    real, failed = os.pwritev, []

    def failing(fd: int, *arguments: Any) -> int:
        failed.append(fd)
        raise OSError(errno.ENOSPC, "no space")

    gc.collect()
    gc.disable()
    try:
        disk.put([Spec(9, 0, 20).item()])
        monkeypatch.setattr(os, "pwritev", failing)
        monkeypatch.setattr(Segments, "free", lambda self: 0)
        assert disk.put([spec.item() for spec in specs]) == ["full"] * runs
        monkeypatch.setattr(os, "pwritev", real)
        assert failed and deleted() == set()
        disk.evict([Spec(9, 0, 20).record()])
        assert deleted() == set()
    finally:
        gc.enable()
    disk.close()


def test_nobody_watches_files_that_are_closed(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    closed, dropped = filled(tmp_path / "a", range(1, 2)), filled(tmp_path / "b", range(1, 2))
    closed.close()
    del dropped
    until = time.monotonic() + 30
    while set(threading.enumerate()) - before and time.monotonic() < until:
        time.sleep(0.05)
    assert not set(threading.enumerate()) - before
    assert not [name for name in names() if name.startswith(str(tmp_path))]


def test_a_file_cut_short_under_its_map_kills_nobody(tmp_path: Path) -> None:
    segments = filled(tmp_path / "s", range(1, 2), 64)
    read(segments, 1, True, 64)
    if segments.view(1, 0, 64 * PAGE) is None:
        pytest.skip("the page cache does not keep what was read")
    os.truncate(tmp_path / "s" / "00000001.seg", 10 * PAGE)
    assert segments.view(1, 0, 64 * PAGE) is None
    assert segments.view(1, 20 * PAGE, PAGE) is None
    with pytest.raises(EOFError):
        read(segments, 1, True, 64)
    with pytest.raises(EOFError):
        segments.view(1, 1 << 30, PAGE)
    view = segments.view(1, 0, 10 * PAGE)
    assert view is None or np.array_equal(view, data(1, 64)[: 10 * PAGE])


def test_what_is_appended_is_seen_through_the_same_map(tmp_path: Path) -> None:
    segments = filled(tmp_path / "s", range(1, 2))
    at, seen = 2 * PAGE, 0
    for i in range(2, 40):
        segments.append(1, at, [data(i)])
        segments.pread(1, at, 2 * PAGE)
        view = segments.view(1, at, 2 * PAGE)
        assert view is None or np.array_equal(view, data(i))
        seen += view is not None
        at += 2 * PAGE
    assert seen == 0 or Path("/proc/self/maps").read_text().count("00000001.seg") == 1


def test_without_the_truth_about_memory_nothing_is_seen_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To who may not write a file Linux says that all of it is in memory."""
    segments = filled(tmp_path / "s", range(1, 2))
    monkeypatch.setattr(maps.Map, "resident", lambda self, at, nbytes: True)
    assert segments.view(1, 0, PAGE) is None and segments.view(1, 0, PAGE) is None
    assert np.array_equal(read(segments, 1), data(1))


def test_a_state_is_written_into_the_record_that_is_meant_alone(tmp_path: Path) -> None:
    segments = filled(tmp_path / "s", range(1, 3))
    before = data(1)
    assert segments.mark(1, 0, 2, data(2)[:64].tobytes()) is False
    assert segments.pread(1, 0, PAGE) == before[:PAGE].tobytes()
    assert segments.mark(1, 0, 2, before[:64].tobytes()) is True
    before[4] = 2
    assert segments.pread(1, 0, PAGE) == before[:PAGE].tobytes()
    assert segments.mark(1, 0, 1, data(1)[:64].tobytes()) is True  # whatever its state was
