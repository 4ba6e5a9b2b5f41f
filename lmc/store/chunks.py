"""One rank's chunks: host memory in front, other tiers behind it, and the threads between."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from lmc.model.layout import KVLayout
from lmc.store.breaker import Breaker
from lmc.store.fetcher import Arrival, Fetcher
from lmc.store.memory import HostMemory, rows_of
from lmc.store.record import Record
from lmc.store.sections import Heads, Section, full_attention
from lmc.store.tier import LOST, Attached, Drained, Outcome, taken
from lmc.store.writer import TOGETHER, Writer

logger = logging.getLogger(__name__)


class Chunks:
    """The bytes of chunks by slot, wherever they are. Which are held is the Index's decision.

    A tier is called on threads of its own alone, which nobody waits for without a limit: one that
    hangs, or raises whatever it likes, is in the way of no caller and of no other tier.

    Args:
        layout: of one rank.
        memory_bytes: host memory, reserved at once.
        tiers: behind it, in the order in which they are asked; those that are late come last.
        queue_bytes: of each tier, chunks that wait to be written; more are dropped.
        patience_s: after so long a fetch is given up.
        fetched: told, on any thread, of each fetch that ended: slot, and whether its bytes are
            there.
        populate: whether host memory is taken from the machine now, not when it is first used:
            a fetch into memory never touched takes about twice as long.
        heads: which of the model's heads the rank has; by default all of them.

    Attributes:
        kept: told, on any thread, of each chunk that a tier has taken or brought: its name, and
            the record. Set before anything is stored, if at all.
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
        heads: Heads | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.memory = HostMemory(layout, memory_bytes, populate)
        self.tiers = list(tiers)
        self.patience_s = patience_s
        self._layout, self._heads = layout, heads
        self._fetched = fetched
        self.kept: Callable[[str, Record], None] = lambda tier, record: None
        self._records: dict[int, Record] = {}
        self._held: dict[int, set[int]] = {}  # by slot: tiers that are known to have it too
        self._arrivals: dict[int, Arrival] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._lost: set[tuple[int, int]] = set()  # slots that are gone, and tiers without them
        self._writers: list[Writer] = []
        self._fetchers: list[Fetcher] = []
        self._breakers: list[Breaker] = []
        for i, behind in enumerate(self.tiers):
            breaker = Breaker()
            became = partial(self._became, i)
            self._breakers.append(breaker)
            # What one that hangs may hold of host memory for as long as it does.
            most, brought = memory_bytes // 4, partial(self._brought, i)
            self._fetchers.append(
                Fetcher(behind.tier, breaker, most, self.counts, self._place, brought)
            )
            self._writers.append(Writer(behind.tier, layout, queue_bytes, self.counts, became))
            behind.tier.register(*self.memory.span())
            behind.tier.register(*self._writers[i].span())

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
            self._offer(record, self._through())

    def evict(self, slot: int) -> None:
        """Let go of a slot in host memory; tiers not known to have the chunk are offered it."""
        with self._lock:
            record = self._records.pop(slot, None)
            held = self._held.pop(slot, set())
            arrival = self._arrivals.get(slot)
            if arrival is not None:
                arrival.abandoned = True  # a tier writes there still: it is freed when that ends
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

    def fetch(self, slots: Iterable[int]) -> None:
        """Bring what is expected under these slots out of the tiers behind, in the background."""
        with self._lock:
            expected = [self._arrivals.get(slot) for slot in slots]
        arrivals = [arrival for arrival in expected if arrival is not None]
        self.counts["fetches_failed"] += len(expected) - len(arrivals)
        # What a tier that was late has is asked for behind all others, if at all.
        order = sorted(range(len(self.tiers)), key=lambda i: not self._breakers[i].closed)
        deadline = time.monotonic() + self.patience_s
        for arrival in arrivals:
            arrival.deadline, arrival.left = deadline, list(order)
        self._ask_next(arrivals)

    def arrival(self, slot: int) -> Arrival | None:
        """The chunk under `slot` while it is on its way."""
        with self._lock:
            return self._arrivals.get(slot)

    def take_counts(self) -> Counter[str]:
        """What happened since the last call; what a place itself counted has its name before it."""
        counts = Counter(taken(self.counts))
        places = [("host", self.memory.counts), *((b.tier.name, b.tier.counts) for b in self.tiers)]
        for name, counted in places:
            counts.update({f"{name}:{kind}": n for kind, n in taken(counted).items()})
        return counts

    def waiting(self) -> dict[str, int]:
        """How much is on its way: chunks out of tiers, and bytes to each of them."""
        pairs = zip(self.tiers, self._writers, strict=True)
        queues = {f"write_queue_bytes:{b.tier.name}": w.waiting_bytes for b, w in pairs}
        return {"pending_fetches": len(self._arrivals), **queues}

    def take_removed(self) -> list[tuple[str, bytes]]:
        """Tiers' names, and ids of records that these let go of since the last call."""
        logs = [(b.tier.name, getattr(b.tier, "removed", None)) for b in self.tiers]
        return [(name, log.popleft()) for name, log in logs if log for _ in range(len(log))]

    # -- the end -----------------------------------------------------------------------------

    def drain(self, timeout_s: float = 60.0) -> bool:
        """Wait until all that was offered to the tiers behind was put; False if that is longer."""
        until = time.monotonic() + timeout_s
        return all(w.drain(max(0.0, until - time.monotonic())) for w in self._writers)

    def complete(self, timeout_s: float) -> Drained:
        """Have tiers that are written through put all that is in host memory, and wait for it.

        Returns:
            What they lack then.
        """
        until = time.monotonic() + timeout_s
        left: dict[int, list[Record] | None] = dict.fromkeys(self._through())
        while left and time.monotonic() < until:
            for i, lacking in list(left.items()):  # in turns: one that hangs takes nobody's time
                if not self._writers[i].drain(0.01):
                    continue
                lacking = self._lacking(i) if lacking is None else lacking
                given = 0
                while lacking:
                    if self._refused(lacking[-1], [i]):
                        if given:
                            break  # the queue is full
                        self._became(i, lacking[-1], "dropped")  # even where it is empty
                    lacking.pop()
                    given += 1
                left[i] = lacking
                if not given:
                    del left[i]
        with self._lock:
            lost, self._lost = len(self._lost), set()
        through = {self.tiers[i].tier.name: len(self._lacking(i)) for i in self._through()}
        return Drained(through, lost)

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what tiers behind lack, as far as time goes, and let go of everything.

        A second time it returns at once. A tier that hangs is left as it is, with the threads that
        it has.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for arrival in self._arrivals.values():
                arrival.abandoned = True
        until = time.monotonic() + timeout_s
        written = until - timeout_s / 10  # the rest is for the closing itself
        for i, writer in enumerate(self._writers):
            writer.close(written, partial(self._close_tier, i, written))
        for i, writer in enumerate(self._writers):
            if not writer.join(until - time.monotonic()):
                name = self.tiers[i].tier.name
                logger.warning("lmc leaves tier %s open: it does not answer", name)
        self.memory.close()

    # -- tiers -------------------------------------------------------------------------------

    def _sections(self, record: Record, parts: Sequence[torch.Tensor]) -> list[Section]:
        form = full_attention(self._layout, record.T, self._heads)
        return [Section(form, [rows_of(part) for part in parts])]

    def _lacking(self, i: int) -> list[Record]:
        """What is in host memory and, as far as is known, not in tier `i`."""
        with self._lock:
            return [r for r in self._records.values() if i not in self._held.get(r.slot, ())]

    def _through(self) -> list[int]:
        return [i for i, behind in enumerate(self.tiers) if behind.write == "through"]

    def _close_tier(self, i: int, until: float) -> None:
        """On the thread that writes to it, behind all that was in its queue."""
        tier = self.tiers[i].tier
        with self._lock:
            records = list(self._records.values())
        lacking = records
        try:
            # Of what it is known to have had it may have let go since.
            held = tier.contains(records)
            lacking = [r for r, here in zip(records, held, strict=True) if not here]
        except BaseException:  # then what it has is put in vain
            logger.exception("lmc could not ask tier %s for what it has", tier.name)
        for start in range(0, len(lacking), TOGETHER):
            if time.monotonic() > until:
                self.counts[f"writes_dropped:{tier.name}"] += len(lacking) - start
                break
            items = [
                (record, self._sections(record, parts))
                for record in lacking[start : start + TOGETHER]
                if (parts := self.memory.parts(record.slot)) is not None
            ]
            outcomes: list[Outcome] = ["failed"] * len(items)
            try:
                told = tier.put(items)
                outcomes = told if len(told) == len(items) else outcomes
            except BaseException:
                logger.exception("lmc could not write to tier %s", tier.name)
            for (record, _), outcome in zip(items, outcomes, strict=True):
                self._became(i, record, outcome)
        if not self._fetchers[i].close(until):
            logger.warning("lmc leaves tier %s open: it does not answer", tier.name)
            return
        tier.close()

    def _offer(self, record: Record, tiers: Iterable[int]) -> None:
        """Have the tiers put a chunk out of host memory; what is refused is counted as dropped."""
        for i in self._refused(record, tiers):
            self._became(i, record, "dropped")

    def _refused(self, record: Record, tiers: Iterable[int]) -> list[int]:
        """Have the tiers put a chunk; those whose queues do not take it. No error."""
        tiers = list(tiers)
        with self.memory.reading(record.slot) as parts:
            return [] if parts is None else self._given(record, parts, tiers)

    def _given(
        self, record: Record, parts: Sequence[torch.Tensor], tiers: Iterable[int]
    ) -> list[int]:
        """As `_refused`, out of parts that nobody changes meanwhile."""
        refused = []
        for i in tiers:  # each, not until one
            try:
                if not self._writers[i].offer(record, self._sections(record, parts)):
                    refused.append(i)
            except BaseException:
                logger.exception("lmc could not write to tier %s", self.tiers[i].tier.name)
                refused.append(i)
        return refused

    def _became(self, i: int, record: Record, outcome: Outcome) -> None:
        """What became of a chunk that tier `i` was given; its slot may be gone meanwhile."""
        name, kept = self.tiers[i].tier.name, outcome in ("stored", "known")
        with self._lock:
            here = record.slot in self._records
            if here and kept:
                self._held.setdefault(record.slot, set()).add(i)
            if kept:
                self._lost.discard((record.slot, i))
            elif not here and len(self._lost) < LOST:
                self._lost.add((record.slot, i))
        if outcome == "stored":
            self.kept(name, record)
            self.counts[f"bytes_stored:{name}"] += record.nbytes
        if not kept:
            self.counts[f"writes_{outcome}:{name}"] += 1

    def _place(self, arrival: Arrival) -> bool:
        """Room for a chunk that is about to come; without it no tier need be asked."""
        record = arrival.record
        try:
            if arrival.parts is None:
                arrival.parts = self.memory.reserve(record.slot, record.T)
        except ValueError:
            logger.exception("lmc could not fetch a chunk")
        if arrival.parts is None:
            arrival.left.clear()
            return False
        arrival.into = self._sections(record, arrival.parts)
        return True

    def _ask_next(self, arrivals: Sequence[Arrival]) -> None:
        """Ask the next tier of each; where none is left, or no time, the chunk will not come."""
        asked: dict[int, list[Arrival]] = {}
        for arrival in arrivals:
            i = self._next(arrival)
            if i is None:
                self._end(arrival)
            else:
                asked.setdefault(i, []).append(arrival)
        for i, some in asked.items():
            try:
                taken = self._fetchers[i].submit(some)
            except BaseException:  # there may be no thread to be had
                logger.exception("lmc could not fetch from tier %s", self.tiers[i].tier.name)
                taken = False
            if not taken:
                self._ask_next(some)

    def _next(self, arrival: Arrival) -> int | None:
        """The tier to ask now, for its share of the time that is left."""
        now = time.monotonic()
        while arrival.left and not arrival.abandoned and now < arrival.deadline:
            i = arrival.left.pop(0)
            n = 1 + sum(self._breakers[other].closed for other in arrival.left)
            if self._breakers[i].allows():
                arrival.until = now + (arrival.deadline - now) / n
                return i
        return None

    def _brought(self, i: int, arrival: Arrival, here: bool) -> None:
        """Tier `i` has brought a chunk, or has not."""
        if here:
            name = self.tiers[i].tier.name
            self.counts[f"bytes_fetched:{name}"] += arrival.record.nbytes
            self.kept(name, arrival.record)
            if arrival.parts is not None and not arrival.abandoned:
                # Now, as long as it is an arrival's: then its memory cannot become another's.
                for missed in self._given(arrival.record, arrival.parts, arrival.missed):
                    self._became(missed, arrival.record, "dropped")
            self._end(arrival, i)
        else:
            arrival.missed.append(i)
            self._ask_next([arrival])

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
