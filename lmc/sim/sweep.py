"""Hit rates of a trace for many policies and capacities, and the work that is left to compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lmc.blend.strategy import Strategy
from lmc.chunking import Chunker
from lmc.model.shape import ModelShape
from lmc.sim.replay import MISS, Replay, Write, prefix_run, replay
from lmc.sim.stack import Curve, ShardsCurve, hit_curve, prefix_distances, shards, stack_distances
from lmc.sim.store import replay_store
from lmc.sim.trace import Accesses, Request
from lmc.sizes import scaled

SESSIONS = 20  # that are named among those which pushed others out
Unit = Literal["blocks", "tokens", "bytes"]
Metric = Literal["object", "prefix"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One policy at one capacity.

    capacities: of the tiers, in `unit`; `inf` for one that forgets nothing.
    accesses, hits: blocks for the metric object, tokens for the others.
    tier_hits: hits by the tier that served them.
    written: sum of the sizes written to each tier, in `unit`.
    rows, pairs: [R] rows that each request computes, and the (row, key) pairs these attend to.
    loaded: [R, tiers] tokens that it loads.
    blends: [R] whether rows among reused tokens are computed.
    shares: further shares of all accesses.
    causes: of what was not found, or computed again all the same: cause -> accesses, as
        `lmc.store.causes.CAUSES` has them; None where they are not told apart.
    evicted_by: session -> tokens asked for in vain that had given way to what it stored, most
        first, and `own` those that it asked for itself; None where that is not told apart.
    """

    policy: str
    capacities: tuple[float, ...]
    unit: str
    metric: str
    accesses: int
    hits: int
    tier_hits: tuple[int, ...]
    written: tuple[int, ...]
    rows: np.ndarray
    pairs: np.ndarray
    loaded: np.ndarray
    blends: np.ndarray
    shares: Mapping[str, float]
    causes: Mapping[str, int] | None = None
    evicted_by: Mapping[str, int] | None = None
    own: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits over accesses."""
        return self.hits / self.accesses if self.accesses else 0.0

    def row(self) -> dict[str, Any]:
        """The outcome as plain values; one tier's capacity is a number, several are a list."""
        values = [c if math.isinf(c) else int(c) for c in self.capacities]
        plain = ["inf" if math.isinf(c) else c for c in values]
        row: dict[str, Any] = {
            "policy": self.policy,
            "capacity": plain[0] if len(plain) == 1 else plain,
            "unit": self.unit,
            "metric": self.metric,
            "accesses": self.accesses,
            "hits": self.hits,
            "hit_rate": self.hit_rate,
            **self.shares,
        }
        if self.causes is not None:
            row["causes"] = dict(self.causes)
        if self.evicted_by:
            total, most = sum(self.evicted_by.values()), [*self.evicted_by.items()][:SESSIONS]
            row["evicted_by"] = {"tokens": total, "own": self.own, "sessions": dict(most)}
            row["evicted_by"]["sessions_in_all"] = len(self.evicted_by)
        if len(plain) > 1:
            row["tiers"] = [
                {"capacity": c, "hits": h, "written": w}
                for c, h, w in zip(plain, self.tier_hits, self.written, strict=True)
            ]
        return row


def sweep(
    accesses: Accesses,
    policies: Sequence[str],
    capacities: Sequence[Sequence[float]],
    *,
    unit: Unit = "blocks",
    metric: Metric = "object",
    model: ModelShape,
    dtype: str | None = None,
    write: Write = "through",
) -> Iterator[Outcome]:
    """Replay a trace of blocks under every policy and capacity.

    Args:
        policies: names, or names and fields, as `POLICIES.parse` reads them.
        capacities: of the tiers of each layout; `inf` forgets nothing.
        metric: `object` counts accesses that any tier held. `prefix` counts tokens in the run of
            hits from the start of each request, over all input tokens; blocks that are not full
            are neither looked up nor kept, as in engines.
        model, dtype: say the bytes of a block, and what computing it again costs.

    Raises:
        ValueError: no accesses, a wrong policy, capacity or dtype.
    """
    accesses, sizes = _sized(accesses, unit, metric, model, dtype)
    costs = block_costs(accesses, model)
    everything = int(sizes.sum())
    for policy in policies:
        for layout in capacities:
            whole = [everything if math.isinf(c) else int(c) for c in layout]
            done = replay(accesses, whole, policy, sizes=sizes, costs=costs, write=write)
            yield _outcome(policy, layout, unit, metric, accesses, done)


