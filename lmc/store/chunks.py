"""One rank's chunks: host memory in front, other tiers behind it, and the threads between."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from lmc.model.layout import KVLayout
from lmc.store.memory import HostMemory, rows_of
from lmc.store.record import Record
from lmc.store.tier import Rows, Tier
from lmc.store.writer import Writer

logger = logging.getLogger(__name__)

Write = Literal["through", "back"]
FETCHERS = 16  # threads: chunks of one request come side by side, their first layers first


@dataclass(frozen=True)
class Attached:
    """A tier behind host memory.

    write: `through` when a chunk is stored, `back` when host memory lets it go.
    """

    tier: Tier
    write: Write


class Arrival:
    """A chunk on its way into host memory: how many of its layers are there and verified.

    parts: where it goes, `[L, 2, t, G, D]` along T, once there is room. Of their layers those
        that have arrived are right.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.parts: list[torch.Tensor] | None = None
        self.abandoned = False
        self._layers = 0
        self._over: bool | None = None
        self._changed = threading.Condition()

    @property
    def layers(self) -> int:
        """How many of its first layers are there."""
        return self._layers

    def advance(self, layers: int) -> None:
        """The first `layers` are there."""
        with self._changed:
            self._layers = max(self._layers, layers)
            self._changed.notify_all()

    def end(self, whole: bool) -> None:
        """It is all there, or will never be."""
        with self._changed:
            self._over = whole
            self._changed.notify_all()

    def wait(self, layers: int | None, deadline: float) -> bool:
        """Whether the first `layers`, or all, are there by `deadline` of `time.monotonic()`."""

        def decided() -> bool:
            return self._over is not None or (layers is not None and self._layers >= layers)

        with self._changed:
            self._changed.wait_for(decided, max(0.0, deadline - time.monotonic()))
            if layers is not None and self._layers >= layers:
                return True
            return bool(self._over)


