"""Puts that nobody waits for: a thread a tier, and a queue that drops what it has no room for."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from lmc.model.layout import KVLayout
from lmc.store.memory import HostMemory
from lmc.store.record import Record
from lmc.store.tier import Rows, Tier

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
        held: told, on the writer's thread, of each slot whose chunk the tier has now.
    """

    def __init__(
        self,
        tier: Tier,
        layout: KVLayout,
        queue_bytes: int,
        counts: Counter[str],
        held: Callable[[int], None] = lambda slot: None,
    ) -> None:
        self._tier, self._name = tier, tier.name
        self._staging = HostMemory(layout, queue_bytes)
        self._counts = counts
        self._held = held
        # Each as it came, and as it is staged: a slot may be offered twice.
        self._queue: deque[tuple[Record, Record]] = deque()
        self._waiting = 0  # offers that are in the queue or being put
        self._next = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(
            target=self._run, name=f"lmc-writer-{self._name}", daemon=True
        )
        self._thread.start()

    def offer(self, record: Record, parts: Sequence[Rows]) -> bool:
        """Have a chunk put later; False when it is dropped."""
        with self._changed:
            staged = replace(record, slot=self._next)
            self._next += 1
        if not self._staging.put([(staged, parts)])[0]:
            self._counts[f"writes_dropped:{self._name}"] += 1
            return False
        with self._changed:
            if not self._closing:
                self._queue.append((record, staged))
                self._waiting += 1
                self._changed.notify_all()
                return True
        self._staging.release(staged.slot)
        return False

    def drain(self, timeout_s: float) -> bool:
        """Wait until all that was offered is put; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Put what is waiting, for so long; what is left then is dropped and counted.

        Returns:
            Whether no put is under way any more.
        """
        until = time.monotonic() + timeout_s
        self.drain(timeout_s)
        with self._changed:
            self._closing = True
            self._counts[f"writes_dropped:{self._name}"] += len(self._queue)
            self._waiting -= len(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(max(0.1, until - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    break
                some = range(min(len(self._queue), TOGETHER))
                batch = [self._queue.popleft() for _ in some]
            try:
                self._put(batch)
            except BaseException:  # no tier raises for a fault; this one is not as it should be
                logger.exception("lmc could not write to tier %s", self._name)
                self._counts[f"writes_failed:{self._name}"] += len(batch)
            self._staging.evict([staged for _, staged in batch])
            with self._changed:
                self._waiting -= len(batch)
                self._changed.notify_all()
        self._staging.close()

    def _put(self, batch: Sequence[tuple[Record, Record]]) -> None:
        items = []
        for _, staged in batch:
            parts = self._staging.get(staged)
            assert parts is not None
            items.append((staged, parts))
        started = time.perf_counter()
        try:
            done = self._tier.put(items)
        finally:
            taken_ms = round(1000 * (time.perf_counter() - started))
            self._counts[f"write_ms:{self._name}"] += taken_ms
        # What is not acknowledged may have been there before.
        lacking = [record for (record, _), put in zip(batch, done, strict=True) if not put]
        held = self._tier.contains(lacking) if lacking else []
        gone = {record.slot for record, here in zip(lacking, held, strict=True) if not here}
        for record, _ in batch:
            if record.slot not in gone:
                self._held(record.slot)
