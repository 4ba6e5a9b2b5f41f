"""What a worker tells the scheduler, and the thread that copies chunks out of pages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from lmc.connectors.vllm import states
from lmc.connectors.vllm.config import check_staging
from lmc.connectors.vllm.groups import Groups
from lmc.connectors.vllm.layouts import page_slots_of
from lmc.connectors.vllm.messages import ChunkSave, Kept, WeightsTold, WorkerHello, WorkerReport
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedKV
from lmc.store import Record
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
                self._report.ended.append(slot)

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

    def kept(self, tier: str, record: Record) -> None:
        """A tier has taken or brought a chunk."""
        with self._lock:
            self._report.kept.append(Kept(tier, self.rank, record))

    def removed(self, ids: list[tuple[str, bytes]]) -> None:
        """Tiers have let go of records of these ids."""
        with self._lock:
            self._report.removed += ids

    @contextmanager
    def serving(self, request_id: str) -> Iterator[None]:
        """A claim is served in here: so long it takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._report.served[request_id] = time.perf_counter() - start

    def weights(self, told: WeightsTold) -> None:
        """The weights are not those that the step was made for."""
        with self._lock:
            self._report.weights[self.rank] = told

    def adapters(self, told: dict[int, bytes | str]) -> None:
        """Which adapters there are now."""
        with self._lock:
            self._report.adapters |= told

    def hello(self, hello: WorkerHello) -> None:
        """What the scheduler must know before anything else."""
        with self._lock:
            self._report.hellos[self.rank] = hello

    def take(self) -> WorkerReport | None:
        """What happened since the last call, if anything did."""
        with self._lock:
            report, self._report = self._report, WorkerReport()
        return report if report != WorkerReport() else None


class Staging:
    """One buffer on the device, and one stream, through which rows go from pages to host memory.

    Made once, so that saves take nothing of what the engine has for itself. Where the pages are in
    host memory already, rows go straight from one to the other.

    Args:
        pages: where rows come from.
        groups: which layers are of which KV cache group.
        nbytes: of the buffer; beside it there are 8 bytes for each row of one layer that fits.

    Attributes:
        direct: whether no row goes through the buffer.

    Raises:
        ValueError: not one row of one layer fits.
    """

    def __init__(self, pages: PagedKV, groups: Groups, nbytes: int) -> None:
        self.pages = pages
        self._runs = [(g, run) for g in range(len(groups.specs)) for run in groups.runs(g)]
        row_bytes = pages.sides * pages.G * pages.D * pages.dtype.itemsize
        check_staging(nbytes, row_bytes)
        self._rows = nbytes // row_bytes  # of one layer
        room = self._rows * pages.sides * pages.G * pages.D
        self._buffer = torch.empty(room, dtype=pages.dtype, device=pages.device)
        self._slots = torch.empty(self._rows, dtype=torch.int64, device=pages.device)
        # Untested on a GPU.
        self._stream = torch.cuda.Stream(pages.device) if pages.device.type == "cuda" else None
        self.direct = pages.device.type == "cpu"
        self._some: dict[tuple[int, int], PagedKV] = {}

    def copy(self, slots: list[torch.Tensor], parts: list[torch.Tensor], ready: Any) -> None:
        """Copy the rows of slots `[T]` to parts `[L, 2, t, G, D]` along T, and return when done.

        Args:
            slots: by KV cache group, on the host.
            ready: an event, behind which the pages hold these rows; None without a GPU.
        """
        with self.behind(ready):
            sizes = [part.shape[2] for part in parts]
            here = [of_group.split(sizes) for of_group in slots]
            for part, some in zip(parts, zip(*here, strict=True), strict=True):
                for group, (first, behind) in self._runs:
                    self._copy(some[group], part[first:behind], first)

    @contextmanager
    def behind(self, ready: Any) -> Iterator[None]:
        """What is done in here is done on the stream, behind an event, and over when it ends."""
        with torch.cuda.stream(self._stream):
            try:
                if self._stream is not None:
                    self._stream.wait_event(ready)
                yield
            finally:
                # Also when that failed: the parts may be given to others then.
                if self._stream is not None:
                    self._stream.synchronize()

    def _copy(self, slots: torch.Tensor, part: torch.Tensor, first: int) -> None:
        """Rows of the layers from `first` on to one part of them.

        The stream keeps a piece from being overwritten by the next one.
        """
        if self.direct:
            gather(self._pages_of(slice(first, first + len(part))), slots, out=part)
            return
        for layers, rows in pieces(len(part), len(slots), self._rows):
            pages = self._pages_of(slice(first + layers.start, first + layers.stop))
            target = part[layers, :, rows]
            index = self._slots[: target.shape[2]]
            index.copy_(slots[rows], non_blocking=True)
            staged = self._buffer[: target.numel()].view(target.shape)
            gather(pages, index, out=staged)
            # Each copy to host memory in one run, or torch would have it go through more memory.
            whole = target.is_contiguous()
            for new, old in [(target, staged)] if whole else zip(target[0], staged[0], strict=True):
                new.copy_(old, non_blocking=True)

    def _pages_of(self, layers: slice) -> PagedKV:
        """Some layers of the pages; kept, since each has a table of addresses on the device."""
        key = (layers.start, layers.stop)
        if key not in self._some:
            self._some[key] = self.pages.some(*key)
        return self._some[key]


