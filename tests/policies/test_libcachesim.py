"""The same hits as libcachesim, on a trace of all sorts and on one that suits ghosts."""

from __future__ import annotations

from typing import Any

import libcachesim
import numpy as np
import pytest

from lmc.sim.replay import replay
from lmc.sim.trace import Accesses

LIBRARY = {
    "lru": libcachesim.LRU,
    "fifo": libcachesim.FIFO,
    "lfu": libcachesim.LFU,
    "sieve": libcachesim.Sieve,
    "arc": libcachesim.ARC,
    "2q": libcachesim.TwoQ,
    "s3fifo": libcachesim.S3FIFO,
}


def library_hits(cache: libcachesim.CacheBase, trace: Accesses) -> int:
    never = 2**63 - 1  # the library's mark of no next use
    following = [never if n == np.inf else int(n) for n in trace.next_use().tolist()]
    hits = 0
    for i, (key, then) in enumerate(zip(trace.keys.tolist(), following, strict=True)):
        request = libcachesim.Request()
        request.obj_id, request.obj_size = key, 1
        request.clock_time, request.next_access_vtime = i, then
        hits += cache.get(request)
    return hits


def our_hits(trace: Accesses, capacity: int, policy: Any) -> int:
    hits = replay(trace, [capacity], policy).hits
    assert 0.05 < hits / len(trace.keys) < 0.95
    return hits


@pytest.mark.parametrize("capacity", [100, 1000])
@pytest.mark.parametrize("policy", LIBRARY)
def test_equal_hits(mixed: Accesses, policy: str, capacity: int) -> None:
    theirs = library_hits(LIBRARY[policy](capacity), mixed)
    assert our_hits(mixed, capacity, policy) == theirs


@pytest.mark.parametrize("capacity", [20, 40, 60, 100])
@pytest.mark.parametrize("policy", LIBRARY)
def test_equal_hits_where_much_comes_back(returning: Accesses, policy: str, capacity: int) -> None:
    theirs = library_hits(LIBRARY[policy](capacity), returning)
    assert our_hits(returning, capacity, policy) == theirs


@pytest.mark.parametrize("capacity", [100, 1000])
def test_belady(mixed: Accesses, capacity: int) -> None:
    theirs = library_hits(libcachesim.Belady(capacity), mixed)
    assert our_hits(mixed, capacity, "belady") == theirs
    assert our_hits(mixed, capacity, {"name": "belady", "bypass": True}) >= theirs


@pytest.mark.usefixtures("library_w_tinylfu")
@pytest.mark.parametrize("capacity", [100, 1000])
def test_w_tinylfu(mixed: Accesses, capacity: int) -> None:
    theirs = library_hits(libcachesim.WTinyLFU(capacity), mixed)
    ours = our_hits(mixed, capacity, "wtinylfu")
    assert ours / len(mixed.keys) == pytest.approx(theirs / len(mixed.keys), abs=0.02)
