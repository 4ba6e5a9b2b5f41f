"""The store as a library: what is known of a prompt, its KV, and keeping more of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from lmc.chunking import CHUNKERS
from lmc.chunking.pieces import Piece, split
from lmc.model.cost import PrefillCost
from lmc.model.layout import KVLayout
from lmc.store.chunks import Attached, Chunks
from lmc.store.index import Index
from lmc.store.keep import keep
from lmc.store.lookup import Found, Known, find
from lmc.store.record import ContextPolicy, Record
from lmc.store.tier import TIERS

Tokens = Sequence[int] | np.ndarray


class Store:
    """Index and bytes of one process, as a serving engine has them in its scheduler and workers.

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
            raise ValueError(
                f"memory_bytes: got {memory_bytes}, allowed: at least {layout.bytes_per_token}, "
                "one token"
            )
        said = [TIERS.build(tier) for tier in tiers]
        self.layout = layout
        self.namespace = namespace
        self.chunker = CHUNKERS.build(chunker)
        self.context, self.begins = context, begins
        self.index = Index(memory_bytes, 1, policy, cost, exact_variants=exact_variants)
        opened = [s.open(layout, exact_variants=exact_variants, label=label) for s in said]
        self.tiers = opened
        behind = [Attached(tier, s.write) for s, tier in zip(said, opened, strict=True)]
        self.chunks = Chunks(layout, memory_bytes, behind, patience_s=patience_s)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        known = Known(self.index, self.namespace, self.tiers, self.context, self.begins)
        return find(np.asarray(tokens, np.int64), self.pieces(tokens, spans), known)

    def where(self, found: Found | Record) -> str:
        """The tier that would give a chunk: `memory`, or the name of one behind it."""
        record = found.record if isinstance(found, Found) else found
        if record.slot >= 0:
            return self.chunks.memory.name
        return next((t.name for t in self.tiers if t.contains([record])[0]), "")

    def retrieve(self, found: Found | Record) -> torch.Tensor | None:
        """The KV `[L, 2, T, G, D]` of a chunk that is stored, a copy; None where it is gone.

        Its keys are rotated for `record.start` on. Out of a tier behind host memory it is brought
        there first, if there is room.
        """
        record = found.record if isinstance(found, Found) else found
        held = self.bring([record]).get(record.id)
        parts = self.chunks.parts(held.slot) if held is not None else None
        if held is None or parts is None:
            return None
        self.index.touch(held.slot)
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0].clone()

    def prefetch(self, tokens: Tokens, spans: Sequence[tuple[int, int]] | None = None) -> None:
        """Start to bring what is stored of tokens [T] into host memory, and return.

        Raises:
            ValueError: as `pieces`.
        """
        for found in self.lookup(tokens, spans):
            self._start(found.record)

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
        return sum(self.fill(record, kv[:, :, p.start : p.end]) for p, record in kept)

    def drain(self, timeout_s: float = 60.0) -> bool:
        """Wait until tiers have what they are to have; False when that takes longer."""
        return self.chunks.drain(timeout_s)

    def close(self) -> None:
        """Write what is to be written, and let go of memory and tiers."""
        self.chunks.close()

    # -- for connectors ------------------------------------------------------------------------

    def make_room(
        self, tokens: Tokens, pieces: Sequence[Piece], blended_from: int | None = None
    ) -> list[tuple[Piece, Record]]:
        """Room for every chunk that is not stored; each is to be filled, or dropped, at once."""
        ids = np.asarray(tokens, np.int64)
        per_token = self.layout.bytes_per_token
        kept = keep(self.index, self.namespace, ids, pieces, blended_from, per_token)
        self._free()
        return kept

    def fill(self, record: Record, kv: torch.Tensor) -> bool:
        """Store the KV `[L, 2, T, G, D]` of a record that room was made for; False without room."""
        if record.slot not in self.index:
            return False
        parts = self.chunks.reserve(record.slot, record.T)
        if parts is None:
            self.index.drop(record.slot)
            self._free()
            return False
        for part, source in zip(parts, kv.split([p.shape[2] for p in parts], dim=2), strict=True):
            part.copy_(source)
        self.chunks.publish(record)
        self.index.acknowledge(record.slot, 0)
        return True

    def bring(self, records: Sequence[Record]) -> dict[bytes, Record]:
        """Bring records into host memory; by id those that are there now, with their slots."""
        started = {}
        for record in records:
            if (taken := self._start(record)) is not None:
                self.index.lease(taken.slot)  # so that the next one does not push it out
                started[record.id] = taken
        held = {}
        deadline = time.monotonic() + self.chunks.patience_s
        for id, record in started.items():
            arrival = self.chunks.arrival(record.slot)
            if arrival is not None:
                arrival.wait(None, deadline)
            if self.chunks.parts(record.slot) is None:
                self.index.drop(record.slot)
            else:
                self.index.acknowledge(record.slot, 0)
                held[id] = record
            self.index.release(record.slot)
        self._free()
        return held

    def _start(self, record: Record) -> Record | None:
        """The record with its slot, on its way if need be; None when there is no room."""
        if record.slot in self.index:
            return record
        taken = self.index.adopt(record)
        if taken is None:
            return self.index.twin(record)
        self._free()
        self.chunks.expect(taken)
        self.chunks.fetch(taken.slot)
        return taken

    def _free(self) -> None:
        for slot in self.index.take_freed():
            self.chunks.evict(slot)
