"""The same hits as libcachesim on one trace of all sorts."""

from __future__ import annotations

import libcachesim
import numpy as np
import pytest

from lmc.policies import w_tinylfu
from lmc.sim.replay import replay
from lmc.sim.trace import Accesses

LIBRARY = {
    "lru": libcachesim.LRU,
    "fifo": libcachesim.FIFO,
    "lfu": libcachesim.LFU,
    "sieve": libcachesim.Sieve,
    "belady": libcachesim.Belady,
    "arc": libcachesim.ARC,
    "2q": libcachesim.TwoQ,
    "s3fifo": libcachesim.S3FIFO,
}
EQUAL = ("lru", "fifo", "lfu", "sieve", "belady")


def library_hits(cache: libcachesim.CacheBase, trace: Accesses) -> int:
    following = np.where(np.isinf(trace.next_use()), 2**62, trace.next_use()).astype(np.int64)
    hits = 0
    for i, (key, then) in enumerate(zip(trace.keys.tolist(), following.tolist(), strict=True)):
        request = libcachesim.Request()
        request.obj_id, request.obj_size = key, 1
        request.clock_time, request.next_access_vtime = i, then
        hits += cache.get(request)
    return hits


@pytest.mark.parametrize("capacity", [100, 1000])
@pytest.mark.parametrize("policy", LIBRARY)
def test_hits(mixed: Accesses, policy: str, capacity: int) -> None:
    ours = replay(mixed, [capacity], policy).hits / len(mixed.keys)
    theirs = library_hits(LIBRARY[policy](capacity), mixed) / len(mixed.keys)
    assert 0.05 < theirs < 0.95
    assert ours == pytest.approx(theirs, abs=5e-5 if policy in EQUAL else 0.02)


@pytest.mark.parametrize("capacity", [100, 1000])
def test_w_tinylfu(mixed: Accesses, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library's sample and an LRU main part in both; test_golden.py says why."""
    monkeypatch.setattr(w_tinylfu, "SAMPLE", 32)
    monkeypatch.setattr(w_tinylfu, "PROTECTED", 0.0)
    ours = replay(mixed, [capacity], "wtinylfu").hits / len(mixed.keys)
    library = libcachesim.WTinyLFU(capacity, main_cache="LRU")
    assert ours == pytest.approx(library_hits(library, mixed) / len(mixed.keys), abs=0.02)
