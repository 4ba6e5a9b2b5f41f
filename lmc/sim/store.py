"""Replay of a text trace through the store's own index and planner, which hold no bytes here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmc.blend import STRATEGIES
from lmc.blend.plan import KINDS, make_plan
from lmc.blend.strategy import Strategy
from lmc.blend.tokenmap import Circumstances, MapRun, token_map, tokens_by
from lmc.chunking import Chunker
from lmc.chunking.pieces import Piece, split
from lmc.model.shape import ModelShape
from lmc.sim.trace import Request
from lmc.store import Index
from lmc.store.history import History
from lmc.store.keep import keep
from lmc.store.lookup import Known
from lmc.store.record import Record, variants_kept


@dataclass(frozen=True, eq=False)
class StoreReplay:
    """What the store served of each of R requests.

    tokens: kind -> [R] int64; the kinds of `lmc.blend.plan.KINDS`, which add up to the prompt.
    rows: [R] int64, rows computed. pairs: [R] int64, the (row, key) pairs these attend to.
    loaded: [R] int64, tokens read from the store.
    blends: [R] bool, whether rows among reused tokens are computed.
    counts: of the index: put, known, evicted, no_room, ...
    causes: cause -> tokens that were new or computed again; of `lmc.store.causes.CAUSES`.
    evicted_by: session -> tokens asked for in vain that had given way to what it stored, most
        first; `own` are those of them that the same session asked for.
    """

    tokens: dict[str, np.ndarray]
    rows: np.ndarray
    pairs: np.ndarray
    loaded: np.ndarray
    blends: np.ndarray
    counts: dict[str, int]
    causes: dict[str, int]
    evicted_by: dict[str, int]
    own: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return int(sum(array.sum() for array in self.tokens.values()))

    @property
    def found(self) -> int:
        """Tokens that the store held, those computed again included."""
        return self.prompt_tokens - int(self.tokens["new"].sum())


class _Evictions(History):
    """Also whose request each content gave way to.

    session: of the request that is being stored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.session = ""
        self._by: dict[int, str] = {}  # by hash: the contents of a long trace would take its length

    def note(self, record: Record, cause: str) -> None:
        super().note(record, cause)
        if cause == "evicted":
            self._by[hash(record.tokens)] = self.session

    def by(self, content: bytes) -> str | None:
        """The session that a content gave way to last, if it did."""
        return self._by.get(hash(content))


def replay_store(
    requests: Iterable[Request],
    chunker: Chunker,
    capacity: int,
    model: ModelShape,
    *,
    dtype: str | None = None,
    policy: Mapping[str, Any] | str = "lru",
    blend: Strategy | Mapping[str, Any] | str = "epic",
    exact_variants: int | None = None,
    spans: bool = False,
) -> StoreReplay:
    """Plan every request, in order of arrival, as the connector would, and store its chunks.

    The engine's own prefix cache is left out: what it would hold is found in the store. A
    request is whole before the next begins, and its output is not stored, for its token ids are
    not in the trace.

    Args:
        requests: with token ids.
        capacity: bytes.
        model: says the bytes of a token's KV, and what computing it again costs.
        dtype: of the KV, default the model's own.
        exact_variants: exact contexts kept of one content; by default as
            `lmc.store.record.variants_kept` has it.
        spans: the segments of a request are chunks.

    Raises:
        ValueError: a request without token ids, a wrong policy, blend or dtype, or a capacity
            below one token.
    """
    strategy = blend if isinstance(blend, Strategy) else STRATEGIES.build(blend)
    bytes_per_token = model.bytes_per_token(dtype)
    if capacity < bytes_per_token:
        raise ValueError(
            f"capacity: got {capacity} bytes, want at least {bytes_per_token}, a token"
        )
    now = 0.0
    index = Index(
        capacity,
        policy=policy,
        cost=model.cost,
        clock=lambda: now,
        exact_variants=variants_kept(exact_variants, strategy.moves),
        history=(history := _Evictions()),
    )
    about = Circumstances(unmoved=None if strategy.moves else "strategy")
    causes: Counter[str] = Counter()
    evicted_by: Counter[str] = Counter()
    own = 0
    found, rows, pairs, loaded, blends = [], [], [], [], []
    for r in sorted(requests, key=lambda r: r.timestamp):
        if r.tokens is None:
            raise ValueError(
                "the trace has no token ids, so the store cannot be replayed on it; "
                "block ids can be, with the metrics object and prefix"
            )
        now = r.timestamp
        marked = [(start, end) for _, start, end in r.segments] if spans else None
        pieces = split(r.tokens, chunker, marked)
        plan = make_plan(r.tokens, pieces, index, b"", strategy, L=model.L)
        runs = token_map(plan, r.tokens, pieces, Known(index, b""), history, about)
        causes.update(tokens_by(runs, "cause"))
        for session, tokens in _gave_way(r.tokens, pieces, runs, history):
            evicted_by[session] += tokens
            own += tokens if session == r.session else 0
        history.session = r.session
        for slot in {s.record.slot for s in plan.found}:
            index.touch(slot)
        kept = keep(index, b"", r.tokens, pieces, plan.first_moved, bytes_per_token, marked or ())
        for _, record in kept:
            index.acknowledge(record.slot, 0)
        index.take_freed()
        computed = plan.computed_runs()
        found.append(plan.kinds())
        rows.append(round(sum(share * (end - start) for start, end, share in computed)))
        pairs.append(round(sum(share * (b - a) * (b + a + 1) / 2 for a, b, share in computed)))
        loaded.append(sum(s.end - s.start for s in plan.found))
        blends.append(len(plan.rows) > 0 or plan.selective)
    return StoreReplay(
        tokens={kind: np.array([k[kind] for k in found], dtype=np.int64) for kind in KINDS},
        rows=np.array(rows, dtype=np.int64),
        pairs=np.array(pairs, dtype=np.int64),
        loaded=np.array(loaded, dtype=np.int64),
        blends=np.array(blends, dtype=bool),
        counts=dict(index.counts),
        causes=dict(causes.most_common()),
        evicted_by=dict(evicted_by.most_common()),
        own=own,
    )


def _gave_way(
    tokens: np.ndarray, pieces: Sequence[Piece], runs: Sequence[MapRun], history: _Evictions
) -> Iterator[tuple[str, int]]:
    """For each chunk of a prompt that had been evicted, the session it gave way to, and tokens."""
    gone = [run for run in runs if run.cause == "evicted"]
    at = 0
    for start, end, _ in pieces if gone else ():
        while at < len(gone) and gone[at].end <= start:
            at += 1
        if at == len(gone):
            return
        lost = min(end, gone[at].end) - max(start, gone[at].start)
        content = np.ascontiguousarray(tokens[start:end], "<i8").tobytes()
        if lost > 0 and (session := history.by(content)) is not None:
            yield session, lost
