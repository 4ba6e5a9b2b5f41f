"""What may be moved where: a chunk carries what stood before it when it was computed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.chunking.cdc import Cdc
from lmc.chunking.pieces import Piece, split
from lmc.store import Index
from lmc.store.keep import keep
from lmc.store.lookup import AHEAD, Found, Known, find, lacking, reach
from lmc.store.record import ContextPolicy

NS = b"namespace"
BOS = 7
SYSTEM, EVIL, A, B, QUESTION = (
    np.random.default_rng(i).integers(10, 500, n) for i, n in enumerate((12, 20, 30, 40, 9))
)


def cut(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, list[Piece]]:
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return np.concatenate(parts), [Piece(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def stored(*prompts: Sequence[np.ndarray], blended_from: int | None = None) -> Index:
    index = Index(1 << 20)
    for parts in prompts:
        for _, record in keep(index, NS, *cut(parts), blended_from, 1):
            index.acknowledge(record.slot, 0)
    return index


def moved(
    index: Index, *parts: np.ndarray, policy: ContextPolicy, begins: int | None = None
) -> list[int]:
    """Lengths of the moved chunks of a prompt."""
    known = Known(index, NS, policy=policy, begins=begins)
    return [f.end - f.start for f in find(*cut(parts), known) if f.kind == "moved"]


@pytest.mark.parametrize(
    ("prompts", "allowed"),
    [
        # Behind another's text.
        ([(EVIL, A)], {"any"}),
        ([(SYSTEM, B, A)], {"any"}),
        # Behind what the request begins with, too.
        ([(SYSTEM, A)], {"any", "shared_prefix"}),
        # Alone.
        ([(A,)], {"any", "shared_prefix", "isolated"}),
        ([(A, QUESTION)], {"any", "shared_prefix", "isolated"}),
        # One that may not be moved takes nothing from one that may.
        ([(A,), (EVIL, A)], {"any", "shared_prefix", "isolated"}),
        ([(EVIL, A), (A,)], {"any", "shared_prefix", "isolated"}),
        ([(SYSTEM, A), *((np.array([i]), A) for i in range(20, 23))], {"any"}),
    ],
)
def test_what_may_be_moved(
    prompts: list[Sequence[np.ndarray]], allowed: set[ContextPolicy]
) -> None:
    index = stored(*prompts)
    for policy in get_args(ContextPolicy):
        found = moved(index, SYSTEM, QUESTION, A, policy=policy)
        assert (30 in found) == (policy in allowed), policy


def test_alone_is_behind_the_token_that_prompts_begin_with_too() -> None:
    begin = np.array([BOS])
    index = stored((begin, A))
    prompt = (SYSTEM, QUESTION, A)
    assert moved(index, *prompt, policy="isolated", begins=BOS) == [30]
    assert moved(index, *prompt, policy="isolated") == []
    assert moved(index, *prompt, policy="isolated", begins=BOS + 1) == []
    # Another text of one token is no such token.
    assert moved(stored((np.array([8]), A)), *prompt, policy="isolated", begins=BOS) == []


def test_a_chunk_may_follow_the_one_it_was_computed_behind() -> None:
    index = stored((A, B))
    for policy in get_args(ContextPolicy):
        assert moved(index, SYSTEM, A, B, policy=policy) == [30, 40]
        assert moved(index, SYSTEM, B, A, policy=policy) == ([40, 30] if policy == "any" else [30])
        # Not where something else stands between them.
        between = moved(index, SYSTEM, A, QUESTION, B, policy=policy)
        assert between == ([30, 40] if policy == "any" else [30])
    # And not behind one that may not be moved itself.
    assert moved(stored((EVIL, A, B)), SYSTEM, A, B, policy="shared_prefix") == []


@pytest.mark.parametrize("begins", [None, BOS])
def test_a_chunk_may_stand_behind_what_it_saw_however_that_is_cut(begins: int | None) -> None:
    front = [] if begins is None else [np.array([BOS])]
    index = stored((*front, A, B))
    joined = np.concatenate([QUESTION, A])  # nobody says here where A begins
    for policy in ("isolated", "shared_prefix"):
        assert moved(index, SYSTEM, joined, B, policy=policy, begins=begins) == [40]
        # Where one token of it is another, or is missing, B has seen what is not here.
        other = joined.copy()
        other[-len(A)] += 1
        assert moved(index, SYSTEM, other, B, policy=policy, begins=begins) == []
        assert moved(index, A[1:], B, policy=policy, begins=begins) == []
    long = np.random.default_rng(9).integers(10, 500, AHEAD + 1)
    far = stored((*front, long, B))
    assert moved(far, SYSTEM, np.concatenate([QUESTION, long]), B, policy="isolated") == []


def test_what_was_blended_is_moved_only_where_anything_is() -> None:
    index = stored((A,), blended_from=0)
    assert moved(index, SYSTEM, A, policy="any") == [30]
    assert moved(index, SYSTEM, A, policy="shared_prefix") == []
    assert moved(index, SYSTEM, A, policy="isolated") == []


class Shelf:
    """A tier that has what another index has."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.ids = {e.record.id for e in index._entries.values()}

    def of(self, content: bytes) -> list[Any]:
        held = [e.record for e in self.index._entries.values()]
        return [r for r in held if r.tokens == content and not r.tail]

    def after(self, context: bytes, first: bytes) -> list[Any]:
        return []