def pieces(L: int, T: int, room: int) -> Iterator[tuple[slice, slice]]:
    """Cut L layers of T rows into pieces of at most `room` rows: (layers, rows).

    All rows of as many layers as fit, or else some rows of one layer.
    """
    rows = min(T, room)
    layers = room // rows
    for layer in range(0, L, layers):
        for row in range(0, T, rows):
            yield slice(layer, min(layer + layers, L)), slice(row, min(row + rows, T))


class Copies:
    """Copies of chunks out of pages, on a thread of their own, in the order of their asking.

    Whatever happens to one of them, the scheduler is told of it and the thread goes on.

    Args:
        staging_bytes: of the device's memory, through which they go.

    Attributes:
        states: vLLM's pages of layers that keep a state, once they are known.

    Raises:
        ValueError: not one row of one layer fits into that.
    """

    def __init__(self, chunks: Chunks, told: Told, groups: Groups, staging_bytes: int) -> None:
        layout = chunks.memory.layout
        check_staging(staging_bytes, layout.bytes_per_token // layout.L)
        self._chunks, self._told, self._groups = chunks, told, groups
        self._staging_bytes = staging_bytes
        self._staging: Staging | None = None
        self.states: states.Pages | None = None
        # One thread, so that saves and frees happen in the order the scheduler wanted.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lmc-save")
        self._asked = self._done = 0

    @property
    def pending(self) -> int:
        """How many copies, evictions and fetches wait for the thread, or are what it does."""
        return self._asked - self._done

    @property
    def pages(self) -> PagedKV | None:
        """vLLM's, once they are known."""
        return self._staging.pages if self._staging is not None else None

    @pages.setter
    def pages(self, pages: PagedKV) -> None:
        self._staging = Staging(pages, self._groups, self._staging_bytes)

    def save(self, save: ChunkSave) -> None:
        """Copy a chunk as it is in the pages once the device has done what it was given so far."""
        self._submit("saves_failed", self._save, save, recorded())

    def evict(self, slots: Iterable[int]) -> None:
        """Let go of slots, behind all copies that were asked for."""
        slots = list(slots)
        # Untested on a GPU: copies of earlier steps out of the memory that is let go of.
        used = recorded() if slots else None
        for slot in slots:
            self._submit("evictions_failed", self._evict, slot, used)

    def fetch(self, slots: Iterable[int]) -> None:
        """Begin to bring what is expected under these slots, behind what was let go of."""
        if slots := list(slots):
            self._submit("fetches_failed", self._chunks.fetch, slots)

    def finish(self) -> None:
        """Return when all that was asked for is done."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Finish, and let go of the thread."""
        self._thread.shutdown(wait=True)

    def _submit(self, failures: str, call: Callable[..., None], *arguments: Any) -> None:
        """Have the thread make a call; one that fails is logged and counted, whatever it raises."""

        def made() -> None:
            try:
                call(*arguments)
            except BaseException:
                logger.exception("lmc could not do what it was to do with a chunk")
                self._chunks.counts[failures] += 1
            finally:
                self._done += 1

        self._thread.submit(made)
        self._asked += 1

    def _evict(self, slot: int, used: Any) -> None:
        try:
            if used is not None:
                used.synchronize()
        finally:
            self._chunks.evict(slot)

    def _save(self, save: ChunkSave, ready: Any) -> None:
        slot = save.record.slot
        try:
            self._told.held(slot, self._stored(save, ready))
        except BaseException:
            try:
                self._chunks.forget(slot)
            finally:
                self._told.held(slot, whole=False)
            raise

    def _stored(self, save: ChunkSave, ready: Any) -> bool:
        """Whether there was room for a chunk; then it is there now."""
        slots = self._slots(save) if save.states is None else []
        parts = self._chunks.reserve(save.record.slot, save.end - save.start)
        if parts is None:
            return False
        assert self._staging is not None
        started = time.perf_counter()
        if save.states is None:
            self._staging.copy(slots, parts, ready)
        else:
            assert self.states is not None
            with self._staging.behind(ready):
                self.states.read(save.states, save.blocks[0][0], parts)
        counts = self._chunks.counts
        counts["save_us:host"] += round(1e6 * (time.perf_counter() - started))
        counts["bytes_saved:host"] += save.record.nbytes
        self._chunks.publish(save.record)
        return True

    def _slots(self, save: ChunkSave) -> list[torch.Tensor]:
        """Where a chunk's rows are, by KV cache group."""
        rows, P = np.arange(save.start, save.end, dtype=np.int64), self._groups.block_size
        slots = [page_slots_of(rows, of, P, torch.device("cpu")) for of in save.blocks]
        if any(int(of_group.min()) < 0 for of_group in slots):
            raise ValueError("a chunk is to be saved out of pages that the request has no more")
        return slots


def recorded() -> Any:
    """An event behind all that the device has been given so far; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def reading(saves: Sequence[ChunkSave], spoilt: Container[int], block_size: int) -> set[int]:
    """Slots of those that would read a spoilt block of their request, or behind one."""
    before: dict[int, int] = {}  # by lists of blocks, how many come before the first spoilt one
    # A claim that failed leaves no states behind.
    rows = [save for save in saves if save.states is None]
    for groups in {id(save.blocks): save.blocks for save in rows}.values() if spoilt else ():
        bad = (i for of in groups for i, block in enumerate(of) if block in spoilt)
        before[id(groups)] = min(bad, default=len(groups[0]))
    return {
        save.record.slot
        for save in rows
        if save.end > before.get(id(save.blocks), len(save.blocks[0])) * block_size
    }