class Chunks:
    """The bytes of chunks by slot, wherever they are. Which are held is the Index's decision.

    Args:
        layout: of one rank.
        memory_bytes: host memory, reserved at once.
        tiers: behind it, in the order in which they are asked.
        queue_bytes: chunks that wait to be written; more are dropped.
        patience_s: after so long a fetch is given up.
        fetched: told, on a thread of ours, of each fetch that ended: slot, and whether its bytes
            are there.
        populate: whether host memory is taken from the machine now, not when it is first used:
            a fetch into memory never touched takes about twice as long.
    """

    def __init__(
        self,
        layout: KVLayout,
        memory_bytes: int,
        tiers: Sequence[Attached] = (),
        queue_bytes: int = 256 << 20,
        patience_s: float = 5.0,
        fetched: Callable[[int, bool], None] = lambda slot, whole: None,
        populate: bool = False,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.memory = HostMemory(layout, memory_bytes, populate)
        self.tiers = list(tiers)
        self.patience_s = patience_s
        self._layout = layout
        self._fetched = fetched
        self._records: dict[int, Record] = {}
        self._arrivals: dict[int, Arrival] = {}
        self._lock = threading.Lock()
        self._writer: Writer | None = None
        self._fetchers: ThreadPoolExecutor | None = None
        if self.tiers:
            self._writer = Writer(layout, queue_bytes, self.counts)
            self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="lmc-fetch")

    # -- storing -----------------------------------------------------------------------------

    def reserve(self, slot: int, T: int) -> list[torch.Tensor] | None:
        """Room for a chunk of T tokens: parts `[L, 2, t, G, D]` along T; None if it has none."""
        return self.memory.reserve(slot, T)

    def publish(self, record: Record) -> None:
        """What was reserved under the record's slot holds its bytes now."""
        self.memory.publish(record.slot)
        if self.tiers:
            with self._lock:
                self._records[record.slot] = record
            self._offer(record, [b.tier for b in self.tiers if b.write == "through"])

    def evict(self, slot: int) -> None:
        """Let go of a slot in host memory; a tier behind that lacks the chunk is offered it."""
        with self._lock:
            record = self._records.pop(slot, None)
            arrival = self._arrivals.get(slot)
            if arrival is not None:
                arrival.abandoned = True  # its thread writes there still, and frees it when done
                return
        if record is not None:
            lacking = [b.tier for b in self.tiers if not b.tier.contains([record])[0]]
            self._offer(record, lacking)
        self.memory.release(slot)

    def forget(self, slot: int) -> None:
        """Let go of what was reserved and never published."""
        self.memory.release(slot)

    # -- using -------------------------------------------------------------------------------

    def parts(self, slot: int) -> list[torch.Tensor] | None:
        """The chunk's parts `[L, 2, t, G, D]` in host memory, or None."""
        return self.memory.parts(slot)

    def expect(self, record: Record) -> None:
        """A fetch of this record into its slot is about to be asked for."""
        with self._lock:
            self._arrivals[record.slot] = Arrival(record)

    def fetch(self, slot: int) -> None:
        """Bring what is expected under `slot` out of the tiers behind, in the background."""
        assert self._fetchers is not None
        with self._lock:
            arrival = self._arrivals[slot]
        self._fetchers.submit(self._fetch, arrival, time.monotonic() + self.patience_s)

    def arrival(self, slot: int) -> Arrival | None:
        """The chunk under `slot` while it is on its way."""
        with self._lock:
            return self._arrivals.get(slot)

    # -- the end -----------------------------------------------------------------------------

    def drain(self, timeout_s: float = 60.0) -> bool:
        """Wait until all that was offered to the tiers behind is put; False if that is longer."""
        return self._writer is None or self._writer.drain(timeout_s)

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what tiers behind lack, as far as time goes, and let go of everything."""
        if self._writer is not None and self._fetchers is not None:
            self._fetchers.shutdown(wait=True, cancel_futures=True)
            until = time.monotonic() + timeout_s
            for record in list(self._records.values()):
                lacking = [b.tier for b in self.tiers if not b.tier.contains([record])[0]]
                while lacking and not self._offer(record, lacking) and time.monotonic() < until:
                    self._writer.drain(min(0.1, timeout_s))
            self._writer.close(max(0.1, until - time.monotonic()))
            for behind in self.tiers:
                behind.tier.close()
        self.memory.close()

    # -- parts -------------------------------------------------------------------------------

    def _offer(self, record: Record, tiers: Sequence[Tier]) -> bool:
        """Whether all of the tiers will get the record."""
        rows = self.memory.get(record) if tiers else None
        if rows is None or self._writer is None:
            return not tiers
        taken = [self._writer.offer(record, rows, tier) for tier in tiers]  # each, not until one
        return all(taken)

    def _fetch(self, arrival: Arrival, deadline: float) -> None:
        """On a fetching thread."""
        record, source = arrival.record, len(self.tiers)
        try:
            # Behind others that hung it may be too late to begin with.
            if not arrival.abandoned and time.monotonic() < deadline:
                arrival.parts = self.memory.reserve(record.slot, record.T)
            if arrival.parts is not None:
                rows = [rows_of(part) for part in arrival.parts]
                got = (self._got(b.tier, record, rows, deadline, arrival) for b in self.tiers)
                source = next((i for i, whole in enumerate(got) if whole), source)
        except Exception:
            logger.exception("lmc could not fetch a chunk")
        with self._lock:
            whole = source < len(self.tiers) and not arrival.abandoned
            if whole:
                self.memory.publish(record.slot)
                self._records[record.slot] = record
            else:
                self.memory.release(record.slot)
            del self._arrivals[record.slot]
        arrival.end(whole)
        if whole:
            self._offer(record, [b.tier for b in self.tiers[:source]])
        self.counts["fetched" if whole else "fetches_failed"] += 1
        self._fetched(record.slot, whole)

    def _got(
        self, tier: Tier, record: Record, rows: Sequence[Rows], deadline: float, arrival: Arrival
    ) -> bool:
        if tier.get(record, rows, deadline, arrival.advance) is None:
            return False
        self.counts[f"bytes_fetched:{tier.name}"] += record.nbytes
        return True