def lru_rows(
    accesses: Accesses,
    *,
    unit: Unit = "blocks",
    metric: Metric = "object",
    model: ModelShape,
    dtype: str | None = None,
    sample: float | None = None,
) -> tuple[Curve, list[dict[str, Any]]]:
    """LRU at all capacities from one pass: its curve, and rows at some of them and at `inf`.

    Shown are 1, 2, 5, 10, ..., of bytes the powers of 2.

    Args:
        sample: share of the keys that SHARDS looks at; the rows then state the standard error of
            the hit rate, for the metric object alone.

    Raises ValueError as `sweep`, and for a sample with the metric prefix.
    """
    accesses, sizes = _sized(accesses, unit, metric, model, dtype)
    total = int(accesses.input_tokens.sum()) if metric == "prefix" else len(accesses.keys)
    if sample is not None:
        if metric == "prefix":
            raise ValueError("sample: a run of hits needs every block, so prefix has no sample")
        curve: Curve = shards(accesses.keys, sizes, sample)
    elif metric == "prefix":
        curve = prefix_curve(accesses, sizes)
    else:
        curve = hit_curve(stack_distances(accesses.keys, sizes))
    rows = curve_rows(curve, total, int(sizes.min()), unit=unit, metric=metric)
    if isinstance(curve, ShardsCurve):
        for row in rows:
            row["error"] = float(curve.error_at([_within(curve, row["capacity"])])[0])
    return curve, rows


def curve_rows(
    curve: Curve, total: int, smallest: int, *, unit: Unit, metric: str
) -> list[dict[str, Any]]:
    """A curve at some capacities from `smallest` on, and at `inf`: rows as of an `Outcome`.

    total: what the hit rate is a share of.
    """
    top = int(curve.capacity[-1]) if len(curve.capacity) else 1
    steps = [m * 10**e for e in range(len(str(top))) for m in (1, 2, 5)]
    if unit == "bytes":
        steps = [1 << e for e in range(top.bit_length() + 2)]
    shown = [c for c in steps if c >= smallest and c < 5 * top]
    rates = [float(curve.at([_within(curve, c)])[0]) for c in [*shown, "inf"]]
    return [
        {
            "policy": "lru",
            "capacity": capacity,
            "unit": unit,
            "metric": metric,
            "accesses": total,
            "hits": round(rate * total),
            "hit_rate": rate,
        }
        for capacity, rate in zip([*shown, "inf"], rates, strict=True)
    ]


def _within(curve: Curve, capacity: int | str) -> int:
    """A capacity at which the curve is as it is at this one, and which is finite."""
    top = int(curve.capacity[-1]) if len(curve.capacity) else 1
    return top if isinstance(capacity, str) else min(capacity, top)


def prefix_curve(accesses: Accesses, sizes: np.ndarray) -> Curve:
    """Tokens in the run of hits from the start of each prompt, of all prompt tokens, under LRU.

    sizes: [A] of the accesses, in any unit.
    """
    distances = prefix_distances(stack_distances(accesses.keys, sizes), accesses.offsets)
    total = float(accesses.input_tokens.sum())
    return hit_curve(distances, accesses.tokens.astype(float), total)


