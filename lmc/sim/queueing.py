"""Time to first token under load: a trace's requests queue for a few servers."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class Queue:
    """What the requests of a trace saw, R of them.

    Attributes:
        wait_s: [R] seconds from arrival until a server took the request.
        ttft_s: [R] seconds from arrival to the first token.
        offered: work that arrives per second over what the servers do in one; 1 and more is more
            than they can.
        utilisation: share of the servers' time, first arrival to last completion, that was busy.
        requests_per_s, input_tokens_per_s: completed, over the same time.
    """

    wait_s: np.ndarray
    ttft_s: np.ndarray
    offered: float
    utilisation: float
    requests_per_s: float
    input_tokens_per_s: float

    @property
    def warning(self) -> str | None:
        """Why the percentiles are no steady state, or None."""
        if self.offered < 1:
            return None
        return (
            f"unstable: {self.offered:.2f} times as much work arrives as the servers can do, so "
            "the queue grows while requests come and the percentiles describe the length of the "
            "trace, not a steady state"
        )


def simulate(
    arrivals: ArrayLike,
    prefill_s: ArrayLike,
    input_tokens: ArrayLike,
    *,
    servers: int = 1,
    rate_scale: float = 1.0,
    after_first_s: ArrayLike = 0.0,
) -> Queue:
    """Serve requests first come first served, each by the first server that is free.

    Args:
        arrivals: [R] seconds from any origin, ascending.
        prefill_s: [R] seconds that a server needs to the first token (`TTFTModel.seconds`).
        input_tokens: [R] prompt tokens.
        servers: identical ones behind one queue, each serving one request at a time.
        rate_scale: how many times faster requests come than in the trace.
        after_first_s: [R] seconds that the server is held after the first token; by default it
            only prefills.

    Raises:
        ValueError: no requests, arrays of unequal length, arrivals that descend, times below 0,
            no server or a rate that is not above 0.
    """
    prefill = np.asarray(prefill_s, np.float64)
    tokens = np.asarray(input_tokens, np.float64)
    arrival = since_first(arrivals, prefill, tokens, servers, rate_scale)
    after = np.broadcast_to(np.asarray(after_first_s, np.float64), prefill.shape)
    if not ((prefill >= 0).all() and (after >= 0).all()):
        raise ValueError(f"seconds: got {min(prefill.min(), after.min())}, want 0 or more")
    busy = prefill + after
    free = [0.0] * servers
    starts = []
    for came, needs in zip(arrival.tolist(), busy.tolist(), strict=True):
        start = max(came, free[0])
        starts.append(start)
        heapq.heapreplace(free, start + needs)
    wait = np.array(starts) - arrival
    end = max(free)
    return Queue(
        wait_s=wait,
        ttft_s=wait + prefill,
        offered=ratio(busy[:-1].sum(), servers * arrival[-1]),
        utilisation=ratio(busy.sum(), servers * end),
        requests_per_s=ratio(len(arrival), end),
        input_tokens_per_s=ratio(tokens.sum(), end),
    )


def since_first(
    arrivals: ArrayLike, work: np.ndarray, tokens: np.ndarray, servers: int, rate_scale: float
) -> np.ndarray:
    """[R] seconds from the first arrival on, so many times faster; ValueError as `simulate`."""
    arrival = np.asarray(arrivals, np.float64)
    R = len(arrival)
    if not R or work.shape != (R,) or tokens.shape != (R,):
        raise ValueError(
            f"got {R} arrivals, {work.size} times and {tokens.size} lengths; want one of each "
            "for every request, and one request at least"
        )
    if not (steps := np.diff(arrival) >= 0).all():
        i = int(np.argmin(steps)) + 1
        raise ValueError(
            f"arrivals: got {arrival[i]} after {arrival[i - 1]} (request {i}), want them ascending"
        )
    if servers < 1 or not 0 < rate_scale < math.inf:
        raise ValueError(
            f"got {servers} servers and rate_scale {rate_scale}; want at least 1, and above 0 and "
            "finite"
        )
    with np.errstate(over="ignore"):
        scaled = (arrival - arrival[0]) / rate_scale
    if not np.isfinite(scaled).all():
        raise ValueError(f"rate_scale: got {rate_scale}, at which the trace has no end")
    return scaled


def percentiles(seconds: ArrayLike) -> dict[str, float]:
    """p50, p90, p99 and mean. Raises ValueError for no values."""
    values = np.asarray(seconds, np.float64)
    if not values.size:
        raise ValueError("percentiles: got no values")
    p50, p90, p99 = (float(p) for p in np.percentile(values, [50, 90, 99]))
    return {"p50": p50, "p90": p90, "p99": p99, "mean": float(values.mean())}


def ratio(over: float, under: float) -> float:
    """`over / under`; what takes no time at all goes infinitely fast, unless it is nothing."""
    if not under:
        return float("inf") if over else 0.0
    return float(over / under)
