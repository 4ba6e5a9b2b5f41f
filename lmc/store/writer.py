"""Puts that nobody waits for: one thread, and a queue that drops what it has no room for."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace

from lmc.model.layout import KVLayout
from lmc.store.memory import HostMemory
from lmc.store.record import Record
from lmc.store.tier import Rows, Tier

logger = logging.getLogger(__name__)

# Chunks that are synced together: more, and one that is lost with the process is lost with others.
TOGETHER = 32


class Writer:
    """Puts chunks into tiers behind everybody's back.

    What is offered is copied at once, so that its memory may be used again. When the queue has no
    room for it, it is dropped and counted: the model never waits for a disk.

    Args:
        layout: of the chunks.
        queue_bytes: of the copies that wait; memory that is reserved at once.
        counts: where drops and failures are counted.
    """

    def __init__(self, layout: KVLayout, queue_bytes: int, counts: Counter[str]) -> None:
        self._staging = HostMemory(layout, queue_bytes)
        self._counts = counts
        self._queue: deque[tuple[Record, Tier]] = deque()
        self._waiting = 0  # offers that are in the queue or being put
        self._next = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lmc-writer", daemon=True)
        self._thread.start()

    def offer(self, record: Record, parts: Sequence[Rows], tier: Tier) -> bool:
        """Have a chunk put into `tier` later; False when it is dropped."""
        with self._changed:
            if self._closing:
                return False
            staged = replace(record, slot=self._next)
            self._next += 1
        if not self._staging.put([(staged, parts)])[0]:
            self._counts[f"writes_dropped:{tier.name}"] += 1
            return False
        with self._changed:
            self._queue.append((staged, tier))
            self._waiting += 1
            self._changed.notify_all()
        return True

    def drain(self, timeout_s: float) -> bool:
        """Wait until all that was offered is put; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Put what is waiting, for so long; what is left then is dropped and counted."""
        self.drain(timeout_s)
        with self._changed:
            self._closing = True
            for _, tier in self._queue:
                self._counts[f"writes_dropped:{tier.name}"] += 1
            self._waiting -= len(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._staging.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                tier = self._queue[0][1]
                batch: list[Record] = []
                while self._queue and self._queue[0][1] is tier and len(batch) < TOGETHER:
                    batch.append(self._queue.popleft()[0])
            self._put(batch, tier)
            with self._changed:
                self._waiting -= len(batch)
                self._changed.notify_all()

    def _put(self, batch: Sequence[Record], tier: Tier) -> None:
        items = []
        for record in batch:
            parts = self._staging.get(record)
            assert parts is not None
            items.append((record, parts))
        started = time.perf_counter()
        try:
            tier.put(items)
        except Exception:  # no tier raises for a fault; were one to, the next chunk is another
            logger.exception("lmc could not write to tier %s", tier.name)
            self._counts[f"writes_failed:{tier.name}"] += len(batch)
        self._counts[f"write_ms:{tier.name}"] += round(1000 * (time.perf_counter() - started))
        self._staging.evict(batch)
