"""Moved reuse at every capacity in one pass, against an LRU store that is played through."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.chunking.fixed import Fixed
from lmc.chunking.pieces import split
from lmc.sim.reach import moved_distances, pieces_of, reach
from lmc.sim.stack import NEVER, Curve, stack_distances
from lmc.sim.trace import Request, accesses

CUT = Fixed(4)


def request(i: int, tokens: list[int]) -> Request:
    ids = np.array(tokens, np.int32)
    return Request(float(i), "", len(ids), 1, tokens=ids)


def played(requests: list[Request], capacity: int) -> tuple[int, int]:
    """Tokens that an LRU of contents finds, and those of them behind the same tokens."""
    held: OrderedDict[tuple[int, ...], int] = OrderedDict()
    contexts: set[tuple[int, ...]] = set()
    found = exact = 0
    for r in requests:
        ids, run = r.tokens.tolist(), True
        pieces = split(r.tokens, CUT)
        names = [tuple(ids[p.start : p.end]) if p.closed else (-1, *ids[: p.end]) for p in pieces]
        for p, name in zip(pieces, names, strict=True):
            run = run and name in held and tuple(ids[: p.end]) in contexts
            found += (p.end - p.start) * (name in held)
            exact += (p.end - p.start) * run
        for p, name in zip(pieces, names, strict=True):
            contexts.add(tuple(ids[: p.end]))
            if name in held:
                held.move_to_end(name)
            else:
                held[name] = p.end - p.start
        while sum(held.values()) > capacity:
            held.popitem(last=False)
    return found, exact


texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(texts)
def test_every_capacity_is_that_of_a_store_played_through(prompts):
    # Of one length, so that a place smaller than an item, which is the exception, is none.
    requests = [request(i, ids) for i, ids in enumerate(prompts)]
    total = sum(map(len, prompts))
    pieces = pieces_of(requests, CUT)
    found, exact = moved_distances(pieces, 1)
    largest = max(map(len, prompts))
    for capacity in range(largest, total + 1, max(1, total // 7)):
        want = played(requests, capacity)
        got = tuple(int(pieces.tokens[d <= capacity].sum()) for d in (found, exact))
        assert got == want, capacity


def test_what_moved_is_found_anywhere_and_by_no_prefix_cache():
    a, b, c = ([x] * 8 for x in (1, 2, 3))
    requests = [request(0, a + b + c), request(1, c + a + b)]
    got = reach(requests, accesses(requests, Fixed(4)), 10, CUT)
    assert got.prefix.infinite == 0
    # Pieces of one document repeat one another, and the tail is found in its context alone.
    assert got.anywhere.infinite == pytest.approx(24 / 48)
    assert got.exact.infinite == 0
    assert got.moved == pytest.approx(24 / 48)


def test_a_curve_says_the_capacity_for_a_rate():
    curve = Curve(np.array([3, 10, 40]), np.array([0.1, 0.3, 0.6]))
    assert [curve.capacity_for(r) for r in (0, 0.05, 0.1, 0.11, 0.3, 0.6)] == [0, 3, 3, 10, 10, 40]
    with pytest.raises(ValueError, match=r"rate: got 0\.7, but no capacity gives over 0\.6"):
        curve.capacity_for(0.7)
    assert Curve(np.array([], int), np.array([])).capacity_for(0) == 0


def test_requests_are_looked_up_before_they_are_put_in():
    keys, offsets = np.array([0, 1, 2, 1, 0]), np.array([0, 2, 5])
    assert stack_distances(keys).tolist() == [NEVER, NEVER, NEVER, 2, 3]
    # Of the second request, 2 is new and not yet there when 1 and 0 are looked up.
    assert stack_distances(keys, offsets=offsets).tolist() == [NEVER, NEVER, NEVER, 1, 2]
    with pytest.raises(ValueError, match="offsets"):
        stack_distances(keys, offsets=np.array([0, 9]))
