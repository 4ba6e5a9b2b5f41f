"""Host memory: one buffer, reserved once, and the chunks in it."""

from __future__ import annotations

import mmap
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lmc.model.layout import KVLayout
from lmc.store.extents import Extents, Run
from lmc.store.reads import Ended
from lmc.store.record import Record
from lmc.store.rows import copy_rows
from lmc.store.sections import Form, Rows, Section
from lmc.store.tier import Behind, Durability, Handle, Outcome, Wanted

MAP_NORESERVE = 0x4000  # of Linux; Python's mmap has it from 3.13 on


@dataclass
class _Held:
    """A slot's room: as parts where it was reserved, as sections where it was put."""

    runs: list[Run]
    parts: list[torch.Tensor] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    record: Record | None = None
    published: bool = False
    readers: int = 0


class HostMemory:
    """Chunks in host memory by slot, pinned when there is a GPU.

    The buffer is cut into tokens, and a chunk takes as many of them as it has, in one run where one
    is free and in several where not: so nothing is lost to fragments, however long it runs. Each
    run is a chunk buffer of its own, `[L, 2, t, G, D]`, which `scatter` takes as it is.

    Which chunks are held is the Index's decision. Who copies out of it on a thread of its own does
    so within `reading`: memory that is let go of meanwhile becomes another's only afterwards.

    Args:
        layout: shape of one token.
        capacity: bytes; memory for the tokens that fit is reserved at once.
        populate: whether the machine gives it at once too, or page by page when it is first used.
    """

    name = "memory"
    durability: Durability = "evictable"

    def __init__(self, layout: KVLayout, capacity: int, populate: bool = False) -> None:
        self.layout = layout
        self.capacity = capacity
        self.counts: Counter[str] = Counter()
        self.epoch: int | None = 0
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
            if slot in self._held:  # it may be closed meanwhile
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
        2 · l · t rows on, and V t rows behind that. Of latents it is 1 in place of 2, and no V.
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

    @contextmanager
    def reading(self, slot: int) -> Iterator[list[torch.Tensor] | None]:
        """The chunk's parts, as `parts`, which stay what they are as long as this lasts."""
        with self._reading(slot) as held:
            yield None if held is None else held.parts

    def release(self, slot: int) -> None:
        """Let go of a slot, published or not; one that is not held is no error."""
        with self._lock:
            self._release(slot)

    def span(self) -> tuple[int, int]:
        """Address and bytes of all of it."""
        return self._buffer.data_ptr(), self._buffer.numel()

    # -- as a tier, by the slots of records ----------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes of all chunks."""
        return (self._tokens - self._extents.free) * self.layout.bytes_per_token

    def register(self, address: int, nbytes: int) -> None:
        """As `Tier`; copies need no registration."""

    def lookup_many(
        self, namespace: bytes, keys: Sequence[bytes], behind: Sequence[Behind], deadline: float
    ) -> tuple[list[list[Record]], list[list[Record]]]:
        with self._lock:
            held = [h.record for h in self._held.values() if h.published and h.record is not None]
        by_key: dict[bytes, list[Record]] = {}
        by_context: dict[Behind, list[Record]] = {}
        for record in held:
            if record.namespace == namespace:
                if not record.tail:
                    by_key.setdefault(record.key, []).append(record)
                if record.origin != "blended":
                    question = Behind(record.context, record.tokens[:8])
                    by_context.setdefault(question, []).append(record)
        return [by_key.get(key, []) for key in keys], [by_context.get(q, []) for q in behind]

    def contains(self, records: Sequence[Record]) -> list[bool]:
        with self._lock:
            found = [self._held.get(record.slot) for record in records]
            return [held is not None and held.published for held in found]

    def put(self, items: Sequence[tuple[Record, Sequence[Section]]]) -> list[Outcome]:
        return [self._put(record, sections) for record, sections in items]

    def get(self, record: Record) -> Sequence[Section] | None:
        """The chunk's sections where they lie, until it is evicted; None when it is not held."""
        with self._lock:
            held = self._held.get(record.slot)
            return held.sections if held is not None and held.published else None

    def get_many(self, wanted: Sequence[Wanted]) -> list[Handle]:
        return [Ended(self.layout.L if self._copied(w) else None) for w in wanted]

    def evict(self, records: Sequence[Record]) -> None:
        with self._lock:
            for record in records:
                held = self._held.get(record.slot)
                # A put that has not ended writes there still.
                if held is not None and held.published:
                    self._release(record.slot)

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

    def _release(self, slot: int) -> None:
        """The lock is held."""
        held = self._held.pop(slot, None)
        if held is not None and not held.readers:
            self._give(held.runs)

    def _give(self, runs: list[Run]) -> None:
        if self._tokens:  # else it is closed
            self._extents.give(runs)

    @contextmanager
    def _reading(self, slot: int) -> Iterator[_Held | None]:
        with self._lock:
            held = self._held.get(slot)
            if held is not None and held.published:
                held.readers += 1
            else:
                held = None
        try:
            yield held
        finally:
            if held is not None:
                with self._lock:
                    held.readers -= 1
                    if not held.readers and self._held.get(slot) is not held:
                        self._give(held.runs)

    def _put(self, record: Record, sections: Sequence[Section]) -> Outcome:
        with self._lock:
            if record.slot in self._held:
                self.counts["known"] += 1
                return "known"
            runs: list[Run] = []
            room = []
            for form, _ in sections:
                placed = self._place(form)
                if placed is None:
                    self._extents.give(runs)
                    self.counts["no_room"] += 1
                    return "full"
                runs += placed[0]
                room.append(Section(form, placed[1]))
            held = self._held[record.slot] = _Held(runs, sections=room, record=record)
        try:
            for (_, source), (_, target) in zip(sections, room, strict=True):
                copy_rows(source, target)
            if not room:
                raise ValueError("got a chunk of no sections")
        except ValueError:  # rows that are not of their form
            self.release(record.slot)
            self.counts["failed"] += 1
            return "failed"
        with self._lock:
            held.published = True
            self.epoch = (self.epoch or 0) + 1
        return "stored"

    def _copied(self, wanted: Wanted) -> bool:
        with self._reading(wanted.record.slot) as held:
            if held is None:
                return False
            have = dict(held.sections)
            if any(form not in have for form, _ in wanted.into):
                self.counts["other_layout"] += 1
                return False
            for form, parts in wanted.into:
                copy_rows(have[form], parts)
        return True

    def _place(self, form: Form) -> tuple[list[Run], list[Rows]] | None:
        """Room for a section of any form: runs, and its rows in them; None if there is too little.

        What does not fill a run of whole tokens of the layout is left empty.
        """
        L, S, T, R = form.shape
        unit, token = self.layout.bytes_per_token, L * S * R
        runs: list[Run] = []
        parts: list[Rows] = []
        memory = self._buffer.numpy()
        while T:
            taken = self._extents.take(-(-T * token // unit))
            if taken is None or not any((end - start) * unit >= token for start, end in taken):
                self._extents.give(runs + (taken or []))
                return None
            runs += taken
            for start, end in taken:
                n = min(T, (end - start) * unit // token)
                if n:
                    rows = memory[start * unit : start * unit + n * token]
                    parts.append(rows.reshape(L, S, n, R))
                    T -= n
        return runs, parts

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
