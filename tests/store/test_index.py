from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmc.policies import POLICIES
from lmc.store import Index, Record, origin_of

NS = b"n"


def put(index: Index, content: bytes, context: bytes = b"c", **changes: object) -> Record | None:
    fields: dict = {
        "namespace": NS,
        "key": content,
        "tokens": content * 8,
        "start": 0,
        "context": context,
        "context_after": context + content,
        "origin": "exact",
        "nbytes": 10,
    }
    return index.put(**fields | changes)


def put_visible(index: Index, *args: object, **changes: object) -> Record:
    record = put(index, *args, **changes)  # type: ignore[arg-type]
    assert record is not None
    index.acknowledge(record.slot, 0)
    return record


def test_found_only_when_every_rank_has_it() -> None:
    index = Index(capacity=100, ranks=2)
    record = put(index, b"a")
    assert record is not None
    index.acknowledge(record.slot, 0)
    assert index.variants(NS, b"a" * 8) == []
    index.acknowledge(record.slot, 1)
    assert index.variants(NS, b"a" * 8) == [record]


def test_least_recently_used_goes_first() -> None:
    index = Index(capacity=30)
    a, b, _ = (put_visible(index, c) for c in (b"a", b"b", b"c"))
    index.touch(a.slot)
    put_visible(index, b"d")
    assert index.take_freed() == [b.slot]
    assert a.slot in index
    assert index.size == 30


def test_leased_record_is_never_evicted() -> None:
    index = Index(capacity=20)
    a, b = put_visible(index, b"a"), put_visible(index, b"b")
    index.lease(a.slot)
    index.lease(b.slot)
    assert put(index, b"c") is None
    assert index.counts["no_room"] == 1
    index.release(b.slot)
    assert put(index, b"c") is not None
    assert a.slot in index
    assert b.slot not in index


def test_the_policy_says_which_goes() -> None:
    index = Index(capacity=30, policy="fifo")
    a, _, _ = (put_visible(index, c) for c in (b"a", b"b", b"c"))
    index.touch(a.slot)
    put_visible(index, b"d")
    assert index.take_freed() == [a.slot]


def test_what_a_policy_remembers_survives_a_new_slot() -> None:
    index = Index(capacity=40, policy="2q")
    for content in (b"a", b"b", b"c", b"d", b"e"):
        put_visible(index, content)
    again = put_visible(index, b"a")  # asked for again soon after it went: kept from now on
    for content in (b"f", b"g", b"h", b"i"):
        put_visible(index, content)
    assert again.slot in index


def test_a_record_expires_unless_it_is_in_use() -> None:
    now = [0.0]
    index = Index(capacity=30, policy={"name": "ttl", "seconds": 60}, clock=lambda: now[0])
    a, b = put_visible(index, b"a"), put_visible(index, b"b")
    index.lease(b.slot)
    now[0] = 60.0
    assert index.variants(NS, b"a" * 8) == []
    assert index.take_freed() == [a.slot]
    assert index.variants(NS, b"b" * 8) == [b]
    index.release(b.slot)
    assert index.variants(NS, b"b" * 8) == []
    assert index.counts["expired"] == 2


def test_belady_is_for_traces() -> None:
    with pytest.raises(ValueError, match="accesses to come"):
        Index(capacity=30, policy={"name": "belady"})


def test_exact_variants_are_a_setting() -> None:
    index = Index(capacity=1000, exact_variants=1)
    put_visible(index, b"a", b"1")
    latest = put_visible(index, b"a", b"2")
    assert index.variants(NS, b"a" * 8) == [latest]


def test_record_larger_than_the_store_evicts_nothing() -> None:
    index = Index(capacity=20)
    a = put_visible(index, b"a")
    assert put(index, b"b", nbytes=21) is None
    assert a.slot in index


def test_two_latest_exact_and_anchored_variants_and_one_isolated() -> None:
    index = Index(capacity=1000)
    put_visible(index, b"a", b"1")
    put_visible(index, b"a", b"2")
    put_visible(index, b"a", b"3")
    put_visible(index, b"a", b"4", origin="isolated")
    for context in (b"5", b"6", b"7"):
        put_visible(index, b"a", context, origin="anchored")
    # No way of encoding a text pushes out another.
    assert [(r.context, r.origin) for r in index.variants(NS, b"a" * 8)] == [
        (b"7", "anchored"),
        (b"6", "anchored"),
        (b"4", "isolated"),
        (b"3", "exact"),
        (b"2", "exact"),
    ]


