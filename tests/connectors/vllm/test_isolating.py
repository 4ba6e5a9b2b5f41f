"""What is computed alone: which chunks, how many at a time, and that what is lent comes back."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.blend.epic import Epic
from lmc.blend.plan import make_plan
from lmc.chunking.pieces import Piece
from lmc.connectors.vllm.isolating import RESTED_S, WAITING
from lmc.store.lookup import Known, find
from tests.connectors.vllm.alone import BOS, World, lengths, text


def test_each_new_chunk_behind_another_is_computed_once() -> None:
    world = World()
    world.prompt(text(0, 40), text(1, 70), text(2, 80), text(3, 12), text(4, 30), closed=False)
    world.prompt(text(5, 40), text(1, 70))  # waits already
    encodes = world.step()
    # Not what stands first, is too short, or may still grow.
    assert lengths(encodes) == [70, 80]
    for encode, part in zip(encodes, (text(1, 70), text(2, 80)), strict=True):
        (save,) = encode.saves
        record = save.record
        assert (record.origin, record.start) == ("isolated", 0)
        assert np.array_equal(encode.tokens, part)
    assert world.pool.get_num_free_blocks() == 400 - 3 - 3
    world.done(encodes)
    assert world.pool.get_num_free_blocks() == 400
    world.prompt(text(0, 40), text(2, 80), text(1, 70))  # known by now
    assert world.isolation.pending == 0


def test_the_token_that_prompts_begin_with_stays_in_front() -> None:
    world = World()
    begin = np.array([BOS])
    world.prompt(begin, text(1, 70), np.concatenate([text(2, 80)]))
    (encode,) = world.step()  # the first document is behind nothing else as it is
    assert np.array_equal(encode.tokens, [BOS, *text(2, 80)])
    assert (encode.saves[0].start, encode.saves[0].record.start) == (1, 1)
    # Of a prompt that does not begin with it, none is put there.
    other = World()
    other.prompt(text(0, 40), text(2, 80))
    assert other.step()[0].saves[0].record.start == 0


def test_the_chunks_of_a_span_are_computed_together_and_follow_each_other() -> None:
    world = World(limits={"chunk_tokens": 200})
    parts = [text(i, 40) for i in range(8)]
    whole = np.concatenate(parts)
    # A document of three chunks, one of a single chunk, and one that is too long to be one text.
    spans = [(0, 40), (40, 160), (160, 200), (200, 320)]
    world.prompt(*parts, spans=spans)
    encodes = world.step()
    assert [[save.end for save in encode.saves] for encode in encodes] == [
        [40, 80, 120], [40], [40, 80, 120],
    ]  # fmt: skip
    for encode, (start, end) in zip(encodes, spans[1:], strict=True):
        assert np.array_equal(encode.tokens, whole[start:end])
        assert {save.record.origin for save in encode.saves} == {"isolated"}
    # Blocks go back when the last of a text's chunks is done.
    free = world.pool.get_num_free_blocks()
    first = encodes[0].saves
    world.isolation.settle(first[0].record.slot, world.pool)
    assert world.pool.get_num_free_blocks() == free
    world.done(encodes)
    assert world.pool.get_num_free_blocks() == 400
    # Elsewhere they are moved as one text, whatever stands in front of it.
    tokens = np.concatenate([text(50, 33), *parts[1:4], text(51, 20)])
    pieces = [Piece(a, b) for a, b in pairwise([0, 33, 73, 113, 153, 173])]
    found = find(tokens, pieces, Known(world.index, b"n", (), "isolated", BOS))
    assert [(f.start, f.end, f.kind) for f in found] == [
        (33, 73, "moved"), (73, 113, "moved"), (113, 153, "moved"),
    ]  # fmt: skip
    assert make_plan(tokens, pieces, world.index, b"n", Epic(4), context="isolated",
                     begins=BOS).moved == ((33, 153),)  # fmt: skip
    # Known as a whole; where a chunk of it has gone, it is computed again, and no more than that.
    world.prompt(*parts, spans=spans)
    assert world.isolation.pending == 0
    world.index.drop(first[1].record.slot)
    world.prompt(*parts, spans=spans)
    (again,) = world.step()
    assert [(save.start, save.end) for save in again.saves] == [(40, 80)]


def test_a_span_longer_than_a_chunk_may_be_is_several_texts() -> None:
    world = World(limits={"chunk_tokens": 100})
    world.prompt(*(text(i, 40) for i in range(6)), spans=[(40, 240)])
    assert [len(encode.tokens) for encode in world.step()] == [80, 80, 40]


def test_what_clients_sent_alone_is_not_computed_again() -> None:
    world = World()
    world.stored(text(1, 70))
    world.prompt(text(0, 40), text(1, 70), text(2, 80))
    assert lengths(world.step()) == [80]


@pytest.mark.parametrize("config", [{"context": "any"}, {"isolated_tokens": 0}])
def test_nothing_is_computed_where_nothing_is_gained_or_wanted(config: dict[str, object]) -> None:
    world = World(**config)
    world.prompt(text(0, 40), text(1, 70))
    assert world.isolation.pending == 0


def test_behind_a_shared_prefix_is_good_enough_where_the_policy_says_so() -> None:
    world = World(context="shared_prefix")
    world.prompt(text(0, 40), text(1, 70), text(2, 80))
    assert lengths(world.step()) == [80]


def test_so_many_tokens_a_step_on_average_and_no_more() -> None:
    world = World(isolated_tokens=50)
    parts = [text(i, 100) for i in range(12)]
    world.prompt(*parts, again=True)
    taken = [sum(lengths(world.step(scheduled=8))) for _ in range(40)]
    assert sum(taken) == 1100
    for steps in range(1, 41):
        assert sum(taken[:steps]) <= 50 * steps
    assert world.isolation.pending == 0


def test_steps_that_are_full_are_left_alone() -> None:
    world = World(rows=256)
    world.prompt(text(0, 40), text(1, 70), text(2, 80), again=True)
    assert world.step(scheduled=256) == world.step(scheduled=190) == []
    assert lengths(world.step(scheduled=180)) == [70]
    assert lengths(world.step(scheduled=0)) == [80]


def test_prompts_come_first_and_what_waits_is_not_starved() -> None:
    world = World(isolated_tokens=100)
    world.prompt(text(0, 40), *(text(i, 70) for i in range(1, 8)), again=True)
    taken = [lengths(world.step(scheduled=300, prompts=True)) for _ in range(16)]
    assert taken == ([[]] * 7 + [[70]]) * 2
    # As soon as nobody waits for a first token, the rest is done.
    assert lengths(world.step(scheduled=4)) == [70]


def test_a_chunk_longer_than_a_step_waits_for_one_of_its_own() -> None:
    world = World(rows=128, isolated_tokens=400)
    world.prompt(text(0, 40), text(1, 300), again=True)
    assert world.step(scheduled=1) == []
    assert lengths(world.step()) == [300]
    # Where there is never such a step, it is not starved.
    world.prompt(text(0, 40), text(2, 300), again=True)
    assert [lengths(world.step(scheduled=1)) for _ in range(8)] == [[]] * 7 + [[300]]


def test_blocks_are_left_for_requests() -> None:
    world = World()
    world.prompt(text(0, 40), text(1, 70), again=True)
    world.pool.free = world.pool.free[: 400 // 8 + 2]
    assert world.step(scheduled=1) == []
    world.pool.free += [SimpleNamespace(block_id=399)]
    assert lengths(world.step(scheduled=1)) == [70]


def test_what_will_never_fit_is_not_waited_for() -> None:
    world = World()
    world.prompt(text(0, 40), text(1, 70))
    world.pool.free = world.pool.free[:50]
    assert world.step(scheduled=1) == []
    # Nothing runs that could give blocks back: an engine would step for ever.
    assert world.step() == []
    assert world.isolation.pending == 0


def test_without_room_in_the_store_nothing_is_lent() -> None:
    world = World(capacity=60)
    world.prompt(text(0, 40), text(1, 70))
    assert world.step() == []
    assert (world.isolation.pending, world.pool.get_num_free_blocks()) == (0, 400)


def test_what_waits_is_bounded_and_the_oldest_goes() -> None:
    world = World()
    parts = [text(i, 2000) for i in range(2 * WAITING // 2000)]
    world.prompt(*parts)
    assert world.isolation.pending == WAITING // 2000
    world.isolation.clear()
    assert world.step() == []


def test_text_that_no_client_told_of_is_computed_alone_once_it_has_come_again() -> None:
    world = World()
    front, a, b, c = text(9, 32), text(1, 60), text(2, 50), text(3, 40)
    world.prompt(front, a, b, c, spans=[])
    assert not world.isolation.pending  # nobody knows whether it will come again
    world.stored(front, a, b, c)
    world.prompt(front, a, b, c, spans=[])
    assert not world.isolation.pending  # it stands where it stood: a chat goes on
    world.prompt(text(4, 32), b, a, spans=[])
    assert world.isolation.pending == 2
    world.done(encodes := world.step())
    assert lengths(encodes) == [50, 60]
    world.prompt(text(5, 16), c, b, spans=[])
    assert world.isolation.pending == 1


def test_what_was_only_met_again_waits_until_nothing_runs_or_long_enough() -> None:
    world = World(isolated_tokens=100)
    front, a, b, c = text(9, 32), text(1, 60), text(2, 50), text(3, 70)
    world.stored(front, a, b)
    world.prompt(text(4, 32), b, a, spans=[])
    assert [world.step(scheduled=4) for _ in range(10)] == [[]] * 10
    # What a client told of does not wait, and does not take the others along.
    world.prompt(text(5, 32), c, again=True)
    assert lengths(world.step(scheduled=4)) == [70]
    # Nor does it, once a client has told of it.
    world.prompt(text(6, 32), a)
    assert lengths(world.step(scheduled=4)) == [60]
    taken = [lengths(world.step(scheduled=4)) for _ in range(64)]
    assert taken == [[]] * 63 + [[50]]
    world.prompt(text(7, 32), text(8, 60), text(9, 50), spans=[])
    world.stored(text(7, 32), text(8, 60), text(9, 50))
    world.prompt(text(10, 32), text(9, 50), text(8, 60), spans=[])
    # Nothing runs: still no more than so many at a time, since somebody may come.
    assert [lengths(world.step()) for _ in range(2)] == [[50], [60]]


def test_of_a_span_every_chunk_counts_as_told_of() -> None:
    world = World()
    a, b, c, d = (text(i, 40) for i in range(4))
    world.prompt(a, b, c, d, spans=[(40, 120)])
    (encode,) = world.step()
    assert len(encode.tokens) == 80


def test_what_clients_tell_of_waits_for_a_rest_until_it_has_come_again() -> None:
    world = World()
    front, a, b = text(9, 32), text(1, 60), text(2, 50)
    world.prompt(front, a, b)
    # Answers never wait for what may not come back.
    assert [world.step(scheduled=4) for _ in range(200)] == [[]] * 200
    # Nor does a client that asks again as soon as it was answered.
    for _ in range(5):
        assert world.isolation.take(world.pool, 0, False) == []
        world.now += RESTED_S / 2
        assert world.isolation.take(world.pool, 0, False) == world.step(scheduled=4) == []
        world.now += RESTED_S
    world.stored(front, a, b)
    world.prompt(front, a, b)  # a turn of a chat: it stands where it stood
    assert world.step(scheduled=4) == []
    world.prompt(text(8, 32), b)
    assert lengths(world.step(scheduled=4)) == [50]
    assert world.step(scheduled=4) == []
    assert lengths(world.step()) == [60]
    assert world.isolation.pending == 0


@pytest.mark.parametrize("scheduled", [0, 4])
def test_a_text_of_several_chunks_goes_on_where_the_last_step_left_it(scheduled: int) -> None:
    world = World(isolated_tokens=100)
    parts = [text(i, 40) for i in range(1, 8)]
    whole = np.concatenate(parts)
    for part in [text(0, 40), whole] if scheduled else []:
        world.stored(text(99, 32), part)
    for i in range(len(parts) if scheduled else 0):
        world.stored(text(99, 32), parts[i])
    world.prompt(text(0, 40), *parts, spans=[(0, 40), (40, 320)])
    done = 0
    steps = 0
    while world.isolation.pending:
        steps += 1
        assert steps < 40
        encodes = world.step(scheduled)
        if not encodes:
            continue
        # Until the workers have said that they are done with it, nothing more of it is computed.
        assert world.step(scheduled) == []
        (encode,) = encodes
        assert encode.first == 40 * done and len(encode.tokens) - encode.first <= 100
        assert np.array_equal(encode.tokens, whole[: len(encode.tokens)])
        assert [(load.start, load.end, load.at) for load in encode.loads] == [
            (40 * i, 40 * i + 40, 40 * i) for i in range(done)
        ]
        leased = [load.slot for load in encode.loads]
        assert all(world.index._entries[slot].leases == 1 for slot in leased)
        done += len(encode.saves)
        world.done(encodes)
        assert not any(world.index._entries[slot].leases for slot in leased)
    assert done == 7 and world.pool.get_num_free_blocks() == 400
    tokens = np.concatenate([text(50, 33), *parts])
    pieces = [Piece(a, b) for a, b in pairwise([0, 33, *range(73, 314, 40)])]
    found = find(tokens, pieces, Known(world.index, b"n", (), "isolated", BOS))
    assert [f.kind for f in found] == ["moved"] * 7


def test_of_a_text_whose_first_chunks_are_lost_no_more_is_computed_for_ever() -> None:
    world = World(isolated_tokens=40)
    parts = [text(i, 40) for i in range(1, 5)]
    world.prompt(text(0, 40), *parts, spans=[(0, 40), (40, 200)])
    steps = 0
    while world.isolation.pending and (steps := steps + 1) < 100:
        encodes = world.step()
        world.done(encodes)
        for encode in encodes:  # each evicts the one before it
            for load in encode.loads or [*encode.saves]:
                slot = load.slot if hasattr(load, "slot") else load.record.slot
                world.index.drop(slot)
    assert steps < 30 and world.pool.get_num_free_blocks() == 400


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(16, 300), min_size=1, max_size=12),
    rate=st.integers(16, 200),
    steps=st.lists(st.tuples(st.sampled_from([0, 0, 4, 64, 512]), st.booleans()), max_size=60),
    again=st.booleans(),
)
def test_no_step_computes_more_than_it_may(
    sizes: list[int], rate: int, steps: list[tuple[int, bool]], again: bool
) -> None:
    """But for one chunk that has more by itself; whatever waits, and however long nothing ran."""
    world = World(rows=512, isolated_tokens=rate)
    world.prompt(text(0, 40), *(text(i + 1, T) for i, T in enumerate(sizes)), again=again)
    done: Counter[int] = Counter()
    for n, (scheduled, prompts) in enumerate(steps * 4):
        encodes = world.step(scheduled, prompts and scheduled > 0)
        computed = [len(e.tokens) - e.first for e in encodes]
        assert sum(computed) <= rate or len(computed) == 1 == len(encodes[0].saves), n
        done.update(computed)
        world.done(encodes)
    assert all(done[T] <= sizes.count(T) for T in done)
    assert world.pool.get_num_free_blocks() == 400