def test_a_tier_is_asked_where_memory_has_only_what_may_not_be_moved() -> None:
    here, behind = stored((EVIL, A)), Shelf(stored((A,)))
    for policy in get_args(ContextPolicy):
        known = Known(here, NS, [behind], policy)
        found = [f for f in find(*cut((SYSTEM, QUESTION, A)), known) if f.kind == "moved"]
        # With `any` what memory has does.
        assert [f.record.start for f in found] == [20 if policy == "any" else 0]


texts = [np.random.default_rng(10 + i).integers(10, 500, 16 + i) for i in range(5)]


@given(
    prompts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=5),
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    policy=st.sampled_from(["shared_prefix", "isolated"]),
)
@settings(max_examples=300)
def test_nothing_that_a_moved_chunk_saw_is_missing_in_front_of_it(
    prompts: list[list[int]], prompt: list[int], policy: ContextPolicy
) -> None:
    """Whatever was stored: all tokens that a moved chunk attended to stand in the prompt too."""
    index = Index(1 << 20)
    saw: dict[tuple[bytes, bytes], list[int]] = {}  # by content and context: the text before it
    for parts in prompts:
        tokens, pieces = cut([texts[i] for i in parts])
        for piece, record in keep(index, NS, tokens, pieces, None, 1):
            saw[record.key, record.context] = tokens[: piece.start].tolist()
            index.acknowledge(record.slot, 0)
    tokens, pieces = cut([texts[i] for i in prompt])
    found: list[Found] = find(tokens, pieces, Known(index, NS, policy=policy))
    for f in found:
        before = saw[f.record.key, f.record.context]
        here = tokens[: f.start].tolist()
        if f.kind == "exact":
            assert before == here
        elif policy == "isolated":
            assert here[len(here) - len(before) :] == before
        else:
            assert here[: len(before)] == before or here[len(here) - len(before) :] == before \
                or any(here[-n:] == before[-n:] and here[: len(before) - n] == before[:-n]
                       for n in range(len(before)))  # fmt: skip


def kept_in(index: Index, tokens: np.ndarray, spans: Sequence[tuple[int, int]] = ()) -> Index:
    """What a prompt leaves that is cut by content, its spans apart."""
    for _, record in keep(index, NS, tokens, split(tokens, CHUNKER, spans), None, 1, spans):
        index.acknowledge(record.slot, 0)
    return index


def exact_tokens(index: Index, tokens: np.ndarray, spans: Sequence[tuple[int, int]] = ()) -> int:
    """Tokens that are found exact, from the first on, without a hole."""
    reached = 0
    for f in find(tokens, split(tokens, CHUNKER, spans), Known(index, NS), moves=False):
        assert f.kind == "exact" and f.record.start == f.at == f.start
        if f.start == reached:
            reached = f.end
    return reached


CHUNKER = Cdc()


@given(
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    first=st.integers(0, 63),
    second=st.integers(0, 63),
    more=st.integers(0, 80),
    seed=st.integers(0, 5),
)
@settings(max_examples=200, deadline=None)
def test_a_prompt_is_found_whole_however_both_were_cut(
    sizes: list[int], first: int, second: int, more: int, seed: int
) -> None:
    """Any spans in the first turn, any others in the second: all of the first turn is exact."""
    tokens = np.random.default_rng(seed).integers(0, 300, sum(sizes) + more)
    ends = np.cumsum(sizes).tolist()
    regions = list(pairwise([0, *ends]))
    some, others = ([r for i, r in enumerate(regions) if bits >> i & 1] for bits in (first, second))
    turn = tokens[: sum(sizes)]
    index = kept_in(Index(1 << 20), turn, some)
    assert exact_tokens(index, tokens, others) == len(turn)


def test_what_continues_a_prompt_is_the_longest_of_the_latest() -> None:
    """Many prompts begin alike: the lists that are looked through stay short, and hold the last."""
    index = Index(1 << 30)
    rng = np.random.default_rng(0)
    begin = rng.integers(0, 300, 5)
    last = begin
    for _ in range(100):
        last = np.concatenate([begin, rng.integers(0, 300, 60)])
        kept_in(index, last, [(0, 5 + int(rng.integers(1, 50)))])
    assert max(len(entries) for entries in index._behind.values()) <= 16
    assert exact_tokens(index, last) == len(last)
    for slot in list(index._entries):
        index.drop(slot)
    assert not index._behind and not index._contents and not index._ends


@given(st.data())
def test_what_is_lacking_is_what_no_exact_run_covers(data: st.DataObject) -> None:
    T = 30
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1))))
    pieces = [Piece(a, b) for a, b in pairwise([0, *cuts, T])]
    edges = sorted(data.draw(st.sets(st.integers(0, T), max_size=8)))
    kinds = st.sampled_from(["exact", "moved", None])
    found = [
        Found(a, b, kind, None, a)  # type: ignore[arg-type]
        for a, b in pairwise(edges)
        if (kind := data.draw(kinds))
    ]
    exact = {i for one in found if one.kind == "exact" for i in range(one.start, one.end)}
    assert lacking(pieces, found) == [p for p in pieces if not exact.issuperset(range(*p[:2]))]
    covered = reach(found, 3)
    assert covered >= 3 and exact.issuperset(range(3, covered))
    assert covered not in exact
