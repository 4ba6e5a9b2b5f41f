"""Puts that nobody waits for: a thread a tier, and a queue that drops what it has no room for."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from lmc.model.layout import KVLayout
from lmc.store.memory import HostMemory
from lmc.store.record import Record
from lmc.store.sections import Section
from lmc.store.tier import Outcome, Tier

logger = logging.getLogger(__name__)

# Chunks that are synced together: more, and one that is lost with the process is lost with others.
TOGETHER = 32


class Writer:
    """Puts chunks into one tier behind everybody's back.

    What is offered is copied at once, so that its memory may be used again. When the queue has no
    room for it, it is dropped and counted: the model never waits for a disk, and no tier for
    another one that hangs.

    Args:
        tier: where they go. It may raise anything, or hang.
        layout: of the chunks.
        queue_bytes: of the copies that wait; memory that is reserved at once.
        counts: where drops and failures are counted.
        became: told, on the writer's thread, of each chunk that was offered what became of it.
    """

    def __init__(
        self,
        tier: Tier,
        layout: KVLayout,
        queue_bytes: int,
        counts: Counter[str],
        became: Callable[[Record, Outcome], None] = lambda record, outcome: None,
    ) -> None:
        self._tier, self._name = tier, tier.name
        self._staging = HostMemory(layout, queue_bytes)
        self._counts = counts
        self._became = became
        # Each as it came, and as it is staged: a slot may be offered twice.
        self._queue: deque[tuple[Record, Record]] = deque()
        self._waiting = 0  # offers that are in the queue or being put
        self._next = 0
        self._changed = threading.Condition()
        self._closing, self._until = False, 0.0
        self._last: Callable[[], None] = lambda: None
        self._thread = threading.Thread(
            target=self._run, name=f"lmc-writer-{self._name}", daemon=True
        )
        self._thread.start()

    def span(self) -> tuple[int, int]:
        """Address and bytes of the memory out of which the tier is given chunks."""
        return self._staging.span()

    def offer(self, record: Record, sections: Sequence[Section]) -> bool:
        """Have a chunk put later; False when it is dropped."""
        with self._changed:
            staged = record.at(self._next)
            self._next += 1
        if self._staging.put([(staged, sections)])[0] != "stored":
            return False
        with self._changed:
            if not self._closing:
                self._queue.append((record, staged))
                self._waiting += 1
                self._changed.notify_all()
                return True
        self._staging.release(staged.slot)
        return False

    @property
    def waiting_bytes(self) -> int:
        """Of the copies that wait to be put."""
        return self._staging.size

    def drain(self, timeout_s: float) -> bool:
        """Wait until all that was offered is put; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, max(0.0, timeout_s))

    def close(self, until: float, last: Callable[[], None]) -> None:
        """Put what is waiting; what is left at `until` of `time.monotonic()` is dropped.

        Args:
            last: called behind all puts on the writer's thread, so that no other has to be had:
                while an interpreter ends there is none. It may hang.
        """
        with self._changed:
            if not self._closing:
                self._closing, self._until, self._last = True, until, last
                self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Whether all is done, within so long."""
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while batch := self._batch():
            try:
                self._put(batch)
            except BaseException:  # no tier raises for a fault; this one is not as it should be
                logger.exception("lmc could not write to tier %s", self._name)
                for record, _ in batch:
                    self._became(record, "failed")
            self._done(batch)
        try:
            self._last()
        except BaseException:
            logger.exception("lmc could not close tier %s", self._name)
        self._staging.close()

    def _batch(self) -> list[tuple[Record, Record]]:
        """What is put next; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            dropped = []
            if self._closing and time.monotonic() > self._until:
                dropped = list(self._queue)
                self._queue.clear()
            some = range(min(len(self._queue), TOGETHER))
            batch = [self._queue.popleft() for _ in some]
        for record, _ in dropped:
            self._became(record, "dropped")
        self._done(dropped)
        return batch

    def _done(self, batch: Sequence[tuple[Record, Record]]) -> None:
        self._staging.evict([staged for _, staged in batch])
        with self._changed:
            self._waiting -= len(batch)
            self._changed.notify_all()

    def _put(self, batch: Sequence[tuple[Record, Record]]) -> None:
        items = []
        for _, staged in batch:
            sections = self._staging.get(staged)
            assert sections is not None
            items.append((staged, sections))
        started = time.perf_counter()
        try:
            outcomes = self._tier.put(items)
        finally:
            taken_us = round(1e6 * (time.perf_counter() - started))
            self._counts[f"write_us:{self._name}"] += taken_us
        for (record, _), outcome in zip(batch, outcomes, strict=True):
            self._became(record, outcome)
