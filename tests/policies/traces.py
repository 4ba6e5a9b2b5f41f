"""Traces of bare keys."""

from __future__ import annotations

import numpy as np

from lmc.sim.trace import Accesses


def trace(keys: np.ndarray) -> Accesses:
    """One access a request, a second apart."""
    n = len(keys)
    _, numbered = np.unique(keys, return_inverse=True)
    ones = np.ones(n, dtype=np.int64)
    return Accesses(
        keys=numbered.astype(np.int64),
        tokens=ones,
        offsets=np.arange(n + 1),
        timestamps=np.arange(n, dtype=np.float64),
        input_tokens=ones,
        output_tokens=ones,
        block_tokens=1,
    )
