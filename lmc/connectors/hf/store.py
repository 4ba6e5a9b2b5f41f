"""Chunks of one Hugging Face model in memory: what a prompt leaves, and what another finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch

from lmc.blend.ape import Ape
from lmc.blend.cachecraft import Attended, CacheCraft, alone
from lmc.blend.encoding import Context
from lmc.blend.plan import Plan, Segment, make_plan
from lmc.blend.strategy import Strategy
from lmc.chunking.pieces import Piece, chunk_key
from lmc.chunking.prompt import join
from lmc.connectors.hf.model import HFModel
from lmc.model.layout import KVLayout
from lmc.store import Record, Store

QUERIES = 256  # rows whose attention is looked at together, so that it fits into memory


class HFStore:
    """Index and bytes, as a serving engine's worker and scheduler have them, in one object.

    Args:
        model: whose KV it holds.
        memory_bytes: how much of it in host memory.
        tiers: places behind host memory, as `Store` takes them.

    Raises:
        ValueError, OSError: as `Store`.
    """

    def __init__(
        self,
        model: HFModel,
        memory_bytes: int = 4 << 30,
        tiers: Sequence[Mapping[str, Any] | str] = (),
    ) -> None:
        self.model = model
        shape = model.shape
        layout = KVLayout(model.L, shape.G, shape.D, str(model.dtype).removeprefix("torch."))
        # What is kept in memory alone is this model's alone; what outlives it must say which.
        self.namespace = model.fingerprint() if tiers else b"hf"
        self.store = Store(
            layout,
            self.namespace,
            memory_bytes=memory_bytes,
            tiers=tiers,
            cost=shape.cost,
            label=f"{model.name} {layout.dtype}",
        )
        self._attended: dict[int, Attended] = {}  # by slot, of chunks that had others in front

    def add(self, tokens: Sequence[int], spans: Sequence[tuple[int, int]], system: int = 0) -> None:
        """Compute a prompt in full, and keep each span of it as a chunk in that context.

        Args:
            tokens: `[T]`. spans: where its chunks are.
            system: how many tokens in front stand before every chunk alike; see `CacheCraft`.
        """
        ids = np.asarray(tokens, np.int64)
        pieces = self.store.pieces(ids, spans)
        kept = self.store.make_room(ids, pieces)
        if not kept:
            return
        chunks = [piece for piece in pieces if piece.start >= system]
        behind = [(p, record) for p, record in kept if chunks and p.start > chunks[0].start]
        looks = _Looks(len(ids), chunks) if behind else None
        pages = self.model.prefill(ids, watch=looks).pages
        for piece, record in behind:
            assert looks is not None
            self._attended[record.slot] = looks.of(ids, piece, self.model.L, self.namespace)
        for piece, record in kept:
            self.store.fill(record, pages.rows(piece.start, piece.end))
        self._attended = {k: v for k, v in self._attended.items() if k in self.store.index}

    def add_chunks(
        self, context: Context, system: Sequence[int], chunks: Sequence[Sequence[int]]
    ) -> None:
        """Keep a system prompt and chunks, encoded as a context policy says.

        `isolated`: each alone. `anchored`: each behind the system prompt and nothing else.
        `first_seen`: in a prompt that had them all, in the opposite order.

        Raises:
            ValueError: an unknown policy.
        """
        if context not in get_args(Context):
            raise ValueError(f"context: got {context!r}, valid: {', '.join(get_args(Context))}")
        if system:
            self.add(system, [(0, len(system))])
        if context == "first_seen":
            parts = [system, *reversed(chunks)] if system else list(reversed(chunks))
            whole = join(parts)
            self.add(whole.token_ids, whole.spans, system=len(system))
            return
        for chunk in chunks:
            if context == "anchored" and system:
                behind = join([system, chunk])
                self.add(behind.token_ids, behind.spans, system=len(system))
            else:
                self.add(chunk, [(0, len(chunk))])

    def plan(
        self, tokens: Sequence[int], spans: Sequence[tuple[int, int]], strategy: Strategy
    ) -> Plan:
        """What becomes of each token of a prompt; reuse is never declined for its gain."""
        ids = np.asarray(tokens, np.int64)
        pieces = self.store.pieces(ids, spans)
        plan = self._brought(ids, pieces, strategy)
        if isinstance(strategy, CacheCraft):
            return self._fixed(plan, strategy, ids, pieces)
        return _alike(plan) if isinstance(strategy, Ape) else plan

    def chunk(self, slot: int) -> torch.Tensor:
        """The chunk buffer `[L, 2, T, G, D]` of a record."""
        parts = self.store.chunks.parts(slot)
        assert parts is not None, f"slot {slot} is in the index and not in memory"
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def close(self) -> None:
        """Let go of memory and tiers; what these hold stays."""
        self.store.close()

    def _brought(self, ids: np.ndarray, pieces: Sequence[Piece], strategy: Strategy) -> Plan:
        """A plan whose chunks are all in host memory."""
        index = self.store.index
        nothing: list[Any] = []
        for tiers in (self.store.tiers, nothing):
            while True:
                plan = make_plan(
                    ids, pieces, index, self.namespace, strategy,
                    L=self.model.L, decline=False, tiers=tiers,
                )  # fmt: skip
                behind = {s.record.id: s.record for s in plan.segments if s.record.slot < 0}
                if not behind:
                    return plan
                held = self.store.bring(list(behind.values()))
                if len(held) < len(behind):
                    break  # no room, or damaged: what memory has must do
        raise AssertionError("a plan out of memory alone has nothing to bring")

    def _fixed(
        self, plan: Plan, strategy: CacheCraft, ids: np.ndarray, pieces: Sequence[Piece]
    ) -> Plan:
        """The plan with the variant of each moved chunk that needs the fewest rows, and those."""
        keys = [(p.end, chunk_key(self.namespace, ids[p.start : p.end])) for p in pieces]
        segments, chosen = [], [np.empty(0, np.int64)]
        for segment in plan.segments:
            if segment.kind == "moved":
                before = [key for end, key in keys if end <= segment.origin]
                known = self._variants(segment)
                best = min(known, key=lambda r: strategy.overhead(self._context(r), before))
                segment = replace(segment, record=best)
                rows = segment.origin + strategy.rows_of(self._context(best), before)
                chosen.append(rows[(rows >= segment.start) & (rows < segment.end)])
            segments.append(segment)
        again = np.concatenate(chosen)
        rows = np.union1d(np.setdiff1d(plan.rows, plan.chosen), again)
        return replace(plan, segments=tuple(segments), rows=rows, chosen=again)

    def _variants(self, segment: Segment) -> list[Record]:
        """All records that may serve a segment; of equals the plan's own comes first."""
        same = [r for r in self.store.index.variants(segment.record.key)
                if r.tokens == segment.record.tokens and r != segment.record]  # fmt: skip
        return [segment.record, *same]

    def _context(self, record: Record) -> Attended:
        return self._attended.get(record.slot) or alone(record.T)


