"""What a worker tells the scheduler, and the thread that copies chunks out of pages."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from lmc.connectors.vllm.layouts import page_slots_of
from lmc.connectors.vllm.messages import ChunkSave, WeightsTold, WorkerReport
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedKV
from lmc.store.chunks import Chunks

logger = init_logger(f"vllm.{__name__}")  # else vLLM prints none of it


class Told:
    """A report in the making, written by several threads."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._lock = threading.Lock()
        self._report = WorkerReport()

    def held(self, slot: int, whole: bool = True) -> None:
        """A chunk is there now, or will never be."""
        with self._lock:
            if whole:
                self._report.saved.append((slot, self.rank))
            else:
                self._report.lost.append(slot)

    def lost(self, slots: Iterable[int], late: bool) -> None:
        """Chunks are not there; `late` says that one of them was waited for in vain."""
        with self._lock:
            self._report.lost += slots
            self._report.late |= late

    def recomputed(self, request_id: str, rows: np.ndarray) -> None:
        """Rows `[M]` were computed in place of chunks."""
        with self._lock:
            self._report.recomputed[request_id] = rows.tolist()

    def failed(self, request_id: str, blocks: Iterable[int]) -> None:
        """A claim on these blocks came to nothing."""
        with self._lock:
            self._report.failed.update(blocks)
            self._report.recomputed.pop(request_id, None)

    def weights(self, told: WeightsTold) -> None:
        """The weights are not those that the step was made for."""
        with self._lock:
            self._report.weights[self.rank] = told

    def take(self) -> WorkerReport | None:
        """What happened since the last call, if anything did."""
        with self._lock:
            report, self._report = self._report, WorkerReport()
        return report if report != WorkerReport() else None


class Copies:
    """Copies of chunks out of pages, on a thread of their own, in the order of their asking.

    Attributes:
        pages: vLLM's, once they are known.
    """

    def __init__(self, chunks: Chunks, told: Told, block_size: int) -> None:
        self.pages: PagedKV | None = None
        self._chunks, self._told, self._block_size = chunks, told, block_size
        # One thread, so that saves and frees happen in the order the scheduler wanted.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lmc-save")
        self._lock = threading.Lock()
        self._saving: Counter[str] = Counter()
        self._released: set[str] = set()

    def save(self, save: ChunkSave) -> None:
        """Copy a chunk as it is in the pages once the device has done what it was given so far."""
        with self._lock:
            self._saving[save.request_id] += 1
        self._thread.submit(self._save, save, recorded())

    def evict(self, slots: Iterable[int]) -> None:
        """Let go of slots, behind all copies that were asked for."""
        slots = list(slots)
        # Untested on a GPU: copies of earlier steps out of the memory that is let go of.
        used = recorded() if slots else None
        for slot in slots:
            self._thread.submit(self._evict, slot, used)

    def fetch(self, slots: Iterable[int]) -> None:
        """Begin to bring what is expected under these slots, behind what was let go of."""
        for slot in slots:
            self._thread.submit(self._chunks.fetch, slot)

    def release(self, request_ids: Iterable[str]) -> None:
        """These requests wait for their copies before their blocks are freed."""
        self._released.update(request_ids)

    def released(self) -> set[str]:
        """Of those, the ones whose copies are done, each told once."""
        with self._lock:
            done = {r for r in self._released if not self._saving[r]}
        self._released -= done
        return done

    def finish(self) -> None:
        """Return when all that was asked for is done."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Finish, and let go of the thread."""
        self._thread.shutdown(wait=True)

    def _evict(self, slot: int, used: Any) -> None:
        if used is not None:
            used.synchronize()
        self._chunks.evict(slot)

    def _save(self, save: ChunkSave, ready: Any) -> None:
        slot, stored = save.record.slot, False
        try:
            parts = self._chunks.reserve(slot, save.end - save.start)
            if parts is not None:
                self._copy_out(save, parts, ready)
                self._chunks.publish(save.record)
                stored = True
        except Exception:
            logger.exception("lmc could not store a chunk of %s", save.request_id)
            self._chunks.forget(slot)
        self._told.held(slot, stored)
        with self._lock:
            self._saving[save.request_id] -= 1
            if not self._saving[save.request_id]:
                del self._saving[save.request_id]

    def _copy_out(self, save: ChunkSave, parts: list[torch.Tensor], ready: Any) -> None:
        assert self.pages is not None
        rows = np.arange(save.start, save.end, dtype=np.int64)
        slots = page_slots_of(rows, save.blocks, self._block_size, self.pages.k[0].device)
        here = slots.split([part.shape[2] for part in parts])
        if ready is None:
            for part, some in zip(parts, here, strict=True):
                gather(self.pages, some, out=part)
            return
        # Untested on a GPU: a stream of its own, behind the step's forward.
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            for part, some in zip(parts, here, strict=True):
                part.copy_(gather(self.pages, some), non_blocking=True)
        stream.synchronize()


def recorded() -> Any:
    """An event behind all that the device has been given so far; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()
    event.record()
    return event
