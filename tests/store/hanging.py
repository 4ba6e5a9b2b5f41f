"""A tier whose calls do not return before they are let go; and a process that ends while one hangs.

`python -m tests.store.hanging CALL FOLDER` leaves `CALL` of one tier hanging, beside a disk tier.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lmc.model.layout import KVLayout
from lmc.store import Record
from lmc.store.chunks import Chunks
from lmc.store.disk.tier import Disk
from lmc.store.memory import rows_of
from lmc.store.reads import Reads
from lmc.store.rows import copy_rows
from lmc.store.sections import Rows, Section, full_attention
from lmc.store.tier import Attached, Behind, Durability, Handle, Outcome, Wanted

LAYOUT = KVLayout(L=4, G=1, D=8, dtype="float32")  # 256 bytes a token
T = 10
NBYTES = 256 * T
CALLS = ("get", "put", "contains")
FORM = full_attention(LAYOUT, T)


def record(i: int) -> Record:
    key = i.to_bytes(32, "big")
    return Record(i, b"", key, bytes(8 * T), 0, key, b"a" * 32, "exact", NBYTES)


def rows(value: float) -> Rows:
    return rows_of(torch.full(LAYOUT.shape(T), value))


def item(r: Record, value: float) -> tuple[Record, list[Section]]:
    return r, [Section(FORM, [rows(value)])]


class Plain:
    """Plain memory as a tier, whose calls may be made to do something first.

    Attributes:
        batches: how many chunks each put had.
    """

    name = "plain"
    capacity = 1 << 30
    durability: Durability = "evictable"
    size = 0
    epoch: int | None = None

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.held: dict[bytes, Rows] = {}
        self.told: dict[bytes, Record] = {}
        self.registered: list[tuple[int, int]] = []
        self.batches: list[int] = []
        self.closed = False
        self._reads = Reads(self.name, self._get)

    def before(self, call: str) -> None:
        """Called first by each call: get, put, contains, lookup, layer."""

    def register(self, address: int, nbytes: int) -> None:
        self.registered.append((address, nbytes))

    def lookup_many(
        self, namespace: bytes, keys: Sequence[bytes], behind: Sequence[Behind], deadline: float
    ) -> tuple[list[list[Record]], list[list[Record]]]:
        self.before("lookup")
        return [[self.told[k]] if k in self.told else [] for k in keys], [[] for _ in behind]

    def contains(self, records: Sequence[Record]) -> list[bool]:
        self.before("contains")
        return [r.id in self.held for r in records]

    def put(self, items: Sequence[tuple[Record, Sequence[Section]]]) -> list[Outcome]:
        self.before("put")
        self.batches.append(len(items))
        done: list[Outcome] = ["known" if r.id in self.held else "stored" for r, _ in items]
        self.held |= {r.id: np.concatenate(s[0].parts, axis=2) for r, s in items}
        self.told |= {r.key: replace(r, slot=-1) for r, _ in items}
        return done

    def get_many(self, wanted: Sequence[Wanted]) -> list[Handle]:
        return self._reads.start(wanted)

    def _get(self, wanted: Wanted, arrived: Callable[[int], None]) -> bool:
        self.before("get")
        (section,) = wanted.into
        for layer in range(LAYOUT.L):
            self.before("layer")
            if wanted.record.id not in self.held:
                return False
            here = slice(layer, layer + 1)
            source = self.held[wanted.record.id][here]
            copy_rows([source], [part[here] for part in section.parts])
            arrived(layer + 1)
        return True

    def evict(self, records: Sequence[Record]) -> None:
        for r in records:
            self.held.pop(r.id, None)

    def close(self) -> None:
        self.closed = True


class Hanging(Plain):
    """`hang` makes a call wait until `let_go`.

    Attributes:
        entered: released by each call that begins to hang.
    """

    name = "hanging"

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self._open = {call: threading.Event() for call in CALLS}
        self.let_go()

    def hang(self, call: str) -> None:
        self._open[call].clear()

    def let_go(self) -> None:
        for event in self._open.values():
            event.set()

    def before(self, call: str) -> None:
        if call in self._open and not self._open[call].is_set():
            self.entered.release()
            self._open[call].wait()


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
    chunks.fetch([r.slot])
    return arrival.wait(None, time.monotonic() + 60)


def given(chunks: Chunks, slot: int) -> float:
    """The one value of a chunk."""
    parts = chunks.parts(slot)
    assert parts is not None
    (value,) = {float(x) for part in parts for x in part.unique()}
    return value


def fetched_in_time(chunks: Chunks, r: Record) -> bool:
    """As a claim does, which waits no longer than the patience."""
    chunks.expect(r)
    arrival = chunks.arrival(r.slot)
    assert arrival is not None
    chunks.fetch([r.slot])
    return arrival.wait(None, time.monotonic() + 2 * chunks.patience_s)


def end_while(call: str, folder: Path) -> None:
    """Leave `call` hanging in a process that then closes its chunks and ends."""
    tier = Hanging()
    tier.held[record(1).id] = rows(1.0)
    tiers = [Attached(tier, "through"), Attached(disk(folder), "through")]
    # On a busy machine what is wanted is not given up before the tier is asked for it.
    chunks = Chunks(LAYOUT, 1 << 16, tiers, patience_s=60.0)
    tier.hang(call)
    filled(chunks, record(2), 2.0)
    if call == "get":
        chunks.expect(record(1))
        chunks.fetch([1])
    if call != "contains":  # that comes at the end
        tier.entered.acquire()
    chunks.close(1.0)


if __name__ == "__main__":
    end_while(sys.argv[1], Path(sys.argv[2]))
