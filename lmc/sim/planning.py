"""How much memory a share of what can be found takes, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lmc.blend.strategy import Strategy
from lmc.chunking import CHUNKERS
from lmc.chunking.fixed import Fixed
from lmc.model.shape import ModelShape, shape
from lmc.model.times import TTFTModel
from lmc.sim.batching import Batch
from lmc.sim.reach import Reach, reach
from lmc.sim.stack import Curve
from lmc.sim.sweep import store_sweep, sweep
from lmc.sim.timing import serve
from lmc.sim.trace import Request, accesses
from lmc.sizes import gib

if TYPE_CHECKING:
    import pandas

# Of vLLM's own cache: tokens of a block.
BLOCK = 16
BOUND = "belady"  # for a prefix cache alone
TARGETS = (0.5, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True, eq=False)
class Plan:
    """What memory brings on one trace.

    reach: the curves, by bytes. target: the share of what can be found that was asked for.
    targets: a row a share of it: `share`, and of both ways of reuse `*_bytes` and `*_rate`.
    policies: hit rates of other policies with the memory that LRU needs for the target.
    tiers: which share each tier of a layout serves. ttft_s: percentiles with nothing kept, and with
    the memory for the target. times: of which model and machine they are, if there are any.
    """

    reach: Reach
    target: float
    model: str
    requests: int
    targets: list[dict[str, Any]]
    policies: list[dict[str, Any]]
    tiers: list[dict[str, Any]]
    ttft_s: list[dict[str, Any]]
    times: str

    def frame(self, part: str = "targets") -> pandas.DataFrame:
        """One of targets, policies, tiers and ttft_s as a table; needs pandas."""
        import pandas

        return pandas.DataFrame(getattr(self, part))

    def sentence(self) -> str:
        """What it comes to."""
        row = next(r for r in self.targets if r["share"] == self.target)
        prefix = self.reach.prefix.infinite
        text = f"A prefix cache can find {prefix:.1%} of the prompt tokens"
        if self.reach.engine:
            text = (
                f"The engine's own cache finds {self.reach.engine:.1%} of the prompt tokens. "
                f"Beyond it a prefix cache can find {prefix:.1%}"
            )
        if prefix:
            text += f"; for {self.target:.0%} of that it needs {gib(row['prefix_bytes'])}"
        text += "."
        if self.reach.anywhere is None:
            return f"{text} The trace has block ids alone, in which moved reuse does not show."
        text += (
            f" A store that finds chunks anywhere can find {self.reach.anywhere.infinite:.1%}, "
            f"{100 * self.reach.more:+.1f} points, {self.reach.moved:.1%} of it moved; for "
            f"{self.target:.0%} of that it needs "
            f"{gib(row['anywhere_bytes'])}"
        )
        if row["prefix_rate"]:
            text += (
                f", and what the prefix cache has at {self.target:.0%} it has from "
                f"{gib(row['same_bytes'])} on"
            )
        return f"{text}."


def plan(
    requests: Sequence[Request],
    *,
    target: float = 0.8,
    model: str | ModelShape = "llama-3.1-8b",
    dtype: str | None = None,
    chunker: Mapping[str, Any] | str = "cdc:64",
    spans: bool = False,
    policies: Sequence[str] = (),
    tiers: Sequence[int] = (),
    times: TTFTModel | None = None,
    servers: int = 1,
    rate_scale: float = 1.0,
    batch: Batch | None = None,
    engine_bytes: int = 0,
    blend: Strategy | Mapping[str, Any] | str = "epic",
) -> Plan:
    """Plan for a trace.

    Args:
        requests: with block ids, or with token ids, in which moved reuse shows too.
        target: share of what can be found, above 0 and at most 1.
        model: a known name, a config, or its sizes; dtype: of its KV, default its own.
        chunker: cuts what the store looks up anywhere; spans: segments are chunks as well. The
            prefix cache has blocks of `BLOCK` tokens, or the trace's own.
        policies: beside LRU; `BOUND` for the prefix cache alone.
        tiers: bytes of each, the first asked first, where what one evicts goes to the next.
        times: of one request, for the times to first token at the target and with nothing kept.
        engine_bytes: of vLLM's own cache, in front of what is planned for; the rates are then what
            is found beyond it. Policies and times do not know of it.
        servers, rate_scale, batch: as in `lmc.sim.timing.serve`.
        blend: as in `lmc.sim.store.replay_store`.

    Raises:
        ValueError: a target outside (0, 1], an engine's cache together with policies or times, a
            trace in which nothing can be found again, or as the
            parts that it calls.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target: got {target}, want above 0% and at most 100%")
    if engine_bytes and (policies or times is not None):
        raise ValueError("engine: policies and times know of no engine's own cache")
    sizes = shape(model) if isinstance(model, str) else model
    cut = CHUNKERS.build(chunker)
    ordered = sorted(requests, key=lambda r: r.timestamp)
    texts = bool(ordered) and all(r.tokens is not None for r in ordered)
    blocks = accesses(ordered, Fixed(BLOCK))
    per_token = sizes.bytes_per_token(dtype)
    how_cut: dict[str, Any] = {"spans": spans, "engine_bytes": engine_bytes}
    found = reach(ordered, blocks, per_token, cut if texts else None, **how_cut)
    anywhere = found.anywhere.infinite if found.anywhere else 0
    if not max(found.prefix.infinite, anywhere, found.engine):
        raise ValueError("the trace repeats nothing: no memory would find anything")
    shares = sorted({*TARGETS, target})
    rows = [_needed(found, share) for share in shares]
    at = next(row for row in rows if row["share"] == target)
    lru: list[tuple[str, int]] = []
    if found.prefix.infinite:
        lru.append(("prefix", at["prefix_bytes"]))
    if found.anywhere is not None and at["anywhere_bytes"]:
        lru.append(("anywhere", at["anywhere_bytes"]))
    how: dict[str, Any] = {"model": sizes, "dtype": dtype}

    def outcomes(policy: str) -> Iterator[tuple[str, Any]]:
        for kind, capacity in lru:
            if kind == "anywhere" and policy == BOUND:
                continue  # it needs the accesses to come, which the store's planner decides on
            if kind == "prefix":
                done = sweep(blocks, [policy], [(capacity,)], unit="bytes", metric="prefix", **how)
            else:
                done = store_sweep(
                    ordered, [policy], [(capacity,)], cut, blend=blend, spans=spans,
                    exact_variants=1, **how,
                )  # fmt: skip
            yield kind, next(iter(done))

    by_policy, by_time = [], []
    for policy in dict.fromkeys(policies):
        by_policy += [
            {"policy": policy, "reuse": kind, "bytes": o.capacities[0], "rate": o.hit_rate}
            for kind, o in outcomes(policy)
        ]
    load: dict[str, Any] = {"servers": servers, "rate_scale": rate_scale, "batch": batch}
    if times is not None:
        for kind, o in [("none", None), *outcomes("lru")]:
            served = serve(ordered, o, times, **load)
            capacity = int(o.capacities[0]) if o else 0
            by_time.append({"reuse": kind, "bytes": capacity, **served.row()["ttft_s"]})
    name = model if isinstance(model, str) else "given sizes"
    by_tier = _by_tier(found, tiers)
    origin = times.origin if times is not None else ""
    return Plan(found, target, name, len(ordered), rows, by_policy, by_tier, by_time, origin)


