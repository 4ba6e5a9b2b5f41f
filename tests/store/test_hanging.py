"""A tier that hangs: what was asked of it is a miss, all else goes on, and nothing is left."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lmc.store import Record
from lmc.store.chunks import Chunks
from lmc.store.reads import THREADS
from lmc.store.tier import Attached, Progress
from tests.store.hanging import (
    CALLS,
    LAYOUT,
    NBYTES,
    Hanging,
    Plain,
    T,
    disk,
    fetched,
    fetched_in_time,
    filled,
    given,
    item,
    record,
    rows,
)


def until(true: Callable[[], bool]) -> None:
    """Return once it is so."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


class World:
    """Chunks with a tier that hangs, alone or in front of a disk, and what became of each fetch."""

    def __init__(self, folder: Path | None, room: int, queue: int) -> None:
        self.tier = Hanging()
        self.closed = False
        self.told: list[tuple[int, bool]] = []
        self.disk = disk(folder) if folder else None
        tiers = [Attached(self.tier, "through")]
        if self.disk:
            tiers.append(Attached(self.disk, "through"))
        self.chunks = Chunks(
            LAYOUT, room * NBYTES, tiers, queue * NBYTES, 0.2, lambda *x: self.told.append(x)
        )

    def hung_gets(self, first: int = 1000) -> list[Record]:
        """Every reading thread of the tier hangs, past its deadline."""
        self.tier.hang("get")
        hung = [record(first + i) for i in range(THREADS)]
        for r in hung:
            self.tier.held[r.id] = rows(1.0)
            self.chunks.expect(r)
        self.chunks.fetch([r.slot for r in hung])
        for _ in hung:
            assert self.tier.entered.acquire(timeout=60)
        until(lambda: not self.chunks._breakers[0].closed)
        self.told.clear()
        return hung


@contextmanager
def world(folder: Path | None = None, room: int = 64, queue: int = 8) -> Iterator[World]:
    made = World(folder, room, queue)
    try:
        yield made
    finally:
        made.tier.let_go()
        if not made.closed:
            made.chunks.close()


def put_on_disk(folder: Path, records: list[Record], value: float) -> None:
    tier = disk(folder)
    assert tier.put([item(r, value) for r in records]) == ["stored"] * len(records)
    tier.close()


def test_behind_hung_gets_others_fail_and_hold_no_memory() -> None:
    with world() as w:
        chunks = w.chunks
        hung = w.hung_gets()
        assert chunks.memory.size == THREADS * NBYTES and w.told == []
        for i in range(50):
            w.tier.held[record(i).id] = rows(2.0)
            assert not fetched(chunks, record(i))
            assert w.told[-1] == (i, False) and chunks.arrival(i) is None
        assert chunks.memory.size == THREADS * NBYTES
        for r in hung[:4]:  # as the scheduler does with what was waited for in vain
            chunks.evict(r.slot)
        w.tier.let_go()
        until(lambda: len(w.told) == 50 + THREADS and chunks._breakers[0].closed)
        assert sorted(w.told[50:]) == [(r.slot, r not in hung[:4]) for r in hung]
        assert chunks.memory.size == (THREADS - 4) * NBYTES
        for i in range(200, 248):  # all is as it was before
            w.tier.held[record(i).id] = rows(3.0)
            assert fetched(chunks, record(i)) and given(chunks, i) == 3.0


def test_what_waits_behind_hung_gets_is_told_by_its_deadline() -> None:
    """Asked for at a time when nobody knew yet that they hang; and by nobody waited for."""
    with world() as w:
        w.tier.hang("get")
        asked = range(THREADS + 10)
        for i in asked:
            w.chunks.expect(record(i))
        w.chunks.fetch(asked)
        until(lambda: len(w.told) == 10)
        assert all((i, False) in w.told for i in asked if not w.chunks.arrival(i))
        assert w.chunks.memory.size == len(w.chunks._arrivals) * NBYTES == THREADS * NBYTES
        w.tier.let_go()
        until(lambda: len(w.told) == len(asked))
        assert not any(whole for _, whole in w.told) and w.chunks.memory.size == 0


def test_hung_gets_are_bounded_over_periods() -> None:
    with world(room=4 * THREADS) as w:  # of which a quarter is the tier's to write to
        for period in range(3):
            hung = w.hung_gets(1000 * (period + 1))
            assert w.chunks.memory.size == THREADS * NBYTES
            for r in hung:
                w.chunks.evict(r.slot)
            w.tier.let_go()
            until(lambda: len(w.told) == THREADS)
            assert w.chunks.memory.size == 0 and not w.chunks._arrivals


