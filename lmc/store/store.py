"""The store as a library: what is known of a prompt, its KV, and keeping more of it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lmc.chunking import CHUNKERS
from lmc.chunking.pieces import Piece, split
from lmc.model.cost import PrefillCost
from lmc.model.layout import KVLayout
from lmc.store.chunks import Chunks
from lmc.store.directory import Answers, Asked, Directory
from lmc.store.index import Index
from lmc.store.keep import keep
from lmc.store.lookup import Found, Known, find, lacking, reach
from lmc.store.record import ContextPolicy, Record
from lmc.store.tier import TIERS, Attached, Drained, Tier, opened, size_of

Tokens = Sequence[int] | np.ndarray
TOLD = 1 << 16  # records of tiers of which it is remembered which tier told of them


class Store:
    """Index and bytes of one process, as a serving engine has them in its scheduler and workers.

    Use it in a `with`, or close it; one that is dropped, or left open when the interpreter ends, is
    closed then, and what waits to be written is written first. Several threads may use it: what
    one waits for, a tier say, does not keep others. In a child of a fork it is empty and takes
    nothing, since its threads are not there: a child opens one of its own.

    Args:
        layout: of one token's KV.
        namespace: all that makes KV incompatible: model, weights, dtype, rotation, tenant.
        memory_bytes: host memory, reserved at once.
        tiers: places behind it, as `lmc.store.tier.TIERS` names them:
            `{"name": "disk", "path": ..., "capacity": "100GiB"}`.
        chunker, policy, exact_variants, context: as in the engine's config, but for the default of
            the last: who has a store to himself need not fear what stood before a text.
        begins: the token that prompts begin with, if the model has one.
        cost: FLOPs of prefill, for policies that weigh what computing a chunk again would take.
        label: the model's name, for people who list a tier.
        patience_s: after so long a chunk that a tier does not bring is a miss.

    Raises:
        ValueError: a wrong setting, or memory for no token.
        OSError: a tier that cannot be opened.
    """

    def __init__(
        self,
        layout: KVLayout,
        namespace: bytes,
        *,
        memory_bytes: int = 4 << 30,
        tiers: Sequence[Mapping[str, Any] | str] = (),
        chunker: Mapping[str, Any] | str = "cdc",
        policy: Mapping[str, Any] | str = "lru",
        exact_variants: int = 2,
        context: ContextPolicy = "any",
        begins: int | None = None,
        cost: PrefillCost | None = None,
        label: str = "",
        patience_s: float = 30.0,
    ) -> None:
        if memory_bytes < layout.bytes_per_token:
            least = layout.bytes_per_token
            raise ValueError(
                f"memory_bytes: got {memory_bytes}, allowed: at least {least}, one token"
            )
        said = [TIERS.build(tier) for tier in tiers]
        self.layout = layout
        self.namespace = namespace
        self.chunker = CHUNKERS.build(chunker)
        self.context, self.begins = context, begins
        self.index = Index(memory_bytes, 1, policy, cost, exact_variants=exact_variants)
        self.tiers: list[Tier] = opened(said, layout, exact_variants=exact_variants, label=label)
        behind = [Attached(tier, s.write) for s, tier in zip(said, self.tiers, strict=True)]
        self._ended: deque[tuple[int, bool]] = deque()
        ended = self._ended  # not self: who is told by a thread could never be let go of
        self.chunks = Chunks(
            layout, memory_bytes, behind, patience_s=patience_s,
            fetched=lambda slot, whole: ended.append((slot, whole)),
        )  # fmt: skip
        self.directory = Directory(self.tiers, patience_s)
        self._lock = threading.RLock()
        self._coming: dict[int, int] = {}  # bytes of what was prefetched and is on its way
        self._told: OrderedDict[bytes, str] = OrderedDict()
        self._process = os.getpid()
        self._close = weakref.finalize(self, _close, os.getpid(), self.chunks, self.directory)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def pieces(
        self,
        tokens: Tokens,
        spans: Sequence[tuple[int, int]] | None = None,
        whole: bool = True,
    ) -> list[Piece]:
        """The chunks of tokens [T]: each span is one, or is cut further, as a serving engine does.

        Raises:
            ValueError: spans that overlap, descend or lie outside.
        """
        return split(np.asarray(tokens, np.int64), self.chunker, spans, whole=whole)

    def lookup(self, tokens: Tokens, spans: Sequence[tuple[int, int]] | None = None) -> list[Found]:
        """What of tokens [T] is stored, in order; no bytes are read.

        Raises:
            ValueError: as `pieces`.
        """
        ids, pieces = np.asarray(tokens, np.int64), self.pieces(tokens, spans)
        if self._forked:
            return []
        found, until = self._found(ids, pieces), time.monotonic() + self.chunks.patience_s
        asked: Asked | None = None
        while self.tiers and time.monotonic() < until and (wanted := lacking(pieces, found)):
            asked = self.directory.ask(self.namespace, ids, wanted, reach(found), asked)
            asked.wait(asked.deadline)
            if not asked.told:
                return found
            found = self._found(ids, pieces, asked.answers)
            if not asked.unasked:
                break
        if asked is None:
            return found
        for one in found:
            if one.record.slot < 0 and (told_by := asked.told_by(one.record.id)) is not None:
                self._told[one.record.id] = self.tiers[told_by].name
        for _ in range(len(self._told) - TOLD):
            self._told.popitem(last=False)
        return found

    def where(self, found: Found | Record) -> str:
        """The tier that would give a chunk: `memory`, or the name of one behind it.

        Nothing where it is gone, or was never looked up.
        """
        record = found.record if isinstance(found, Found) else found
        if record.slot >= 0:
            held = self.chunks.parts(record.slot) is not None
            return self.chunks.memory.name if held else ""
        return self._told.get(record.id, "")

    def retrieve(self, found: Found | Record) -> torch.Tensor | None:
        """The KV `[L, 2, T, G, D]` of a chunk that is stored, a copy; None where it is gone.

        Its keys are rotated for `record.start` on. Out of a tier behind host memory it is brought
        there first, if there is room.
        """
        return self.retrieve_many([found])[0]

    def retrieve_many(self, found: Sequence[Found | Record]) -> list[torch.Tensor | None]:
        """As `retrieve`, of several chunks that are brought side by side."""
        records = [f.record if isinstance(f, Found) else f for f in found]
        out: list[torch.Tensor | None] = []
        most = self.index.capacity // 2  # what is brought together must have room together
        while len(out) < len(records):
            some: list[Record] = []
            size = 0
            for record in records[len(out) :]:
                if some and size + record.nbytes > most:
                    break
                some.append(record)
                size += record.nbytes
            held = self.bring(some)
            out += [self._copied(held.get(record.id)) for record in some]
        return out

    def prefetch(self, tokens: Tokens, spans: Sequence[tuple[int, int]] | None = None) -> None:
        """Start to bring what is stored of tokens [T] into host memory, and return.

        What is on its way takes half of host memory at most; what is not asked for soon is evicted
        again as everything is.

        Raises:
            ValueError: as `pieces`.
        """
        if not (found := self.lookup(tokens, spans)):
            return
        with self._lock:
            room = self.index.capacity // 2 - sum(self._coming.values())
            some = []
            for one in found:
                if one.record.slot < 0 and (room := room - one.record.nbytes) >= 0:
                    some.append(one.record)
            started: dict[bytes, Record] = {}
            self._start(some, started)
            for record in started.values():
                self._coming[record.slot] = record.nbytes
                self.index.release(record.slot)

    def save(
        self,
        tokens: Tokens,
        kv: torch.Tensor,
        spans: Sequence[tuple[int, int]] | None = None,
        blended_from: int | None = None,
    ) -> int:
        """Keep the KV `[L, 2, T, G, D]` of tokens [T], those chunks of it that are not stored.

        Args:
            blended_from: the first token whose KV is not exact, or None.

        Returns:
            How many chunks were added.

        Raises:
            ValueError: KV of another shape or dtype, and as `pieces`.
        """
        want = self.layout.shape(len(tokens))
        if tuple(kv.shape) != want or str(kv.dtype) != f"torch.{self.layout.dtype}":
            raise ValueError(
                f"got KV {list(kv.shape)} of {kv.dtype}, want {list(want)} of {self.layout.dtype}"
            )
        kept = self.make_room(tokens, self.pieces(tokens, spans), blended_from)
        filled = 0
        try:
            for piece, record in kept:
                filled += self.fill(record, kv[:, :, piece.start : piece.end])
        finally:
            if filled < len(kept):
                with self._lock:
                    for _, record in kept:
                        self.index.give_up_unfilled(record.slot)
                    self._free()
        return filled

    def drain(self, timeout_s: float = 60.0) -> Drained:
        """Have tiers that are written through put all that is in host memory, and wait for it.

        Returns:
            What they lack then: true where that is nothing.
        """
        return Drained({}, 0) if self._forked else self.chunks.complete(timeout_s)

    def stats(self) -> dict[str, Any]:
        """What is held and what has happened so far: bytes, chunks and counters by kind."""
        tiers = {
            t.name: {"size": size_of(t), "capacity": t.capacity, "durability": t.durability,
                     "counts": dict(t.counts)}
            for t in self.tiers
        }  # fmt: skip
        index = self.index
        counts = {**index.counts, **self.chunks.counts}
        held = {"chunks": len(index), "size": index.size, "capacity": index.capacity}
        return {**held, "counts": counts, "tiers": tiers}

    def close(self) -> None:
        """Write what is to be written, and let go of memory and tiers; a second time, nothing."""
        self._close()

    # -- for connectors ------------------------------------------------------------------------

    def make_room(
        self, tokens: Tokens, pieces: Sequence[Piece], blended_from: int | None = None
    ) -> list[tuple[Piece, Record]]:
        """Room for every chunk that is not stored; each is to be filled, or dropped, at once."""
        if self._forked:
            return []
        ids = np.asarray(tokens, np.int64)
        per_token = self.layout.bytes_per_token
        with self._lock:
            self._settle()
            kept = keep(self.index, self.namespace, ids, pieces, blended_from, per_token)
            self._free()
        return kept

    def fill(self, record: Record, kv: torch.Tensor) -> bool:
        """Store the KV `[L, 2, T, G, D]` of a record that room was made for; False without room."""
        with self._lock:
            if record.slot not in self.index:
                return False
            parts = self.chunks.reserve(record.slot, record.T)
            if parts is None:
                self.index.drop(record.slot)
                self._free()
                return False
        sources = kv.detach().split([p.shape[2] for p in parts], dim=2)
        for part, source in zip(parts, sources, strict=True):
            part.copy_(source)
        self.chunks.publish(record)
        with self._lock:
            self.index.acknowledge(record.slot, 0)
        return True

    def bring(self, records: Sequence[Record]) -> dict[bytes, Record]:
        """Bring records into host memory; by id those that are there now, with their slots."""
        if self._forked:
            return {}
        held = {}
        started: dict[bytes, Record] = {}
        try:
            with self._lock:
                self._settle()
                self._start(records, started)
            deadline = time.monotonic() + self.chunks.patience_s
            for record in started.values():
                arrival = self.chunks.arrival(record.slot)
                if arrival is not None:
                    arrival.wait(None, deadline)
        finally:  # also when somebody is tired of waiting
            with self._lock:
                self._settle()
                for id, record in started.items():
                    if self.chunks.parts(record.slot) is None:
                        self.index.drop(record.slot)
                    else:
                        held[id] = record
                    self.index.release(record.slot)
                self._free()
        return held

    # -- parts ---------------------------------------------------------------------------------

    @property
    def _forked(self) -> bool:
        """Whether this is a child of the process that opened it, with locks that nobody opens."""
        return os.getpid() != self._process

    def _found(
        self, ids: np.ndarray, pieces: Sequence[Piece], answers: Sequence[Answers] = ()
    ) -> list[Found]:
        with self._lock:
            self._settle()
            known = Known(self.index, self.namespace, answers, self.context, self.begins)
            return find(ids, pieces, known)

    def _start(self, records: Sequence[Record], started: dict[bytes, Record]) -> None:
        """Have records brought that memory lacks; each is leased, or the next pushed it out.

        Args:
            started: gets, by id, those that are in memory or on their way, with their slots.
        """
        coming = []
        for record in records:
            taken: Record | None = record
            if record.id in started:
                continue
            if record.slot not in self.index:
                taken = self.index.adopt(record)
                if taken is not None:
                    coming.append(taken)
                else:
                    taken = self.index.twin(record)
            if taken is not None:
                started[record.id] = taken
                self.index.lease(taken.slot)
        self._free()
        for record in coming:
            self.chunks.expect(record)
        self.index.fetching(record.slot for record in coming)
        self.chunks.fetch([record.slot for record in coming])

    def _settle(self) -> None:
        """Learn of fetches that ended since: what came is as any chunk, what did not is gone."""
        while self._ended:
            slot, whole = self._ended.popleft()
            self._coming.pop(slot, None)
            self.index.returned(slot)
            if whole:
                self.index.acknowledge(slot, 0)
            else:
                self.index.drop(slot)
        self._free()

    def _copied(self, record: Record | None) -> torch.Tensor | None:
        if record is None:
            return None
        with self.chunks.memory.reading(record.slot) as parts:
            if parts is None:
                return None
            out = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0].clone()
        with self._lock:
            self.index.touch(record.slot)
        return out

    def _free(self) -> None:
        for slot in self.index.take_freed():
            self.chunks.evict(slot)


def _close(process: int, chunks: Chunks, directory: Directory) -> None:
    if os.getpid() == process:
        directory.close(tiers=False)
        chunks.close()
