"""What a hit rate is worth: time to first token and throughput of a trace, under load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmc.model.times import TTFTModel, prefill_work
from lmc.sim.batching import Batch, Work, simulate_steps
from lmc.sim.queueing import Queue, percentiles, simulate
from lmc.sim.sweep import Outcome
from lmc.sim.trace import Request


@dataclass(frozen=True, eq=False)
class Timed:
    """A trace served with what one policy holds.

    queue: wait and time to first token of each request, load and throughput.
    slower: [R] whether what a request found took longer to use than computing all of it would.
    """

    queue: Queue
    slower: np.ndarray

    def row(self) -> dict[str, Any]:
        """The outcome as plain values, times in seconds."""
        return {
            "ttft_s": percentiles(self.queue.ttft_s),
            "wait_s": percentiles(self.queue.wait_s),
            "offered_load": self.queue.offered,
            "utilisation": self.queue.utilisation,
            "requests_per_s": self.queue.requests_per_s,
            "input_tokens_per_s": self.queue.input_tokens_per_s,
            "reuse_slower": float(self.slower.mean()),
        }


def serve(
    requests: Sequence[Request],
    outcome: Outcome | None,
    model: TTFTModel,
    *,
    servers: int = 1,
    rate_scale: float = 1.0,
    batch: Batch | None = None,
) -> Timed:
    """Serve requests, in order of arrival, with what `outcome` holds; None for no cache at all.

    The tiers of the outcome are the first ones of the model's.

    Args:
        servers: identical ones. rate_scale: how many times faster requests come.
        batch: of a server that serves several side by side; None for one after the other.

    Raises ValueError for a model of fewer tiers than the outcome has, and as `simulate` does.
    """
    T = np.array([max(r.input_tokens, 1) for r in requests])
    nothing = np.zeros((len(T), len(model.tiers)))
    rows, pairs = prefill_work(T, 0)
    full = seconds = model.seconds(rows, pairs, nothing)
    if outcome is not None:
        tiers = outcome.loaded.shape[1]
        if tiers > len(model.tiers):
            known = ", ".join(tier.name for tier in model.tiers) or "none"
            raise ValueError(f"got {tiers} tiers of capacity, but the time model's are: {known}")
        loaded = nothing.copy()
        loaded[:, :tiers] = outcome.loaded
        rows, pairs = outcome.rows, outcome.pairs
        seconds = model.seconds(rows, pairs, loaded, outcome.blends)
    arrivals = [r.timestamp for r in requests]
    outputs = np.array([r.output_tokens for r in requests])
    at: dict[str, Any] = {"servers": servers, "rate_scale": rate_scale}
    if batch is None:
        after = model.per_output_token_s * np.maximum(outputs - 1, 0)
        queue = simulate(arrivals, seconds, T, after_first_s=after, **at)
    else:
        extra = seconds - model.seconds(rows, pairs, nothing)
        queue = simulate_steps(arrivals, Work(rows, pairs, extra, T, outputs), model, batch, **at)
    return Timed(queue, seconds > full)