def test_a_disk_behind_hung_gets_is_read(tmp_path: Path) -> None:
    on_disk = [record(i) for i in range(20)]
    put_on_disk(tmp_path / "kv", on_disk, 5.0)
    with world(tmp_path / "kv") as w:
        w.tier.hang("get")
        assert not fetched_in_time(w.chunks, record(0))  # the first one finds out
        for r in on_disk[1:]:
            assert fetched(w.chunks, r) and given(w.chunks, r.slot) == 5.0
        w.tier.let_go()
        until(lambda: not w.chunks._arrivals)
        # What hung came too late to be asked for elsewhere, and is told as not there.
        assert (0, False) in w.told and w.chunks.memory.size == 19 * NBYTES
        # It has come back without what it was asked for: after a rest it is asked once more.
        w.tier.held[record(30).id] = rows(6.0)
        assert not fetched(w.chunks, record(30)) and not w.chunks._breakers[0].closed
        w.chunks._breakers[0]._until = time.monotonic()
        assert fetched(w.chunks, record(30)) and given(w.chunks, 30) == 6.0
        assert w.chunks._breakers[0].closed


def test_what_a_tier_in_front_lacked_is_offered_to_it(tmp_path: Path) -> None:
    put_on_disk(tmp_path / "kv", [record(1)], 5.0)
    with world(tmp_path / "kv") as w:
        until(lambda: w.chunks._breakers[0].closed)
        assert fetched(w.chunks, record(1)) and w.chunks.drain(60)
        assert (w.tier.held[record(1).id] == rows(5.0)).all()


@pytest.mark.parametrize("beside", [False, True])
def test_hung_puts_are_dropped_and_counted(beside: bool, tmp_path: Path) -> None:
    with world(tmp_path / "kv" if beside else None) as w:
        w.tier.hang("put")
        filled(w.chunks, record(0), 1.0)
        assert w.tier.entered.acquire(timeout=60)
        for i in range(1, 40):  # 8 fit into the queue, the one that hangs among them
            filled(w.chunks, record(i), 1.0)
            if w.disk:
                assert w.chunks._writers[1].drain(60)
        assert w.chunks.counts["writes_dropped:hanging"] == 32
        assert not w.chunks.drain(0.05)
        # Of those dropped, what memory lets go of is offered again, in vain, and lost.
        for i in range(20):
            w.chunks.evict(i)
        assert w.chunks.memory.size == 20 * NBYTES
        if w.disk:
            assert w.chunks._writers[1].drain(60)
            assert all(w.disk.contains([record(i) for i in range(40)]))
            assert w.chunks.counts["writes_dropped:disk"] == 0
        lacking = w.chunks.complete(0.05)
        assert lacking.lacking["hanging"] == 20 and lacking.lost >= 13 and not lacking
        w.tier.let_go()
        assert w.chunks.drain(60)
        assert len(w.tier.held) == 8
        filled(w.chunks, record(50), 1.0)
        assert w.chunks.drain(60) and record(50).id in w.tier.held


@pytest.mark.parametrize("beside", [False, True])
def test_hung_contains_stop_no_eviction(beside: bool, tmp_path: Path) -> None:
    with world(tmp_path / "kv" if beside else None) as w:
        w.tier.hang("contains")
        for i in range(20):
            filled(w.chunks, record(i), 1.0)
        for i in range(20):
            w.chunks.evict(i)
        assert w.chunks.memory.size == 0
        if w.disk:
            assert w.chunks._writers[1].drain(60)
            assert sum(w.disk.contains([record(i) for i in range(20)])) >= 8


