"""Traces that several tests replay, and W-TinyLFU with the parameters of libcachesim."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from pathlib import Path

import numpy as np
import pytest

from lmc.policies import w_tinylfu
from lmc.sim.trace import Accesses, Request, accesses
from tests.policies.traces import trace


@pytest.fixture(scope="session")
def mixed() -> Accesses:
    """20,000 accesses: Zipf popularity, scans that never come back, and a loop."""
    rng = np.random.default_rng(7)
    parts, fresh = [], 1_000_000
    for _ in range(20):
        parts.append(rng.zipf(1.2, 700) % 5000)
        parts.append(np.arange(fresh, fresh + 200))
        parts.append(np.arange(10_000, 10_100))
        fresh += 200
    return trace(np.concatenate(parts))


@pytest.fixture(scope="session")
def returning() -> Accesses:
    """5,200 accesses of which many come back shortly after a small place has let them go."""
    rng = np.random.default_rng(1)
    parts = []
    for i in range(8):
        parts.append(rng.zipf(1.1, 400) % 300)
        parts.append(rng.integers(0, 120, 200))
        parts.append(np.arange(1000 + 50 * i, 1050 + 50 * i))
    return trace(np.concatenate(parts))


@pytest.fixture(scope="session")
def conversation() -> Accesses:
    """The Mooncake conversation trace, if it is at hand."""
    if not (folder := os.environ.get("LMC_DATA")):
        pytest.skip("LMC_DATA does not name the folder with mooncake_conversation.jsonl")
    requests = []
    for line in (Path(folder) / "mooncake_conversation.jsonl").read_text().splitlines():
        r = json.loads(line)
        requests.append(
            Request(
                r["timestamp"] / 1000,
                "",
                r["input_length"],
                r["output_length"],
                blocks=r["hash_ids"],
                block_tokens=512,
            )
        )
    return accesses(requests)


@pytest.fixture
def library_w_tinylfu(monkeypatch: pytest.MonkeyPatch) -> None:
    """W-TinyLFU where it differs from libcachesim 0.3.5, as its source has it.

    There newcomers enter the protected segment while it has room and probation has not; counts
    are halved after 32 uses per item; and the filter has 14.4 counters per item in all, here
    rounded to four rows of 4.
    """

    def admit(self: w_tinylfu.WTinyLfu, key: Hashable) -> None:
        size = self._window.take(key)
        protected = w_tinylfu.PROTECTED * self._main_capacity
        full = self._probation.size + size > self._main_capacity - protected
        room = self._protected.size + size <= protected
        (self._protected if full and room else self._probation).push(key, size)

    monkeypatch.setattr(w_tinylfu.WTinyLfu, "_admit", admit)
    monkeypatch.setattr(w_tinylfu, "SAMPLE", 32)
    monkeypatch.setattr(w_tinylfu, "CELLS", 4)
