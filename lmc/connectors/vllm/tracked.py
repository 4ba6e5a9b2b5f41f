"""One request, as the scheduler's side follows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmc.blend.plan import KINDS, Plan
from lmc.blend.tokenmap import MapRun, with_lost
from lmc.chunking.pieces import Piece
from lmc.connectors.vllm.request import RequestOptions
from lmc.model.cost import PrefillCost
from lmc.store.directory import Asked
from lmc.store.flights import Flight


@dataclass
class Waiting:
    """What others compute that a request needs, and what it computes for others.

    Attributes:
        begun: `time.monotonic()` when it asked who computes what; since: when it first did.
        over: whether it waits no more; waited: whether it ever did.
        storing: chunks of its prompt that are computed, and yet to be stored; landed: whether all
            of them are, or its prompt will not be computed.
        look: when to look next whether it must wait on.
        flight: what the tier is asked of it, or None; told: what it was told and is still so.
        ours: by name of what it computes, the tokens it computes until that is there.
        wanted: by name of what would serve, the chunk that it serves.
        contents: token ids' bytes of those chunks, by where they start.
        requests: of this engine that are waited for.
    """

    begun: float
    since: float
    over: bool = False
    waited: bool = False
    storing: int = 0
    landed: bool = False
    look: float = 0.0
    flight: Flight | None = None
    told: Flight | None = None
    ours: dict[bytes, int] = field(default_factory=dict)
    wanted: dict[bytes, Piece] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)
    requests: list[Tracked] = field(default_factory=list)


@dataclass
class Tracked:
    """A request from its arrival until its blocks are free.

    Attributes:
        request: vLLM's own.
        options: None when it is served as if lmc were not there.
        reason: why it is not blended, or None.
        refusal: why rows cannot be recomputed in this engine, or None.
        gate: why the strategy that was asked for may not move chunks, or None.
        namespace: what its KV must be compatible with, tenant included.
        scope: what a tainted chain must have in common to be found again.
        tokens, pieces: as of the latest plan; a resumed request has output tokens too.
        lookup: what the tiers behind host memory are asked about it, if there are any; states: of
            each group of layers that keep a state in place of keys.
        heard: whether the plan was made with all that they answered.
        local: tokens that vLLM held when last asked.
        plan: made for what vLLM was expected to hold.
        admitted: the plan cut to what vLLM did hold, once asked.
        seen, gone: `Index.added` and `Index.gone` when it was made, or last looked at.
        asked: `time.monotonic()` when vLLM first wanted to admit the request.
        rested: `time.monotonic()` before which it is not planned again only because more is stored.
        needs: bytes of the plan's chunks.
        held: whether they are kept from eviction: those of the slots `leased`.
        fetched: of slots that came from a tier behind host memory for this request, its name.
        fetching: `time.monotonic()` since when it waits for those, whatever becomes of them.
        blended_from: the first token whose KV is not exact, or None.
        front: blocks of the last window in front of its claim, by KV cache group, until the step.
        looks: `time.monotonic()` when to look next for what another engine hands over.
        waiting: for what others compute, once that was looked at.
        waits_since: `time.monotonic()` when it began to; flown: names of what is there by now.
        leads: names of what it computes for all.
        seen_to: chunks that end up to here have been kept, or were not to be.
        storing: slots of its chunks that were given to the workers.
        open: by group and index, blocks of a chunk that is not whole, which a window leaves behind.
        holds: whether any may be held.
        prompt_saved: whether the prompt's chunks have been given to the workers.
        handed_over: what became of a prompt that another engine is to have.
        unsaved: its KV is, or may be, of no use to others: nothing of it is stored any more.
        report: what the client is told.
        runs: the token map of its prompt, as its operator may know it; None where nobody asked.
        seconds: what lmc took for it, by name.
    """

    request: Any
    options: RequestOptions | None
    reason: str | None
    namespace: bytes = b""
    scope: bytes = b""
    refusal: str | None = None
    gate: str | None = None
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    pieces: Sequence[Piece] = ()
    lookup: Asked | None = None
    states: Sequence[Asked] = ()
    heard: bool = True
    local: int = 0
    plan: Plan | None = None
    admitted: Plan | None = None
    seen: int = 0
    gone: int = 0
    asked: float | None = None
    rested: float = 0.0
    held: bool = False
    leased: list[int] = field(default_factory=list)
    needs: int = 0
    fetched: dict[int, str] = field(default_factory=dict)
    fetching: float = 0.0
    blended_from: int | None = None
    front: list[list[int]] = field(default_factory=list)
    looks: float = 0.0
    waiting: Waiting | None = None
    waits_since: float | None = None
    flown: set[bytes] = field(default_factory=set)
    leads: list[bytes] = field(default_factory=list)
    seen_to: int = 0
    storing: list[int] = field(default_factory=list)
    open: dict[tuple[int, int], Any] = field(default_factory=dict)
    holds: bool = True
    prompt_saved: bool = False
    handed_over: str | None = None
    unsaved: bool = False
    report: dict[str, Any] | None = None
    runs: list[MapRun] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        """Whether its turn is yet to come, or to come again."""
        return self.plan is not None and not self.held and not self.request.is_finished()

    @property
    def asked_of(self) -> list[Asked]:
        """All that the tiers are asked about it."""
        return [*([] if self.lookup is None else [self.lookup]), *self.states]

    @property
    def answered(self) -> bool:
        """Whether nothing that the tiers were asked is waited for."""
        return all(asked.over for asked in self.asked_of)

    def took(self, name: str, seconds: float) -> None:
        """lmc took so long for something."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @property
    def saves(self) -> bool:
        """Whether its KV is stored."""
        return self.options is not None and self.options.save and not self.unsaved