def test_what_a_tier_is_known_to_have_is_not_written_again(tmp_path: Path) -> None:
    with world(tmp_path / "kv") as w:
        for i in range(8):
            filled(w.chunks, record(i), 1.0)
            assert w.chunks.drain(60)
        filled(w.chunks, record(0 + 100), 1.0)
        assert w.chunks.drain(60)
        offered = [writer._next for writer in w.chunks._writers]
        for i in range(8):
            w.chunks.evict(i)
        assert [writer._next for writer in w.chunks._writers] == offered
        w.tier.held.clear()  # it let go of what it had: the end finds out
        w.chunks.close()
        w.closed = True
        assert list(w.tier.held) == [record(100).id]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_closing_waits_for_none_that_hangs(call: str, beside: bool, tmp_path: Path) -> None:
    with world(tmp_path / "kv" if beside else None) as w:
        if call == "get":
            w.hung_gets()
        w.tier.hang(call)
        for i in range(5):
            filled(w.chunks, record(i), float(i))
        closing = threading.Thread(target=w.chunks.close, args=(1.0,), daemon=True)
        closing.start()
        closing.join(60)
        assert not closing.is_alive() and not w.tier.closed
        if w.disk:
            again = disk(tmp_path / "kv")
            assert all(again.contains([record(i) for i in range(5)]))
            again.close()
        w.closed = True
        w.tier.let_go()
        until(lambda: not w.chunks._arrivals)
        assert w.chunks.memory.size == 0
        assert not any(whole for _, whole in w.told)


@pytest.mark.parametrize("call", CALLS)
def test_a_process_ends_while_a_tier_hangs(call: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.store.hanging", call, str(tmp_path / "kv")]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[2])
    tier = disk(tmp_path / "kv")
    assert tier.contains([record(2)]) == [True]
    tier.close()


def test_one_that_hangs_takes_no_time_of_what_another_is_to_have(tmp_path: Path) -> None:
    with world(tmp_path / "kv", queue=2) as w:
        w.tier.hang("put")
        for i in range(12):
            filled(w.chunks, record(i), 1.0)
        drained = w.chunks.complete(3.0)
        assert drained.lacking["disk"] == 0 and drained.lacking["hanging"] == 12
        w.tier.let_go()
        assert w.chunks.complete(60.0) and len(w.tier.held) == 12


def test_a_tier_that_cannot_tell_is_polled() -> None:
    """And what it was given to write into is not another's before it says so."""

    class Polled(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.wanted: list[Any] = []
            self.over: Progress = Progress(0, None)
            self.cancelled = 0

        def get_many(self, wanted: Any) -> Any:
            self.wanted += wanted
            return [self] * len(wanted)

        def poll(self) -> Progress:
            return self.over

        def cancel(self) -> None:
            self.cancelled += 1

    tier, told = Polled(), []
    chunks = Chunks(
        LAYOUT, 2 * NBYTES, [Attached(tier, "back")], patience_s=0.3,
        fetched=lambda *x: told.append(x),
    )  # fmt: skip
    chunks.expect(record(1))
    arrival = chunks.arrival(1)
    chunks.fetch([1])
    until(lambda: len(tier.wanted) == 1)
    tier.over = Progress(2, None)
    assert arrival is not None and arrival.wait(2, time.monotonic() + 60)
    assert arrival.parts is not None
    tier.wanted[0].into[0].parts[0][:] = rows(7.0)
    tier.over = Progress(LAYOUT.L, "here")
    until(lambda: told == [(1, True)])
    assert given(chunks, 1) == 7.0 and not tier.cancelled
    tier.over = Progress(0, None)
    chunks.expect(record(2))
    chunks.fetch([2])
    until(lambda: tier.cancelled == 1)  # its time is over
    chunks.evict(2)
    assert chunks.reserve(3, T) is None and (2, False) not in told
    tier.over = Progress(0, "missing")
    until(lambda: (2, False) in told)
    assert chunks.reserve(3, T) is not None
    chunks.close()


def test_memory_that_is_written_out_of_is_registered() -> None:
    tier = Plain()
    chunks = Chunks(LAYOUT, 8 * NBYTES, [Attached(tier, "through")])
    spans = [range(start, start + n) for start, n in tier.registered]
    addresses: list[int] = []
    put = tier.put

    def noted(items: Any) -> Any:
        addresses.extend(part.ctypes.data for _, ss in items for s in ss for part in s.parts)
        return put(items)

    tier.put = noted  # type: ignore[method-assign]
    filled(chunks, record(1), 1.0)
    assert chunks.drain(60)
    chunks.expect(record(1))
    (part,) = chunks.parts(1) or []
    chunks.close()
    for address in (*addresses, part.data_ptr()):
        assert any(address in span for span in spans)


def test_rows_are_of_the_size_that_the_tests_say() -> None:
    assert rows(0.0).nbytes == NBYTES == T * LAYOUT.bytes_per_token