def _needed(found: Reach, share: float) -> dict[str, Any]:
    """Bytes for a share of what each way of reuse can find, and the hit rates there.

    same_bytes: from which on the store finds as much as the prefix cache at that share.
    """

    def of(curve: Curve) -> tuple[int, float]:
        capacity = curve.capacity_for(share * curve.infinite)
        return capacity, float(curve.at([capacity])[0]) if capacity else 0.0

    row: dict[str, Any] = {"share": share}
    row["prefix_bytes"], row["prefix_rate"] = of(found.prefix)
    if found.anywhere is None or found.exact is None:
        return row
    row["anywhere_bytes"], row["anywhere_rate"] = of(found.anywhere)
    row["exact_rate"] = float(found.exact.at([row["anywhere_bytes"]])[0])
    row["moved_rate"] = row["anywhere_rate"] - row["exact_rate"]
    same = min(row["prefix_rate"], found.anywhere.infinite)
    row["same_bytes"] = found.anywhere.capacity_for(same)
    return row


def _by_tier(found: Reach, tiers: Sequence[int]) -> list[dict[str, Any]]:
    """Which share of all tokens each tier serves.

    LRU over tiers that take what the one before evicts is LRU of their sum, and each has the part
    of the recency stack behind those before it.
    """
    edges = np.cumsum([0, *tiers])
    rows = []
    for i, size in enumerate(tiers):
        row: dict[str, Any] = {"tier": i + 1, "bytes": int(size)}
        for name, curve in (("prefix", found.prefix), ("anywhere", found.anywhere)):
            if curve is not None:
                low, high = curve.at(edges[i : i + 2])
                row[f"{name}_rate"] = float(high - low)
        rows.append(row)
    return rows