class _Looks:
    """The attention that each token of a prompt pays each of its chunks.

    Args:
        T: tokens of the prompt. chunks: ascending.
    """

    def __init__(self, T: int, chunks: Sequence[Piece]) -> None:
        self._chunks = chunks
        self._paid = torch.zeros(T, len(chunks))
        self._member = torch.zeros(T, len(chunks))
        for i, piece in enumerate(chunks):
            self._member[piece.start : piece.end, i] = 1

    def __call__(
        self, rows: np.ndarray, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> None:
        keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0).transpose(1, 2)
        T = keys.shape[2]
        for i in range(0, len(rows), QUERIES):
            at = torch.from_numpy(rows[i : i + QUERIES])
            logits = (query[0, :, i : i + QUERIES] @ keys).float() * scale
            future = torch.arange(T) > at[:, None]
            weights = logits.masked_fill_(future.to(logits.device), -torch.inf).softmax(-1).mean(0)
            self._paid[at] += weights.cpu() @ self._member[:T]

    def of(self, ids: np.ndarray, piece: Piece, L: int, namespace: bytes) -> Attended:
        """What the tokens of one chunk paid, mean over L layers."""
        i = self._chunks.index(piece)
        paid, before = self._paid[piece.start : piece.end] / L, self._chunks[:i]
        return Attended(
            tokens=paid[:, :i].sum(1).numpy(),
            intra=float(paid[:, i].sum()),
            before=tuple(chunk_key(namespace, ids[p.start : p.end]) for p in before),
            inter=tuple(paid[:, :i].sum(0).tolist()),
            lengths=tuple(p.end - p.start for p in before),
        )


def _alike(plan: Plan) -> Plan:
    """The plan with the text behind the system prompt moved by nothing, not exact.

    APE encodes all texts at one place, so the first of them is no other than the rest.
    """
    exact = [s for s in plan.segments if s.kind == "exact" and s.record.origin == "anchored"]
    if not exact or not plan.moved:
        return plan
    segments = tuple(replace(s, kind="moved") if s in exact else s for s in plan.segments)
    moved = sorted([*plan.moved, *((s.start, s.end) for s in exact)])
    return replace(plan, segments=segments, moved=tuple(moved), first_moved=moved[0][0])