def store_sweep(
    requests: Sequence[Request],
    policies: Sequence[str],
    capacities: Sequence[Sequence[float]],
    chunker: Chunker,
    *,
    model: ModelShape,
    dtype: str | None = None,
    blend: Strategy | Mapping[str, Any] | str = "epic",
    exact_variants: int | None = None,
    spans: bool = False,
) -> Iterator[Outcome]:
    """Replay a trace of text or token ids through lmc's own store, for the metric store.

    Arguments are those of `lmc.sim.store.replay_store`, with policies and capacities, in bytes, as
    in `sweep`. Shares: exact, moved, recomputed (found, and computed again) and computed rows.

    Raises ValueError also for several tiers, which the store does not have.
    """
    everything = sum(r.input_tokens for r in requests) * model.bytes_per_token(dtype)
    if any(len(layout) > 1 for layout in capacities):
        raise ValueError("capacity: got tiers, but lmc's store is one tier of host memory")
    for policy in policies:
        for (capacity,) in capacities:
            done = replay_store(
                requests,
                chunker,
                everything if math.isinf(capacity) else int(capacity),
                model,
                dtype=dtype,
                policy=policy,
                blend=blend,
                exact_variants=exact_variants,
                spans=spans,
            )
            total = max(1, done.prompt_tokens)
            shares = {
                k: int(done.tokens[k].sum()) / total for k in ("exact", "moved", "recomputed")
            }
            yield Outcome(
                policy=policy,
                capacities=(capacity,),
                unit="bytes",
                metric="store",
                accesses=total,
                hits=done.found,
                tier_hits=(done.found,),
                written=(done.counts["put"],),
                rows=done.rows,
                pairs=done.pairs,
                loaded=done.loaded[:, None],
                blends=done.blends,
                shares=shares | {"computed": int(done.rows.sum()) / total},
                causes=done.causes,
                evicted_by=done.evicted_by,
                own=done.own,
            )


def block_costs(accesses: Accesses, model: ModelShape) -> np.ndarray:
    """[A] FLOPs of prefilling each block at its position."""
    start = accesses.starts()
    return np.asarray(model.cost.flops(start, start + accesses.tokens))


def parse_capacity(text: str) -> tuple[float, ...]:
    """`1000`, `64GiB`, `inf`, or the tiers of a layout with + between them: `1k+50k`.

    Raises ValueError for anything else, or for less than 1.
    """
    return tuple(_capacity(part.strip().lower(), text) for part in text.split("+"))


def _capacity(part: str, text: str) -> float:
    try:
        value = math.inf if part == "inf" else scaled(part)
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(
            f"capacity: got {text!r}, want a number of at least 1, such as 1000, 64GiB or inf, "
            "and + between tiers"
        )
    return value


def _sized(
    accesses: Accesses, unit: Unit, metric: Metric, model: ModelShape, dtype: str | None
) -> tuple[Accesses, np.ndarray]:
    """What the metric looks up, and the size of each access in the unit."""
    if metric == "prefix" and accesses.block_tokens:
        accesses = accesses.full_blocks()
    if not len(accesses.keys):
        raise ValueError("the trace looks up no blocks (or none that is full)")
    per_token = {"blocks": 0, "tokens": 1, "bytes": model.bytes_per_token(dtype)}[unit]
    return accesses, accesses.tokens * per_token if per_token else np.ones_like(accesses.tokens)


def _outcome(
    policy: str,
    layout: Sequence[float],
    unit: str,
    metric: str,
    accesses: Accesses,
    done: Replay,
) -> Outcome:
    hit = done.tier != MISS
    run = prefix_run(hit, accesses)
    request = np.repeat(np.arange(accesses.requests), np.diff(accesses.offsets))
    loaded = np.zeros((accesses.requests, len(layout)), dtype=np.int64)
    np.add.at(loaded, (request[run], done.tier[run]), accesses.tokens[run])
    T = accesses.input_tokens
    # The last token is computed in any case: its hidden state gives the first new one.
    rows = np.maximum(T - loaded.sum(axis=1), 1)
    causes = None
    if metric == "prefix":
        total, by_tier = int(T.sum()), loaded.sum(axis=0)
    else:
        total, by_tier = len(hit), np.bincount(done.tier[hit], minlength=len(layout))
        # A first access can be no hit; any other that is none was held once, or refused.
        causes = {
            "never_seen": accesses.unique,
            "evicted": total - int(hit.sum()) - accesses.unique,
        }
    return Outcome(
        policy=policy,
        capacities=tuple(layout),
        unit=unit,
        metric=metric,
        accesses=total,
        hits=int(by_tier.sum()),
        tier_hits=tuple(by_tier.tolist()),
        written=tuple(done.written),
        rows=rows,
        pairs=rows * (2 * T - rows + 1) // 2,
        loaded=loaded,
        blends=np.zeros(len(rows), dtype=bool),
        shares={},
        causes=causes,
    )
