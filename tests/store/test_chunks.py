"""Bytes behind host memory: fetched while they are used, written while nobody waits."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lmc.model.layout import KVLayout
from lmc.store import Record
from lmc.store.chunks import Attached, Chunks
from lmc.store.rows import copy_rows
from lmc.store.tier import Rows
from lmc.store.writer import Writer

LAYOUT = KVLayout(L=4, G=1, D=8, dtype="float32")  # 256 bytes a token
T = 10


def record(slot: int) -> Record:
    key = bytes([slot]) * 32
    return Record(slot, b"", key, bytes(8 * T), 0, key, b"a" * 32, "exact", 256 * T)


class Slow:
    """A tier of plain memory whose gets and puts wait to be let through, a layer at a time."""

    name = "slow"
    capacity = 1 << 30
    size = 0

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.held: dict[bytes, np.ndarray] = {}
        self.layers = threading.Semaphore(0)
        self.puts = threading.Event()
        self.puts.set()
        self.batches: list[int] = []

    def contains(self, records: Sequence[Record]) -> list[bool]:
        return [r.id in self.held for r in records]

    def put(self, items: Sequence[tuple[Record, Sequence[Rows]]]) -> list[bool]:
        self.puts.wait()
        self.batches.append(len(items))
        for r, parts in items:
            self.held[r.id] = np.concatenate(parts, axis=2)
        return [True] * len(items)

    def get(
        self,
        record: Record,
        into: Sequence[Rows] | None = None,
        deadline: float | None = None,
        arrived: Callable[[int], None] = lambda layers: None,
    ) -> Sequence[Rows] | None:
        assert into is not None
        for layer in range(LAYOUT.L):
            self.layers.acquire()
            if record.id not in self.held:
                return None
            here = slice(layer, layer + 1)
            copy_rows([self.held[record.id][here]], [part[here] for part in into])
            arrived(layer + 1)
        return into

    def evict(self, records: Sequence[Record]) -> None:
        for r in records:
            self.held.pop(r.id, None)

    def close(self) -> None:
        self.layers.release(1000)


def filled(chunks: Chunks, r: Record, value: float) -> None:
    parts = chunks.reserve(r.slot, T)
    assert parts is not None
    for part in parts:
        part.fill_(value)
    chunks.publish(r)


def behind(tier: Slow, r: Record, value: float) -> None:
    rows = torch.full(LAYOUT.shape(T), value).flatten(3).view(torch.uint8).numpy()
    tier.held[r.id] = rows.copy()


def test_first_layers_can_be_used_while_the_last_ones_come() -> None:
    tier, told = Slow(), []
    chunks = Chunks(LAYOUT, 1 << 16, [Attached(tier, "through")], fetched=lambda *x: told.append(x))
    behind(tier, record(3), 2.0)
    chunks.expect(record(3))
    chunks.fetch(3)
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
    chunks.fetch(1)
    assert arrival is not None and not arrival.wait(None, time.monotonic() + 10)
    assert told == [(1, False)] and chunks.memory.size == 0
    chunks.close()


def test_a_slot_let_go_while_its_bytes_come_is_not_used_for_others() -> None:
    """Its memory is written until the fetch ends; only then is it free."""
    tier = Slow()
    chunks = Chunks(LAYOUT, 256 * T, [Attached(tier, "through")])
    behind(tier, record(1), 1.0)
    chunks.expect(record(1))
    chunks.fetch(1)
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
    writer = Writer(tier, LAYOUT, 2 * 256 * T, counts)  # two chunks wait, no more
    rows = [np.zeros((4, 2, T, 32), np.uint8)]
    taken = [writer.offer(record(i), rows) for i in range(5)]
    assert taken == [True, True, False, False, False]
    assert counts["writes_dropped:slow"] == 3
    tier.puts.set()
    assert writer.drain(10)
    assert tier.contains([record(i) for i in range(5)]) == taken
    assert writer.offer(record(4), rows)
    writer.close(10)
    assert len(tier.held) == 3
    assert not writer.offer(record(3), rows)


def test_a_writer_that_is_closed_on_a_dead_disk_gives_up() -> None:
    tier = Slow()
    tier.puts.clear()
    counts: Counter[str] = Counter()
    writer = Writer(tier, LAYOUT, 1 << 16, counts)
    rows = [np.zeros((4, 2, T, 32), np.uint8)]
    assert writer.offer(record(0), rows)
    while writer._queue:  # until the thread has taken it
        time.sleep(0.001)
    assert writer.offer(record(1), rows)
    writer.close(0.1)
    assert counts["writes_dropped:slow"] == 1
    tier.puts.set()


def test_a_tier_that_raises_costs_its_batch_and_no_more() -> None:
    class Broken(Slow):
        def put(self, items: Any) -> list[bool]:
            if not self.batches:
                self.batches.append(0)
                raise RuntimeError("a defect")
            return super().put(items)

    tier, counts = Broken(), Counter[str]()
    writer = Writer(tier, LAYOUT, 1 << 16, counts)
    rows = [np.zeros((4, 2, T, 32), np.uint8)]
    assert writer.offer(record(0), rows) and writer.drain(10)
    assert writer.offer(record(1), rows) and writer.drain(10)
    assert counts["writes_failed:slow"] == 1
    assert tier.contains([record(0), record(1)]) == [False, True]
    writer.close(10)
