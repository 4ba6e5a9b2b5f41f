"""Chunks of one Hugging Face model in memory: what a prompt leaves, and what another finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from lmc.blend.dense import Attended, Dense, alone
from lmc.blend.encoding import Context
from lmc.blend.plan import Plan, make_plan
from lmc.blend.strategy import Strategy
from lmc.chunking.pieces import Piece, chunk_key
from lmc.chunking.prompt import join
from lmc.connectors.hf.model import HFModel
from lmc.model.identity import first_token
from lmc.model.layers import Layer
from lmc.store import Record, Store
from lmc.store.directory import Answers
from lmc.store.lookup import Found
from lmc.store.record import ContextPolicy

QUERIES = 256  # rows whose attention is looked at together, so that it fits into memory


class HFStore:
    """Index and bytes, as a serving engine's worker and scheduler have them, in one object.

    Args:
        model: whose KV it holds.
        memory_bytes: how much of it in host memory.
        tiers: places behind host memory, as `Store` takes them. With any, spans are cut as serving
            engines cut them, so that both find what the other has stored; without, each is one
            chunk, as papers have it.
        policy: what a chunk that is moved may have been computed behind, as an engine's `context`.

    Raises:
        ValueError, OSError: as `Store`.
    """

    def __init__(
        self,
        model: HFModel,
        memory_bytes: int = 4 << 30,
        tiers: Sequence[Mapping[str, Any] | str] = (),
        policy: ContextPolicy = "any",
    ) -> None:
        self.model = model
        layout = model.layout
        # What is kept in memory alone is this model's alone; what outlives it must say which.
        self.namespace = model.namespace() if tiers else b"hf"
        self._whole = not tiers
        self.store = Store(
            layout,
            self.namespace,
            memory_bytes=memory_bytes,
            tiers=tiers,
            context=policy,
            begins=first_token(model.model.config.get_text_config()),
            cost=model.shape.cost,
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
        pieces = self.store.pieces(ids, spans, whole=self._whole)
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
        pieces = self.store.pieces(ids, spans, whole=self._whole)
        plan = self._brought(ids, pieces, strategy)
        if not isinstance(strategy, Dense):
            return plan
        keys = [(p.end, chunk_key(self.namespace, ids[p.start : p.end])) for p in pieces]
        return strategy.replan(plan, _Chunks(self, keys))

    def attended(self, record: Record) -> Attended:
        """Where the tokens of a record looked when its KV was computed."""
        return self._attended.get(record.slot) or alone(record.T)

    def variants(self, found: Found) -> list[Record]:
        """All records that may serve what was found; of equals the plan's own comes first."""
        record = found.record
        known = self.store.index.variants(self.namespace, record.tokens)
        return [record, *(r for r in known if r != record)]

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
        nothing: list[Answers] = []
        asked = self.store.directory.ask(self.namespace, ids, pieces)
        asked.wait(asked.deadline)
        for tiers in (asked.answers, nothing):
            while True:
                plan = make_plan(
                    ids, pieces, index, self.namespace, strategy,
                    L=self.model.L, decline=False, tiers=tiers,
                    context=self.store.context, begins=self.store.begins,
                )  # fmt: skip
                behind = {s.record.id: s.record for s in plan.found if s.record.slot < 0}
                if not behind:
                    return plan
                held = self.store.bring(list(behind.values()))
                if len(held) < len(behind):
                    break  # no room, or damaged: what memory has must do
        raise AssertionError("a plan out of memory alone has nothing to bring")


@dataclass(frozen=True)
class _Chunks:
    """What a dense strategy may know of a request's chunks."""

    store: HFStore
    keys: Sequence[tuple[int, bytes]]  # of the request's chunks: where each ends, and its key

    def before(self, position: int) -> list[bytes]:
        return [key for end, key in self.keys if end <= position]

    def variants(self, found: Found) -> list[Record]:
        return self.store.variants(found)

    def attended(self, record: Record) -> Attended:
        return self.store.attended(record)


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
        self,
        rows: np.ndarray,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        layer: Layer,
    ) -> None:
        keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0).transpose(1, 2)
        T = keys.shape[2]
        position = torch.arange(T)
        for i in range(0, len(rows), QUERIES):
            some = rows[i : i + QUERIES]
            at, first = torch.from_numpy(some), torch.from_numpy(layer.first_key(some))
            logits = (query[0, :, i : i + QUERIES] @ keys).float() * scale
            unseen = (position > at[:, None]) | (position < first[:, None])
            weights = logits.masked_fill_(unseen.to(logits.device), -torch.inf).softmax(-1).mean(0)
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
