"""Token maps: they cover the prompt, agree with the plan, and every miss has its cause."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.blend import STRATEGIES
from lmc.blend.plan import KINDS, Plan, make_plan
from lmc.blend.tokenmap import (
    Circumstances,
    MapRun,
    for_client,
    token_map,
    tokens_by,
    unplanned,
    with_lost,
)
from lmc.chunking.pieces import Piece
from lmc.store import Index
from lmc.store.causes import CAUSES
from lmc.store.history import History
from lmc.store.keep import keep
from lmc.store.lookup import Known
from tests.blend.test_plan import joined, text

MINE, THEIRS = b"m" * 32 + b"mine", b"m" * 32 + b"theirs"
SYSTEM, A, B, C, QUESTION = (text(i, T) for i, T in enumerate([10, 50, 60, 70, 30]))


class Store:
    """An index that remembers, and what is asked of it."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        self.history = History()
        self.index = Index(capacity, history=self.history)

    def put(self, *parts: np.ndarray, namespace: bytes = MINE, whole: bool = True) -> None:
        tokens, pieces = joined(*parts)
        for _, record in keep(self.index, namespace, tokens, pieces, None, 1):
            if whole:
                self.index.acknowledge(record.slot, 0)

    def ask(
        self, *parts: np.ndarray, blend: Any = "full_reuse", context: Any = "any", local: int = 0,
        about: Circumstances | None = None, **options: Any,
    ) -> tuple[Plan, list[MapRun]]:  # fmt: skip
        tokens, pieces = joined(*parts)
        strategy = STRATEGIES.build(blend)
        arguments = (tokens, pieces, self.index, MINE, strategy)
        plan = make_plan(*arguments, local=local, context=context, L=4, **options)
        known = Known(self.index, MINE, (), context)
        about = about or Circumstances(unmoved=None if strategy.moves else "strategy")
        return plan, token_map(plan, tokens, pieces, known, self.history, about)


def test_what_is_used_and_what_is_new() -> None:
    store = Store()
    store.put(SYSTEM, A)
    store.put(SYSTEM, B)
    epic = {"name": "epic", "link_tokens": 4}
    _, runs = store.ask(SYSTEM, B, A, QUESTION, blend=epic)
    assert runs == [
        (0, 70, "exact", "host", None),
        (70, 74, "recomputed", "host", "boundary"),
        (74, 120, "moved", "host", None),
        (120, 150, "new", None, "never_seen"),
    ]
    _, runs = store.ask(SYSTEM, B, A, blend=epic, local=64, about=Circumstances(blended_from=32))
    assert [run[:3] for run in runs[:2]] == [(0, 32, "local"), (32, 64, "local_blended")]
    assert runs[-1] == (119, 120, "recomputed", None, "last_token")


@pytest.mark.parametrize(
    ("about", "blend", "options", "cause"),
    [
        (None, "prefix", {}, "strategy"),
        (Circumstances(unmoved="gate"), "prefix", {}, "gate"),
        (None, "full_reuse", {"context": "isolated"}, "other_context"),
        (Circumstances(unmoved="engine"), "full_reuse", {"contiguous": True}, "engine"),
    ],
)
def test_what_is_stored_behind_other_text(
    about: Any, blend: str, options: dict[str, Any], cause: str
) -> None:
    store = Store()
    store.put(SYSTEM, A, B)
    _, runs = store.ask(SYSTEM, B, QUESTION, blend=blend, about=about, **options)
    assert (10, 70, "new", None, cause) in runs


def test_what_has_gone_and_what_is_coming() -> None:
    store = Store(capacity=100)
    store.put(A)
    store.put(C)
    assert store.ask(A, QUESTION)[1][0] == (0, 50, "new", None, "evicted")
    store.put(B, namespace=THEIRS)
    _, runs = store.ask(B, QUESTION)
    assert runs[0] == (0, 60, "new", None, "other_salt")
    assert for_client(runs) == [(0, 90, "new", None, "never_seen")]
    store.put(A, whole=False)
    assert store.ask(A, QUESTION)[1][0].cause == "being_stored"
    silent = Circumstances(silent=True)
    assert {run.cause for run in store.ask(B, QUESTION, about=silent)[1]} == {"tier_silent"}


def test_text_in_other_chunks_and_text_that_is_repeated() -> None:
    store = Store()
    store.put(np.concatenate([SYSTEM, A, B, C]))
    other = np.concatenate([B[20:], C[:40]])
    _, runs = store.ask(QUESTION, other, QUESTION)
    assert [(run.end - run.start, run.cause) for run in runs] == [
        (30, "never_seen"),
        (80, "cut_elsewhere"),
        (30, "repeated_within"),
    ]


