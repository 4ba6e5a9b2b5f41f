"""One rank's chunks: host memory in front, other tiers behind it, and the threads between."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from lmc.model.layout import KVLayout
from lmc.store.fetcher import Arrival, Fetcher
from lmc.store.memory import HostMemory, rows_of
from lmc.store.record import Record
from lmc.store.tier import Rows, Tier
from lmc.store.writer import Writer

logger = logging.getLogger(__name__)

Write = Literal["through", "back"]


@dataclass(frozen=True)
class Attached:
    """A tier behind host memory.

    write: `through` when a chunk is stored, `back` when host memory lets it go.
    """

    tier: Tier
    write: Write


class Chunks:
    """The bytes of chunks by slot, wherever they are. Which are held is the Index's decision.

    A tier is called on threads of its own alone, which nobody waits for without a limit: one that
    hangs, or raises whatever it likes, is in the way of no caller and of no other tier.

    Args:
        layout: of one rank.
        memory_bytes: host memory, reserved at once.
        tiers: behind it, in the order in which they are asked; those that hang come last.
        queue_bytes: of each tier, chunks that wait to be written; more are dropped.
        patience_s: after so long a fetch is given up.
        fetched: told, on any thread, of each fetch that ended: slot, and whether its bytes are
            there.
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
        self._held: dict[int, set[int]] = {}  # by slot: tiers that are known to have it too
        self._arrivals: dict[int, Arrival] = {}
        self._lock = threading.Lock()
        self._writers: list[Writer] = []
        self._fetchers: list[Fetcher] = []
        for i, behind in enumerate(self.tiers):
            held = partial(self._known, i)
            self._writers.append(Writer(behind.tier, layout, queue_bytes, self.counts, held))
            get, name = partial(self._get, i), behind.tier.name
            self._fetchers.append(Fetcher(name, get, self._end))

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
            through = [i for i, behind in enumerate(self.tiers) if behind.write == "through"]
            self._offer(record, through)

    def evict(self, slot: int) -> None:
        """Let go of a slot in host memory; tiers not known to have the chunk are offered it."""
        with self._lock:
            record = self._records.pop(slot, None)
            held = self._held.pop(slot, set())
            arrival = self._arrivals.get(slot)
            if arrival is not None:
                arrival.abandoned = True  # its thread writes there still, and frees it when done
                return
        try:
            if record is not None:
                self._offer(record, [i for i in range(len(self.tiers)) if i not in held])
        finally:
            self.memory.release(slot)

    def forget(self, slot: int) -> None:
        """Let go of what was reserved, and is not to be kept."""
        with self._lock:
            self._records.pop(slot, None)
            self._held.pop(slot, None)
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
        with self._lock:
            arrival = self._arrivals[slot]
        arrival.deadline = time.monotonic() + self.patience_s
        # Where one hangs the others are asked first: what they have comes in time.
        tiers = range(len(self.tiers))
        arrival.left = sorted(tiers, key=lambda i: self._fetchers[i].overdue > 0)
        self._ask_next(arrival)

    def arrival(self, slot: int) -> Arrival | None:
        """The chunk under `slot` while it is on its way."""
        with self._lock:
            return self._arrivals.get(slot)

    # -- the end -----------------------------------------------------------------------------

    def drain(self, timeout_s: float = 60.0) -> bool:
        """Wait until all that was offered to the tiers behind is put; False if that is longer."""
        until = time.monotonic() + timeout_s
        return all(w.drain(max(0.0, until - time.monotonic())) for w in self._writers)

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what tiers behind lack, as far as time goes, and let go of everything.

        A tier that hangs is left as it is, with the threads that it has.
        """
        with self._lock:
            for arrival in self._arrivals.values():
                arrival.abandoned = True
        until = time.monotonic() + timeout_s
        written = until - timeout_s / 10  # the rest is for the closing itself
        closing = [
            threading.Thread(target=self._close_tier, args=(i, written), daemon=True)
            for i in range(len(self.tiers))
        ]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(max(0.0, until - time.monotonic()))
        self.memory.close()

    # -- tiers -------------------------------------------------------------------------------

    def _close_tier(self, i: int, until: float) -> None:
        """On a thread of its own."""
        tier, writer = self.tiers[i].tier, self._writers[i]
        with self._lock:
            records = list(self._records.values())
            held = [i in self._held.get(record.slot, ()) for record in records]
        try:
            # Of what it is known to have had it may have let go since.
            held = tier.contains(records)
        except BaseException:
            logger.exception("lmc could not ask tier %s for what it has", tier.name)
        for record, here in zip(records, held, strict=False):
            while not here and not self._offer(record, [i]) and time.monotonic() < until:
                writer.drain(0.1)
        written = writer.close(until - time.monotonic())
        if not self._fetchers[i].close(until) or not written:
            logger.warning("lmc leaves tier %s open: it does not answer", tier.name)
            return
        try:
            tier.close()
        except BaseException:
            logger.exception("lmc could not close tier %s", tier.name)

    def _offer(
        self, record: Record, tiers: Iterable[int], rows: Sequence[Rows] | None = None
    ) -> bool:
        """Whether all of the tiers will get the record, out of `rows` or host memory; no error."""
        taken = True
        for i in tiers:  # each, not until one
            try:
                parts = self.memory.get(record) if rows is None else rows
                taken &= parts is not None and self._writers[i].offer(record, parts)
            except BaseException:
                taken = False
                logger.exception("lmc could not write to tier %s", self.tiers[i].tier.name)
                self.counts[f"writes_failed:{self.tiers[i].tier.name}"] += 1
        return taken

    def _known(self, i: int, slot: int) -> None:
        """Tier `i` has the chunk of a slot that may be gone meanwhile."""
        with self._lock:
            if slot in self._records:
                self._held.setdefault(slot, set()).add(i)

    def _ask_next(self, arrival: Arrival) -> None:
        """Ask the next tier; where none is left, or no time, the chunk will not come."""
        try:
            while arrival.left and not arrival.abandoned and not arrival.late:
                if self._fetchers[arrival.left.pop(0)].submit(arrival):
                    return
        except BaseException:  # there may be no thread to be had
            logger.exception("lmc could not fetch a chunk")
        self._end(arrival)

    def _get(self, i: int, arrival: Arrival) -> None:
        """On a thread of tier `i`."""
        record, tier, whole = arrival.record, self.tiers[i].tier, False
        try:
            if not arrival.abandoned and not arrival.late:
                if arrival.parts is None:
                    arrival.parts = self.memory.reserve(record.slot, record.T)
                if arrival.parts is None:
                    arrival.left.clear()
                else:
                    rows = [rows_of(part) for part in arrival.parts]
                    got = tier.get(record, rows, arrival.deadline, arrival.advance)
                    whole = got is not None
        except BaseException:  # a tier may be anybody's
            logger.exception("lmc could not fetch a chunk from tier %s", tier.name)
        if not whole:
            arrival.missed.append(i)
            self._ask_next(arrival)
            return
        self.counts[f"bytes_fetched:{tier.name}"] += record.nbytes
        # Now, while its memory cannot become another's.
        self._offer(record, arrival.missed, rows)
        self._end(arrival, i)

    def _end(self, arrival: Arrival, source: int | None = None) -> None:
        """The chunk is there, out of tier `source`, or will not come: once for each arrival."""
        slot, whole = arrival.record.slot, False
        try:
            with self._lock:
                del self._arrivals[slot]
                if source is not None and not arrival.abandoned:
                    whole = True
                    self.memory.publish(slot)
                    self._records[slot] = arrival.record
                    self._held[slot] = {source}
                else:
                    self.memory.release(slot)
            self._fetched(slot, whole)
        except BaseException:
            logger.exception("lmc could not end a fetch")
            whole = False
        self.counts["fetched" if whole else "fetches_failed"] += 1
        arrival.end(whole)
