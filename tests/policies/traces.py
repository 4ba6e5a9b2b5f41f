"""Traces of bare keys, and what is hit in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lmc.sim.replay import MISS, replay
from lmc.sim.trace import Accesses


def trace(keys: np.ndarray, per_request: int = 1) -> Accesses:
    """Requests of `per_request` accesses, a second apart."""
    n = len(keys)
    _, numbered = np.unique(keys, return_inverse=True)
    offsets = np.append(np.arange(0, n, per_request), n)
    requests = len(offsets) - 1
    lengths = np.diff(offsets)
    return Accesses(
        keys=numbered.astype(np.int64),
        tokens=np.ones(n, dtype=np.int64),
        offsets=offsets,
        timestamps=np.arange(requests, dtype=np.float64),
        input_tokens=lengths,
        output_tokens=np.ones(requests, dtype=np.int64),
        block_tokens=1,
    )


def hits(keys: Iterable[int], capacity: int, policy: Any, per_request: int = 1) -> list[bool]:
    """Of each access to `keys`, whether it hits."""
    made = trace(np.array(list(keys), dtype=np.int64), per_request)
    return (replay(made, [capacity], policy).tier != MISS).tolist()