def test_what_is_not_worth_a_blend_and_what_was_lost() -> None:
    store = Store()
    store.put(SYSTEM, A)
    plan, runs = store.ask(text(9, 200), A, QUESTION)
    assert plan.claimed == 0
    assert runs[1] == (200, 250, "recomputed", None, "not_worth")
    store.put(SYSTEM, B)
    _, runs = store.ask(SYSTEM, B, A, QUESTION)
    lost = with_lost(runs, np.arange(60, 80))
    assert lost == [
        (0, 60, "exact", "host", None),
        (60, 80, "recomputed", None, "lost"),
        (80, 120, "moved", "host", None),
        (120, 150, "new", None, "never_seen"),
    ]


def test_rows_that_differ_by_layer() -> None:
    store = Store()
    store.put(SYSTEM, A)
    store.put(SYSTEM, C)
    plan, runs = store.ask(SYSTEM, C, A, QUESTION, blend={"name": "query", "ratio": 0.2})
    assert (80, 130, "moved", "host", "chosen_by_layer") in runs
    assert plan.kinds()["moved"] == 40


def test_tiers_have_their_names() -> None:
    store = Store()
    store.put(SYSTEM, A)
    store.put(B)
    plan, _ = store.ask(SYSTEM, A, B)
    about = Circumstances(tiers={plan.found[1].record.slot: "disk"})
    runs = store.ask(SYSTEM, A, B, QUESTION, about=about)[1]
    assert [(run.start, run.tier) for run in runs] == [
        (0, "host"), (10, "disk"), (60, "host"), (120, None),
    ]  # fmt: skip
    assert tokens_by(runs, "tier") == {"host": 70, "disk": 50}


def test_requests_without_a_plan() -> None:
    assert unplanned(10, 4, "plain") == [(0, 4, "local", None, None), (4, 10, "new", None, "plain")]
    assert unplanned(10, 0, "not_begun") == [(0, 10, "new", None, "not_begun")]


PARTS = (SYSTEM, A, B, C, QUESTION, text(11, 40))
prompts = st.lists(st.sampled_from(range(len(PARTS))), min_size=1, max_size=6)


@settings(max_examples=60)
@given(
    stored=st.lists(st.tuples(prompts, st.sampled_from([MINE, THEIRS])), max_size=4),
    order=prompts,
    capacity=st.sampled_from([100, 300, 1 << 20]),
    blend=st.sampled_from(["prefix", "full_reuse", "epic", "random", "full_recompute", "query"]),
    context=st.sampled_from(["any", "isolated", "shared_prefix"]),
    contiguous=st.booleans(),
    local=st.integers(0, 60),
)
def test_a_map_covers_its_prompt_and_agrees_with_the_plan(
    stored: Any, order: list[int], capacity: int, blend: str, context: Any, contiguous: bool,
    local: int,
) -> None:  # fmt: skip
    store, parts = Store(capacity), [PARTS[i] for i in order]
    for other, namespace in stored:
        store.put(*(PARTS[i] for i in other), namespace=namespace)
    T = sum(map(len, parts))
    local = min(local, T - 1)
    options = {"context": context, "contiguous": contiguous, "local": local}
    plan, runs = store.ask(*parts, blend=blend, **options)
    assert [run.start for run in runs] == [0, *(run.end for run in runs[:-1])]
    assert runs[-1].end == T and all(run.start < run.end for run in runs)
    assert all(a[2:] != b[2:] for a, b in pairwise(runs))
    counted = dict.fromkeys(KINDS, 0) | tokens_by(runs, "kind")
    said = plan.kinds()
    if plan.selective:
        counted["recomputed"] += counted.pop("moved")
        said["recomputed"] += said.pop("moved")
    assert counted == said
    for run in runs:
        explained = run.kind in ("new", "recomputed") or run.cause == "chosen_by_layer"
        assert explained == (run.cause is not None)
        assert run.cause is None or run.cause in CAUSES
        assert run.tier == "host" or run.kind not in ("exact", "moved")


@settings(max_examples=40)
@given(
    mine=st.lists(prompts, max_size=3),
    theirs=st.lists(prompts, min_size=1, max_size=3),
    order=prompts,
    context=st.sampled_from(["any", "isolated"]),
)
def test_what_a_client_is_told_does_not_depend_on_other_salts(
    mine: Any, theirs: Any, order: list[int], context: Any
) -> None:
    alone, shared = Store(), Store()
    for prompt in mine:
        for store in (alone, shared):
            store.put(*(PARTS[i] for i in prompt))
    for prompt in theirs:
        shared.put(*(PARTS[i] for i in prompt), namespace=THEIRS)
    maps = []
    for store in (alone, shared):
        _, runs = store.ask(*(PARTS[i] for i in order), context=context)
        maps.append(for_client(runs))
    assert maps[0] == maps[1]


def test_pieces_that_end_open_are_asked_like_others() -> None:
    store = Store()
    tokens, pieces = joined(SYSTEM, QUESTION)
    pieces[-1] = Piece(*pieces[-1][:2], closed=False)
    for _, record in keep(store.index, MINE, tokens, pieces, None, 1):
        store.index.acknowledge(record.slot, 0)
    assert store.ask(A, QUESTION)[1][1] == (50, 80, "new", None, "open_end")
