"""Host memory: one buffer, reserved once, and the chunks in it."""

from __future__ import annotations

import mmap
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lmc.model.layout import KVLayout
from lmc.store.extents import Extents, Run
from lmc.store.record import Record
from lmc.store.rows import copy_rows
from lmc.store.tier import Rows

MAP_NORESERVE = 0x4000  # of Linux; Python's mmap has it from 3.13 on


@dataclass
class _Held:
    runs: list[Run]
    parts: list[torch.Tensor]
    published: bool = False


class HostMemory:
    """Chunks in host memory by slot, pinned when there is a GPU.

    The buffer is cut into tokens, and a chunk takes as many of them as it has, in one run where one
    is free and in several where not: so nothing is lost to fragments, however long it runs. Each
    run is a chunk buffer of its own, `[L, 2, t, G, D]`, which `scatter` takes as it is.

    Which chunks are held is the Index's decision.

    Args:
        layout: shape of one token.
        capacity: bytes; memory for the tokens that fit is reserved at once.
        populate: whether the machine gives it at once too, or page by page when it is first used.
    """

    name = "memory"

    def __init__(self, layout: KVLayout, capacity: int, populate: bool = False) -> None:
        self.layout = layout
        self.capacity = capacity
        self.counts: Counter[str] = Counter()
        tokens = capacity // layout.bytes_per_token
        self._dtype = getattr(torch, layout.dtype)
        self._buffer = _reserved(tokens * layout.bytes_per_token, populate)
        self._extents = Extents(tokens)
        self._tokens = tokens
        self._held: dict[int, _Held] = {}
        self._lock = threading.Lock()

    # -- by slot: without a copy ---------------------------------------------------------------

    def reserve(self, slot: int, T: int) -> list[torch.Tensor] | None:
        """Room for a chunk of T tokens, not to be read before it is published.

        Returns:
            Its parts `[L, 2, t, G, D]` along T, of any content; None when it does not fit.

        Raises:
            ValueError: a slot that is held, or no tokens.
        """
        if T < 1:
            raise ValueError(f"got a chunk of {T} tokens, allowed: at least 1")
        with self._lock:
            if slot in self._held:
                raise ValueError(f"slot {slot} is held already")
            return self._take(slot, T)

    def publish(self, slot: int) -> None:
        """From now on the slot may be read."""
        with self._lock:
            self._held[slot].published = True

    def parts(self, slot: int) -> list[torch.Tensor] | None:
        """The chunk's parts, or None when it is not held or not published."""
        with self._lock:
            held = self._held.get(slot)
            return held.parts if held is not None and held.published else None

    @property
    def flat(self) -> torch.Tensor:
        """All of it as rows `[2 · L · tokens, G, D]`, each of one layer and side.

        A run of t tokens from token s on begins at row 2 · L · s; in it, K of layer l begins
        2 · l · t rows on, and V t rows behind that.
        """
        return self._buffer.view(self._dtype).view(-1, self.layout.G, self.layout.D)

    def runs(self, slots: Sequence[int], unpublished: bool = False) -> list[list[Run] | None]:
        """Where each chunk lies: runs of tokens, in their order; None for one not held.

        Args:
            unpublished: those count too that are still written.
        """
        with self._lock:
            found = [self._held.get(slot) for slot in slots]
            return [
                held.runs if held is not None and (held.published or unpublished) else None
                for held in found
            ]

    def release(self, slot: int) -> None:
        """Let go of a slot, published or not; one that is not held is no error."""
        with self._lock:
            held = self._held.pop(slot, None)
            if held is not None:
                self._extents.give(held.runs)

    # -- as a tier, by record ------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes of all chunks."""
        return (self._tokens - self._extents.free) * self.layout.bytes_per_token

    def contains(self, records: Sequence[Record]) -> list[bool]:
        return [self.parts(record.slot) is not None for record in records]

    def put(self, items: Sequence[tuple[Record, Sequence[Rows]]]) -> list[bool]:
        done = []
        for record, rows in items:
            with self._lock:
                known = record.slot in self._held
                if known:
                    self.counts["known"] += 1
                parts = None if known else self._take(record.slot, record.T)
            if parts is not None:
                try:
                    copy_rows(rows, [rows_of(part) for part in parts])
                except Exception:
                    self.release(record.slot)
                    raise
                self.publish(record.slot)
            done.append(parts is not None)
        return done

    def get(
        self,
        record: Record,
        into: Sequence[Rows] | None = None,
        deadline: float | None = None,
        arrived: Callable[[int], None] = lambda layers: None,
    ) -> Sequence[Rows] | None:
        parts = self.parts(record.slot)
        if parts is None:
            return None
        rows = [rows_of(part) for part in parts]
        if into is not None:
            copy_rows(rows, into)
            if self.parts(record.slot) is not parts:  # evicted meanwhile: its room may be another's
                return None
        arrived(self.layout.L)
        return rows if into is None else into

    def evict(self, records: Sequence[Record]) -> None:
        with self._lock:
            for record in records:
                held = self._held.get(record.slot)
                # A put that has not ended writes there still.
                if held is not None and held.published:
                    self._extents.give(self._held.pop(record.slot).runs)

    def close(self) -> None:
        with self._lock:
            self._held = {}
            self._extents = Extents(0)
            self._tokens = 0
            self._buffer = torch.empty(0, dtype=torch.uint8)

    def _take(self, slot: int, T: int) -> list[torch.Tensor] | None:
        """Room for a slot that has none; the lock is held."""
        runs = self._extents.take(T)
        if runs is None:
            self.counts["no_room"] += 1
            return None
        parts = [self._part(start, end) for start, end in runs]
        self._held[slot] = _Held(runs, parts)
        return parts

    def _part(self, start: int, end: int) -> torch.Tensor:
        size = self.layout.bytes_per_token
        data = self._buffer[start * size : end * size]
        return data.view(self._dtype).view(self.layout.shape(end - start))


def rows_of(part: torch.Tensor) -> Rows:
    """A chunk buffer `[L, 2, t, G, D]` in host memory as its bytes `[L, 2, t, R]`; no copy."""
    return part.flatten(3).view(torch.uint8).numpy()


def _reserved(nbytes: int, populate: bool) -> torch.Tensor:
    """Host memory, uint8 `[nbytes]`."""
    if torch.cuda.is_available():
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    # Whole pages, as O_DIRECT wants them. What is not taken yet is not promised either, or a few
    # stores in one process would leave it unable to fork.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    flags |= mmap.MAP_POPULATE if populate else MAP_NORESERVE
    pages = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=flags)
    return torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]
