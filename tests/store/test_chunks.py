"""Bytes behind host memory: fetched while they are used, written while nobody waits."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest

from lmc.store import Record
from lmc.store.chunks import Chunks
from lmc.store.tier import Attached, Outcome
from lmc.store.writer import Writer
from tests.store.hanging import LAYOUT, Plain, T, filled, item, record, rows


class Slow(Plain):
    """A tier whose gets and puts wait to be let through, a layer at a time."""

    name = "slow"

    def __init__(self) -> None:
        super().__init__()
        self.layers = threading.Semaphore(0)
        self.puts = threading.Event()
        self.puts.set()

    def before(self, call: str) -> None:
        if call == "layer":
            self.layers.acquire()
        if call == "put":
            self.puts.wait()

    def close(self) -> None:
        self.layers.release(1000)


def behind(tier: Slow, r: Record, value: float) -> None:
    tier.held[r.id] = rows(value).copy()


def test_first_layers_can_be_used_while_the_last_ones_come() -> None:
    tier, told = Slow(), []
    chunks = Chunks(LAYOUT, 1 << 16, [Attached(tier, "through")], fetched=lambda *x: told.append(x))
    behind(tier, record(3), 2.0)
    chunks.expect(record(3))
    chunks.fetch([3])
    arrival = chunks.arrival(3)
    assert arrival is not None
    tier.layers.release(2)
    assert arrival.wait(2, time.monotonic() + 10)
    assert arrival.parts is not None and bool((arrival.parts[0][:2] == 2.0).all())
    assert chunks.parts(3) is None  # not whole: nobody else finds it
    assert not arrival.wait(3, time.monotonic() + 0.05)
    tier.layers.release(2)
    assert arrival.wait(None, time.monotonic() + 10)
    parts = chunks.parts(3)
    assert parts is not None and bool((parts[0] == 2.0).all())
    assert told == [(3, True)] and chunks.arrival(3) is None
    chunks.close()


def test_what_a_tier_lacks_is_told_and_its_room_free_again() -> None:
    tier, told = Slow(), []
    chunks = Chunks(LAYOUT, 256 * T, [Attached(tier, "back")], fetched=lambda *x: told.append(x))
    tier.layers.release(10)
    chunks.expect(record(1))
    arrival = chunks.arrival(1)
    chunks.fetch([1])
    assert arrival is not None and not arrival.wait(None, time.monotonic() + 10)
    assert told == [(1, False)] and chunks.memory.size == 0
    chunks.close()


def test_a_slot_let_go_while_its_bytes_come_is_not_used_for_others() -> None:
    """Its memory is written until the fetch ends; only then is it free."""
    tier = Slow()
    chunks = Chunks(LAYOUT, 256 * T, [Attached(tier, "through")])
    behind(tier, record(1), 1.0)
    chunks.expect(record(1))
    chunks.fetch([1])
    arrival = chunks.arrival(1)
    tier.layers.release(1)
    assert arrival is not None and arrival.wait(1, time.monotonic() + 10)
    chunks.evict(1)
    assert chunks.reserve(2, T) is None
    tier.layers.release(3)
    assert not arrival.wait(None, time.monotonic() + 10)
    assert chunks.reserve(2, T) is not None
    assert chunks.parts(1) is None
    chunks.close()


def test_through_is_written_when_stored_and_back_when_let_go() -> None:
    through, back = Slow(), Slow()
    chunks = Chunks(LAYOUT, 1 << 16, [Attached(through, "through"), Attached(back, "back")])
    filled(chunks, record(1), 1.0)
    assert chunks.drain(10)
    assert chunks.tiers[0].tier.contains([record(1)]) == [True] and not back.held
    chunks.evict(1)
    assert chunks.drain(10)
    assert back.contains([record(1)]) == [True]
    filled(chunks, record(2), 2.0)
    chunks.close()
    assert back.contains([record(2)]) == [True]


def test_writes_are_dropped_and_counted_rather_than_waited_for() -> None:
    tier = Slow()
    tier.puts.clear()
    counts: Counter[str] = Counter()
    became: list[tuple[int, str]] = []

    def told(r: Record, outcome: str) -> None:
        became.append((r.slot, outcome))

    writer = Writer(tier, LAYOUT, 2 * 256 * T, counts, told)  # two chunks wait, no more
    taken = [writer.offer(*item(record(i), 0.0)) for i in range(5)]
    assert taken == [True, True, False, False, False]
    tier.puts.set()
    assert writer.drain(10)
    assert tier.contains([record(i) for i in range(5)]) == taken
    assert writer.offer(*item(record(4), 0.0))
    ended = threading.Event()
    writer.close(time.monotonic() + 10, ended.set)
    assert writer.join(10) and ended.is_set()
    assert len(tier.held) == 3 and became == [(0, "stored"), (1, "stored"), (4, "stored")]
    assert not writer.offer(*item(record(3), 0.0))


def test_a_writer_that_is_closed_on_a_dead_disk_gives_up() -> None:
    tier = Slow()
    tier.puts.clear()
    counts: Counter[str] = Counter()
    became: list[tuple[int, str]] = []
    writer = Writer(tier, LAYOUT, 1 << 16, counts, lambda r, what: became.append((r.slot, what)))
    assert writer.offer(*item(record(0), 0.0))
    while writer._queue:  # until the thread has taken it
        time.sleep(0.001)
    assert writer.offer(*item(record(1), 0.0))
    ended = threading.Event()
    writer.close(time.monotonic() + 0.1, ended.set)
    assert not writer.join(0.3)
    tier.puts.set()
    assert writer.join(10) and ended.is_set() and became == [(0, "stored"), (1, "dropped")]


def test_a_tier_that_raises_costs_its_batch_and_no_more() -> None:
    class Broken(Slow):
        def put(self, items: Any) -> list[Outcome]:
            if not self.batches:
                self.batches.append(0)
                raise RuntimeError("a defect")
            return super().put(items)

    tier, counts = Broken(), Counter[str]()
    became: list[tuple[int, str]] = []
    writer = Writer(tier, LAYOUT, 1 << 16, counts, lambda r, what: became.append((r.slot, what)))
    assert writer.offer(*item(record(0), 0.0)) and writer.drain(10)
    assert writer.offer(*item(record(1), 0.0)) and writer.drain(10)
    assert became == [(0, "failed"), (1, "stored")]
    assert tier.contains([record(0), record(1)]) == [False, True]
    writer.close(time.monotonic() + 10, lambda: None)
    assert writer.join(10)


@pytest.mark.parametrize("way", ["fetched", "stored"])
def test_what_a_tier_is_offered_is_what_it_gets(way: str) -> None:
    """Its owner lets go of the memory, and has it refilled, while it is copied for the tier."""
    first, second = Plain(), Plain()
    first.name, second.name = "first", "second"
    second.held[record(1).id] = rows(5.0)
    chunks = Chunks(LAYOUT, 256 * T, [Attached(first, "through"), Attached(second, "through")])
    offer, begun, go_on = chunks._writers[0].offer, threading.Event(), threading.Event()
    copied = threading.Event()

    def slowly(r: Record, sections: Any) -> bool:
        if begun.is_set():
            return offer(r, sections)
        begun.set()  # the first of them has its views, and no copy yet
        assert go_on.wait(60)
        taken = offer(r, sections)
        copied.set()
        return taken

    chunks._writers[0].offer = slowly  # type: ignore[method-assign]
    filling = threading.Thread(target=filled, args=(chunks, record(1), 5.0))
    if way == "fetched":
        chunks.expect(record(1))
        chunks.fetch([1])
    else:
        filling.start()
    assert begun.wait(60)
    chunks.evict(1)
    for part in chunks.reserve(2, T) or ():  # there is none, as long as it is read
        part.fill_(1e9)
    go_on.set()
    assert copied.wait(60)
    until = time.monotonic() + 60
    while chunks.arrival(1) is not None:
        assert time.monotonic() < until
    assert chunks.drain(60)
    assert list(first.held) == [record(1).id]
    assert (first.held[record(1).id] == rows(5.0)).all()
    chunks.forget(2)
    while chunks.memory.size:  # free as soon as nobody reads it
        assert time.monotonic() < until
    chunks.close()
