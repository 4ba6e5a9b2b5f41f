"""What processes that share a folder tell each other of what they compute."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmc.store.disk import flights
from lmc.store.disk.tier import Disk
from lmc.store.flights import LASTS_S, NAME_BYTES, Flight, SingleFlight

NAMES = [i.to_bytes(NAME_BYTES, "little") for i in range(3000)]


def opened(path: Path) -> Disk:
    return Disk(path / "kv", 1 << 20)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    disks = (opened(tmp_path), opened(tmp_path))
    yield disks[0].flights, disks[1].flights
    for disk in disks:
        disk.close()


def begin(flights: Any, names: dict[bytes, int], asked: Sequence[bytes] = ()) -> dict[bytes, int]:
    """For one request; what it asked about."""
    (told,) = flights.begin([(names, asked)])
    return {name: told[name] for name in asked if name in told}


def aged(path: Path, seconds: float) -> None:
    """All files but the youngest were last renewed so long ago."""
    for file in (path / "kv" / flights.FOLDER).iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


def test_what_one_has_begun_the_other_knows_until_it_ends(two: tuple[Any, Any]) -> None:
    one, other = two
    mine = dict.fromkeys(NAMES[:2000], 7)
    assert begin(one, mine, NAMES) == {}
    assert other.others(NAMES) == mine
    assert begin(other, dict.fromkeys(NAMES[1000:], 9), NAMES[900:1100]) == dict.fromkeys(
        NAMES[900:1100], 7
    )
    assert one.others(NAMES) == dict.fromkeys(NAMES[2000:], 9)  # but not those it has itself
    one.end(NAMES[:500])
    assert set(other.others(NAMES)) == set(NAMES[500:2000])
    one.close()
    assert other.others(NAMES) == {}


def test_who_is_not_heard_of_counts_as_gone(two: tuple[Any, Any], tmp_path: Path) -> None:
    one, other = two
    begin(one, dict.fromkeys(NAMES[:3], 1))
    assert len(other.others(NAMES)) == 3
    aged(tmp_path, LASTS_S + 1)
    assert other.others(NAMES) == {}
    one.renew()
    assert len(other.others(NAMES)) == 3
    aged(tmp_path, flights.GONE_S + 1)
    assert other.others(NAMES) == {}
    assert len(list((tmp_path / "kv" / flights.FOLDER).iterdir())) == 1
    one.renew()  # it was only asleep
    assert len(other.others(NAMES)) == 3
    aged(tmp_path, -3600)  # the clock was set back
    assert other.others(NAMES) == {}


def test_of_what_is_begun_twice_one_may_end(two: tuple[Any, Any]) -> None:
    one, other = two
    begin(one, dict.fromkeys(NAMES[:6], 1))
    begin(one, dict.fromkeys(NAMES[3:9], 1))
    one.end(NAMES[:6])
    assert set(other.others(NAMES)) == set(NAMES[3:9])
    one.end(NAMES[3:9])
    assert other.others(NAMES) == {}


def test_of_many_that_begin_at_once_one_has_each(tmp_path: Path) -> None:
    disks = [opened(tmp_path) for _ in range(4)]
    for round in range(20):
        start = threading.Barrier(len(disks))
        got: list[set[bytes]] = [set() for _ in disks]

        def one(i: int, got: Any = got, start: Any = start, round: int = round) -> None:
            names = NAMES[(i * 10 + round) % 40 :][:50]
            start.wait()
            told = begin(disks[i].flights, dict.fromkeys(names, 1), names)  # type: ignore[union-attr]
            got[i] = set(names) - set(told)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(disks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wanted = {n for i in range(len(disks)) for n in NAMES[(i * 10 + round) % 40 :][:50]}
        assert sum(map(len, got)) == len(set().union(*got)) == len(wanted)
        for i, disk in enumerate(disks):
            disk.flights.end(got[i])  # type: ignore[union-attr]
    for disk in disks:
        assert not [kind for kind in disk.counts if kind.startswith("flights")]
        disk.close()
    assert not list((tmp_path / "kv" / flights.FOLDER).iterdir())


def _flies(path: Path, begun: Any) -> None:
    disk = opened(path)
    assert disk.flights is not None
    single = SingleFlight(disk.flights)
    flight = Flight(dict.fromkeys(NAMES[:5], 3), [])
    flight.admitted = True
    single.begin(flight)
    begun.set()
    time.sleep(3600)


def test_one_that_is_killed_is_gone_soon_and_one_that_computes_on_is_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    child = context.Process(target=_flies, args=(tmp_path, begun))
    child.start()
    assert begun.wait(120)
    disk = opened(tmp_path)
    assert disk.flights is not None
    end = time.monotonic() + LASTS_S + 2
    while time.monotonic() < end:  # longer than it lasts without being renewed
        assert len(disk.flights.others(NAMES)) in ({0, 5} if time.monotonic() < end - 4 else {5})
        time.sleep(0.1)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    until = time.monotonic() + LASTS_S + 20
    while disk.flights.others(NAMES):
        assert time.monotonic() < until
        time.sleep(0.1)
    disk.close()


def test_what_is_begun_and_not_computed_in_time_is_free_again(two: tuple[Any, Any]) -> None:
    one, other = two
    single = SingleFlight(one)
    queued, computed = (Flight(dict.fromkeys(names, 3), []) for names in (NAMES[:5], NAMES[5:9]))
    computed.admitted = True
    for flight in (queued, computed):
        single.begin(flight)
        flight.wait(60)
    until = time.monotonic() + 60
    while set(other.others(NAMES)) != set(NAMES[5:9]):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert (queued.lapsed, computed.lapsed) == (True, False)
    for flight in (queued, computed):
        single.end(flight)
    single.close()
    assert other.others(NAMES) == {}
    assert not single._flying and not single._queued and not single._landing


@pytest.mark.parametrize("kind", ["noise", "empty", "huge", "folder", "link", "fifo"])
def test_whatever_lies_there_harms_nobody(two: tuple[Any, Any], tmp_path: Path, kind: str) -> None:
    one, other = two
    begin(one, dict.fromkeys(NAMES[:5], 3))
    place = tmp_path / "kv" / flights.FOLDER / "0123"
    if kind == "folder":
        place.mkdir()
    elif kind == "link":
        secret = tmp_path / "secret"
        secret.write_bytes(b"".join(NAMES) * 2)
        place.symlink_to(secret)
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        data = {"noise": os.urandom(1001), "empty": b"", "huge": bytes(64 << 20)}
        place.write_bytes(data[kind])
    begun = time.monotonic()
    assert set(other.others(NAMES)) >= set(NAMES[:5])
    assert len(other.others(NAMES)) < 10
    assert time.monotonic() - begun < 10


def test_a_folder_that_cannot_be_written_tells_of_nothing_and_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = opened(tmp_path)
    assert disk.flights is not None

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    assert begin(disk.flights, {NAMES[0]: 1}, NAMES) == {}
    assert disk.counts["flights_failed:disk_full"] == 1
    monkeypatch.undo()
    disk.close()
    assert begin(disk.flights, {NAMES[0]: 1}, NAMES) == {}
    assert disk.counts["flights_failed:closed"] == 1


def test_who_only_reads_tells_nothing(tmp_path: Path) -> None:
    opened(tmp_path).close()
    disk = Disk(tmp_path / "kv", 1 << 20, read_only=True)
    assert disk.flights is None
    disk.close()