def test_blended_is_kept_only_while_nothing_better_is_known() -> None:
    index = Index(capacity=1000)
    put_visible(index, b"a", b"1", origin="blended")
    assert put(index, b"a", b"2", origin="blended") is None
    exact = put_visible(index, b"a", b"3")
    assert index.variants(NS, b"a" * 8) == [exact]
    assert put(index, b"a", b"4", origin="blended") is None


def test_same_context_is_stored_once() -> None:
    index = Index(capacity=1000)
    put_visible(index, b"a", b"1")
    assert put(index, b"a", b"1") is None
    assert index.counts["known"] == 1


def test_tail_is_found_by_context_and_replaced_when_it_grows() -> None:
    index = Index(capacity=1000)
    short = put_visible(index, b"a", b"ctx", tail=True)
    assert index.after(NS, b"ctx", b"a" * 8) == [short]
    assert index.variants(NS, b"a" * 8) == []  # exact only, so never by content
    longer = put_visible(index, b"ab", b"ctx", tail=True)
    assert index.after(NS, b"ctx", b"ab" * 4) == [longer]
    assert index.after(NS, b"ctx", b"a" * 8) == []
    assert short.slot not in index
    assert put(index, b"a", b"ctx", tail=True) is None
    assert put(index, b"x", b"other", tail=True, origin="blended") is None
    assert index.after(b"other tenant", b"ctx", b"ab" * 4) == []


@pytest.mark.parametrize(
    ("start", "end", "blended_from", "origin"),
    [
        (0, 40, None, "isolated"),
        (40, 90, None, "anchored"),
        (90, 99, None, "exact"),
        (40, 90, 90, "anchored"),
        (40, 91, 90, "blended"),
        (0, 40, 0, "blended"),
    ],
)
def test_origin(start: int, end: int, blended_from: int | None, origin: str) -> None:
    assert origin_of(start, 40, blended_from, end) == origin