def unblendable(request: Any) -> str | None:
    """Why this request's KV is not lmc's business, whatever its parameters say."""
    if request.prompt_embeds is not None or request.prompt_is_token_ids is not None:
        return "prompt_embeds"  # zeros stand for them among the token ids
    if request.prompt_token_ids is None or request.mm_features:
        return "multimodal"
    if request.resumable:
        return "streaming_input"
    if (request.kv_transfer_params or {}).get("do_remote_prefill"):
        return "remote_prefill"  # another connector brings its KV, and says what it is
    if request.pooling_params is not None:
        return "pooling"
    if request.skip_reading_prefix_cache:
        return "prompt_logprobs"
    return None


def recompute(tracked: Tracked, rows: np.ndarray, bytes_per_token: int, cost: PrefillCost) -> None:
    """Found rows `[M]` were computed after all; what began anew with its answer reports nothing."""
    assert tracked.admitted is not None
    tracked.admitted = tracked.admitted.recomputing(rows)
    if tracked.request.num_prompt_tokens == tracked.admitted.T:
        tracked.runs = tracked.runs and with_lost(tracked.runs, rows)
        tracked.report = report_of(tracked, bytes_per_token, cost)


def served(tracked: Tracked, bytes_per_token: int) -> Counter[str]:
    """Of the tokens that vLLM does not hold, where those come from that were found, and why others
    were not, as far as the plan knows it: by the names of the metrics' table."""
    assert tracked.report is not None
    T, local, plan = tracked.request.num_prompt_tokens, tracked.local, tracked.admitted
    if plan is None or tracked.options is None:
        return Counter({f"misses:{(tracked.reason or 'failed').split(':')[0]}": T - local})
    hits = {tier: n // bytes_per_token for tier, n in tracked.report["bytes"].items()}
    found = sum(hits.values())
    # Where no chunk may be moved, none was looked for but those that are exact.
    looked = "not_found" if plan.strategy.moves and not tracked.refusal else "not_found_exact"
    reason = (tracked.reason or "").split(":")[0]
    left = reason if reason in ("gain_below_minimum", "blending_refused") else "beyond_claim"
    counts = Counter({f"hits:{tier}": n for tier, n in hits.items()})
    counts[f"misses:{left}"] += plan.found_beyond
    counts[f"misses:{looked}"] += T - local - found - plan.found_beyond
    return +counts


def report_of(tracked: Tracked, bytes_per_token: int, cost: PrefillCost) -> dict[str, Any]:
    """What becomes of a request's prompt.

    Keys: prompt_tokens, kinds (which add up to it), compute_fraction (row-layers computed of
    all, probe and check layers included), flops_fraction, bytes by tier, strategy, reason.
    Bytes are those of all layers of what was found, where it came from: of layers with windows
    less of it goes on into pages (`lmc_transfer_bytes`, metrics).
    """
    T, local, plan = tracked.request.num_prompt_tokens, tracked.local, tracked.admitted
    loaded: Counter[str] = Counter()
    if plan is None:
        kinds = dict.fromkeys(KINDS, 0) | {"local": local, "new": T - local}
        computed = [(local, T, 1.0)]
    else:
        blended_from = T if tracked.blended_from is None else tracked.blended_from
        kinds = plan.kinds(local_blended=max(0, local - blended_from))
        computed = plan.computed_runs()
        loaded["host"] = sum(s.end - s.start for s in plan.found)
        for s in plan.found if tracked.fetched else ():
            if tier := tracked.fetched.get(s.record.slot):
                loaded[tier] += s.end - s.start
                loaded["host"] -= s.end - s.start
    return {
        "prompt_tokens": T,
        "kinds": kinds,
        "compute_fraction": sum(share * (end - start) for start, end, share in computed) / T,
        "flops_fraction": cost.fraction(computed, T),
        "bytes": {"host": 0} | {tier: n * bytes_per_token for tier, n in loaded.items()},
        "strategy": tracked.options.blend if tracked.options else None,
        "reason": tracked.reason,
    }
