"""A tier whose calls do not return before they are let go; and a process that ends while one hangs.

`python -m tests.store.hanging CALL FOLDER` leaves `CALL` of one tier hanging, beside a disk tier.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from lmc.model.layout import KVLayout
from lmc.store import Record
from lmc.store.chunks import Attached, Chunks
from lmc.store.disk.tier import Disk
from lmc.store.memory import rows_of
from lmc.store.rows import copy_rows
from lmc.store.tier import Rows

LAYOUT = KVLayout(L=4, G=1, D=8, dtype="float32")  # 256 bytes a token
T = 10
NBYTES = 256 * T
CALLS = ("get", "put", "contains")


def record(i: int) -> Record:
    key = i.to_bytes(32, "big")
    return Record(i, b"", key, bytes(8 * T), 0, key, b"a" * 32, "exact", NBYTES)


def rows(value: float) -> Rows:
    return rows_of(torch.full(LAYOUT.shape(T), value))


class Hanging:
    """Plain memory as a tier. `hang` makes a call wait until `let_go`.

    Attributes:
        entered: released by each call that begins to hang.
    """

    name = "hanging"
    capacity = 1 << 30
    size = 0

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.held: dict[bytes, Rows] = {}
        self.entered = threading.Semaphore(0)
        self.closed = False
        self._open = {call: threading.Event() for call in CALLS}
        self.let_go()

    def hang(self, call: str) -> None:
        self._open[call].clear()

    def let_go(self) -> None:
        for event in self._open.values():
            event.set()

    def _wait(self, call: str) -> None:
        if not self._open[call].is_set():
            self.entered.release()
            self._open[call].wait()

    def contains(self, records: Sequence[Record]) -> list[bool]:
        self._wait("contains")
        return [r.id in self.held for r in records]

    def put(self, items: Sequence[tuple[Record, Sequence[Rows]]]) -> list[bool]:
        self._wait("put")
        new = [r.id not in self.held for r, _ in items]
        self.held |= {r.id: np.concatenate(parts, axis=2) for r, parts in items}
        return new

    def get(
        self,
        record: Record,
        into: Sequence[Rows] | None = None,
        deadline: float | None = None,
        arrived: Callable[[int], None] = lambda layers: None,
    ) -> Sequence[Rows] | None:
        assert into is not None
        self._wait("get")
        if record.id not in self.held:
            return None
        copy_rows([self.held[record.id]], into)
        arrived(LAYOUT.L)
        return into

    def evict(self, records: Sequence[Record]) -> None:
        for r in records:
            self.held.pop(r.id, None)

    def close(self) -> None:
        self.closed = True


def disk(folder: Path) -> Disk:
    return Disk(folder, 16 << 20, layout=LAYOUT)


def filled(chunks: Chunks, r: Record, value: float) -> None:
    parts = chunks.reserve(r.slot, T)
    assert parts is not None
    for part in parts:
        part.fill_(value)
    chunks.publish(r)


def fetched(chunks: Chunks, r: Record) -> bool:
    """Whether a chunk comes out of the tiers behind."""
    chunks.expect(r)
    arrival = chunks.arrival(r.slot)
    assert arrival is not None
    chunks.fetch(r.slot)
    return arrival.wait(None, time.monotonic() + 60)


def end_while(call: str, folder: Path) -> None:
    """Leave `call` hanging in a process that then closes its chunks and ends."""
    tier = Hanging()
    tier.held[record(1).id] = rows(1.0)
    tiers = [Attached(tier, "through"), Attached(disk(folder), "through")]
    chunks = Chunks(LAYOUT, 1 << 16, tiers, patience_s=0.1)
    tier.hang(call)
    filled(chunks, record(2), 2.0)
    if call == "get":
        chunks.expect(record(1))
        chunks.fetch(1)
    if call != "contains":  # that comes at the end
        tier.entered.acquire()
    chunks.close(1.0)


if __name__ == "__main__":
    end_while(sys.argv[1], Path(sys.argv[2]))