class IndexMachine(RuleBasedStateMachine):
    """Any order of calls under any policy: size is right, capacity holds, what is leased stays."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index(capacity=50)
        self.live: dict[int, Record] = {}
        self.leased: list[int] = []

    @initialize(policy=st.sampled_from([n for n in POLICIES.names() if n != "belady"]))
    def choose(self, policy: str) -> None:
        self.index = Index(capacity=50, policy=policy)

    @rule(
        content=st.sampled_from([b"a", b"b", b"c"]),
        context=st.sampled_from([b"1", b"2", b"3"]),
        origin=st.sampled_from(["exact", "isolated", "anchored", "blended"]),
        nbytes=st.integers(1, 60),
        tail=st.booleans(),
        acknowledged=st.booleans(),
    )
    def put(
        self, content: bytes, context: bytes, origin: str, nbytes: int, tail: bool,
        acknowledged: bool,
    ) -> None:  # fmt: skip
        record = put(self.index, content, context, origin=origin, nbytes=nbytes, tail=tail)
        if record is not None:
            assert record.slot not in self.live
            self.live[record.slot] = record
            if acknowledged:
                self.index.acknowledge(record.slot, 0)

    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        if held := [s for s in self.live if s in self.index]:
            slot = data.draw(st.sampled_from(held))
            self.index.lease(slot)
            self.leased.append(slot)

    @rule()
    def release(self) -> None:
        if self.leased:
            self.index.release(self.leased.pop())

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.index.touch(data.draw(st.integers(0, 20)))

    @invariant()
    def sizes_add_up(self) -> None:
        held = [r for s, r in self.live.items() if s in self.index]
        assert self.index.size == sum(r.nbytes for r in held) <= 50
        assert len(self.index) == len(held)

    @invariant()
    def what_is_pinned_is_counted(self) -> None:
        entries = self.index._entries.values()
        pinned = [e.record.nbytes for e in entries if e.leases or e.missing]
        assert self.index._pinned_bytes == sum(pinned)

    @invariant()
    def leased_stay(self) -> None:
        assert all(slot in self.index for slot in self.leased)

    @invariant()
    def freed_are_gone_and_told_once(self) -> None:
        for slot in self.index.take_freed():
            assert slot not in self.index
            assert self.live.pop(slot)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_a_tier_has_is_found_before_it_is_here_and_kept_until_it_is() -> None:
    index = Index(capacity=20, ranks=2)
    known = replace(put_visible(Index(100), b"x"), slot=-1)
    taken = index.adopt(known)
    assert taken is not None and taken.slot >= 0 and taken.id == known.id
    assert index.arriving([taken.slot, 99]) == [taken.slot]
    assert [r.slot for r in index.variants(NS, known.tokens)] == [taken.slot]
    assert index.adopt(known) is None  # it is on its way
    # Nothing pushes it out before every rank has it.
    index.acknowledge(taken.slot, 0)
    assert index.arriving([taken.slot, 99]) == [taken.slot]
    while put(index, bytes([index.counts["put"]]) * 3) is not None:
        pass
    assert taken.slot in index
    index.acknowledge(taken.slot, 1)
    assert index.arriving([taken.slot]) == []


def test_what_is_waited_for_in_vain_is_left_to_those_that_use_it() -> None:
    index = Index(capacity=100)
    shared, alone = (replace(put_visible(Index(100), c), slot=-1) for c in (b"x", b"y"))
    shared, alone = (index.adopt(record) for record in (shared, alone))  # type: ignore[assignment]
    index.lease(shared.slot)
    for record in (shared, alone):
        index.give_up(record.slot)
    assert index.take_freed() == [alone.slot]
    assert index.variants(NS, shared.tokens) == []  # nobody new is to wait for it
    before = index.added
    index.acknowledge(shared.slot, 0)
    assert index.variants(NS, shared.tokens) == [shared] and index.added == before + 1


def test_no_policy_is_asked_where_nothing_may_go() -> None:
    """A policy looks at each that must stay: with all of memory in use, at thousands a chunk."""
    for policy in sorted(set(POLICIES.names()) - {"belady"}):
        index = Index(capacity=1000, policy=policy)
        for i in range(100):
            put(index, bytes([i]))  # none is stored yet
        asked: list[object] = []
        index._policy.evict = lambda *a, asked=asked: asked.append(a)  # type: ignore[method-assign,misc]
        assert put(index, b"new") is None
        assert asked == [] and index.counts["no_room"] == 1


def test_what_expires_in_use_is_looked_at_once() -> None:
    now = [0.0]
    index = Index(capacity=1000, policy={"name": "ttl", "seconds": 60}, clock=lambda: now[0])
    a, b, c = (put_visible(index, content) for content in (b"a", b"b", b"c"))
    for record in (a, b):
        index.lease(record.slot)
    now[0] = 61.0
    assert index.variants(NS, c.tokens) == []
    assert not index._policy.expired(now[0])
    index.touch(a.slot)
    index.drop(b.slot)  # lost meanwhile
    assert index.variants(NS, a.tokens) == [a]
    index.release(a.slot)
    assert len(index) == 0 and index.size == 0 and index.counts["expired"] == 2


def test_a_prompt_that_repeats_one_text_leaves_a_few_of_it() -> None:
    index = Index(capacity=100_000)
    taken = [put(index, b"a", i.to_bytes(2, "big")) for i in range(500)]
    assert sum(record is not None for record in taken) == 16
    assert taken[0] is not None  # the first ones, which prompts that begin alike have too
    for record in taken[:16]:
        assert record is not None
        index.acknowledge(record.slot, 0)
    assert put(index, b"a", b"later") is not None


def test_what_is_on_its_way_is_not_replaced() -> None:
    """Text that a prompt repeats: its saves are told together, and each is held by somebody."""
    index = Index(capacity=1000, exact_variants=2)
    records = [put(index, b"a", bytes([i])) for i in range(5)]
    assert None not in records
    assert index.take_freed() == []
    for record in records:
        assert record is not None
        index.acknowledge(record.slot, 0)
    put_visible(index, b"a", b"later")
    assert len(index.variants(NS, b"a" * 8)) == 2
