"""Moved reuse at every capacity in one pass, against an LRU store that is played through."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.chunking.fixed import Fixed
from lmc.chunking.pieces import split
from lmc.sim.reach import moved_distances, pieces_of, reach, store_rows
from lmc.sim.stack import NEVER, Curve, stack_distances
from lmc.sim.trace import Request, accesses

CUT = Fixed(4)


def request(i: int, tokens: list[int]) -> Request:
    ids = np.array(tokens, np.int32)
    return Request(float(i), "", len(ids), 1, tokens=ids)


def played(
    requests: list[Request], capacity: int, fronts: list[int] | None = None
) -> tuple[int, int]:
    """Tokens that an LRU of contents finds, and those of them behind the same tokens.

    fronts: of each request, tokens that are found in front of it already and do not count.
    """
    held: OrderedDict[tuple[int, ...], int] = OrderedDict()
    contexts: set[tuple[int, ...]] = set()
    found = exact = 0
    for r, front in zip(requests, fronts or [0] * len(requests), strict=True):
        ids, run = r.tokens.tolist(), True
        pieces = split(r.tokens, CUT)
        names = [tuple(ids[p.start : p.end]) if p.closed else (-1, *ids[: p.end]) for p in pieces]
        for p, name in zip(pieces, names, strict=True):
            run = run and name in held and tuple(ids[: p.end]) in contexts
            beyond = max(0, p.end - max(p.start, front))
            found += beyond * (name in held)
            exact += beyond * run
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


def in_engine(requests: list[Request], capacity: int, block: int) -> list[int]:
    """Tokens that an LRU of prefixes of whole blocks finds in front of each request."""
    held: OrderedDict[tuple[int, ...], None] = OrderedDict()
    fronts = []
    for r in requests:
        ids = r.tokens.tolist()
        names = [tuple(ids[:end]) for end in range(block, len(ids) + 1, block)]
        run = 0
        while run < len(names) and names[run] in held:
            run += 1
        fronts.append(run * block)
        for name in names:
            held[name] = None
            held.move_to_end(name)
        while len(held) * block > capacity:
            held.popitem(last=False)
    return fronts


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts, st.integers(0, 80))
def test_what_the_engine_finds_itself_is_found_once(prompts, engine):
    requests = [request(i, ids) for i, ids in enumerate(prompts)]
    total = sum(map(len, prompts))
    engine = max(engine, max(map(len, prompts)))
    fronts = in_engine(requests, engine, 4)
    got = reach(requests, accesses(requests, Fixed(4)), 1, CUT, engine_bytes=engine)
    assert got.engine == pytest.approx(sum(fronts) / total)
    for capacity in range(engine, total + 1, max(1, total // 5)):
        found, exact = played(requests, capacity, fronts)
        assert got.anywhere.at([capacity])[0] == pytest.approx(found / total)
        assert got.exact.at([capacity])[0] == pytest.approx(exact / total)
        prefix = in_engine(requests, capacity, 4)
        more = sum(max(0, p - front) for p, front in zip(prefix, fronts, strict=True))
        assert got.prefix.at([capacity])[0] == pytest.approx(more / total)


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


@settings(max_examples=50, deadline=None, derandomize=True)
@given(texts)
def test_rows_are_the_curve_of_a_store(prompts):
    requests = [request(i, ids) for i, ids in enumerate(prompts)]
    total = sum(map(len, prompts))
    curve, rows = store_rows(requests, CUT, 1)
    assert rows[-1]["capacity"] == "inf" and rows[-1]["hit_rate"] == curve.infinite
    for row in rows:
        capacity = total if row["capacity"] == "inf" else row["capacity"]
        if capacity >= max(map(len, prompts)):
            found, exact = played(requests, capacity)
            assert (row["hits"], row["accesses"]) == (found, total)
            assert row["exact"] == pytest.approx(exact / total)
            assert row["moved"] == pytest.approx((found - exact) / total)
