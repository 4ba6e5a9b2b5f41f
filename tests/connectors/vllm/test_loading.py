"""Chunks put in place, all at once or layer by layer, in pages of an engine that is not there."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.connectors.vllm.layouts import page_slots_of
from lmc.connectors.vllm.loading import LayeredLoad, LostError, Placement, Target, find
from lmc.connectors.vllm.messages import ChunkLoad
from lmc.kernels.cases import Case, make_paged
from lmc.kernels.paged import PagedKV
from lmc.kernels.scatter import scatter
from lmc.model.layout import KVLayout
from lmc.model.rope import Rope, Rotations
from lmc.store import Record
from lmc.store.chunks import Arrival, Chunks
from lmc.store.memory import HostMemory

L, T, P, G, D = 4, 6, 4, 1, 8
LAYOUT = KVLayout(L, G, D, "float32")
NO_ROPE = "none here"


def pages() -> PagedKV:
    """Three pages a layer behind one that is nobody's, poisoned."""
    made = [tuple(torch.full((4, P, G, D), torch.nan) for _ in range(L)) for _ in range(2)]
    return PagedKV(k=made[0], v=made[1])


def record(slot: int, tokens: int = T) -> Record:
    return Record(slot, b"", b"k", bytes(8 * tokens), 0, b"", b"", "exact", 0)


class Coming:
    """Chunks on their way to pages 1, 2, 3, their first token not wanted, in two runs each."""

    def __init__(self, *slots: int) -> None:
        self.memory = HostMemory(LAYOUT, 64 * LAYOUT.bytes_per_token)
        self.paged = pages()
        self.arriving: list[tuple[ChunkLoad, Arrival]] = []
        self.chunks: list[torch.Tensor] = []
        scattered(self.memory, 4)
        for slot in slots:
            self.chunks.append(torch.randn(L, 2, T, G, D))
            parts = self.memory.reserve(slot, T)
            assert parts is not None and len(parts) == 2
            lengths = [part.shape[2] for part in parts]
            for part, rows in zip(parts, self.chunks[-1].split(lengths, dim=2), strict=True):
                part.copy_(rows)
            load = ChunkLoad(slot, 3, 3 + T - 1, 2, T, 0)
            self.arriving.append((load, Arrival(record(slot))))

    def load(self, patience_s: float) -> LayeredLoad:
        target = Target([np.arange(1, 4)], self.paged, NO_ROPE)
        return LayeredLoad(self.arriving, self.memory, target, time.monotonic() + patience_s)

    def flat(self, layer: int) -> torch.Tensor:
        return torch.stack([self.paged.k[layer][1:], self.paged.v[layer][1:]]).flatten(1, 2)


def scattered(memory: HostMemory, run: int) -> None:
    """Leave no free run of more than `run` tokens."""
    n = memory.capacity // memory.layout.bytes_per_token
    for at in range(0, n - run, run + 1):
        for slot, tokens in ((10_000 + at, run), (20_000 + at, 1)):
            assert memory.reserve(slot, tokens)
    for at in range(0, n - run, run + 1):
        memory.release(10_000 + at)


def test_a_layer_is_in_place_once_it_is_asked_for_and_no_other_is_touched() -> None:
    coming = Coming(1)
    load, arrival = coming.load(10), coming.arriving[0][1]
    threading.Timer(0.05, arrival.advance, [2]).start()
    load.until(0)
    for i in range(2):  # both had come by then
        assert torch.equal(coming.flat(i)[:, 3:8], coming.chunks[0][i, :, 1:])
        assert coming.flat(i)[:, :3].isnan().all() and coming.flat(i)[:, 8:].isnan().all()
    assert all(coming.flat(i).isnan().all() for i in (2, 3))
    arrival.advance(L)
    arrival.end(True)
    load.all()
    for i in range(L):
        assert torch.equal(coming.flat(i)[:, 3:8], coming.chunks[0][i, :, 1:])


@pytest.mark.parametrize("how", ["fails", "late"])
def test_one_that_does_not_come_is_named(how: str) -> None:
    coming = Coming(1, 2)
    (_, whole), (_, broken) = coming.arriving
    whole.advance(L)
    broken.advance(1)
    if how == "fails":
        broken.end(False)
    load = coming.load(0.1)
    load.until(0)
    with pytest.raises(LostError, match="slot 2") as lost:
        load.until(1)
    assert lost.value.load.slot == 2


def test_one_whose_room_is_let_go_of_is_lost_and_nothing_is_written() -> None:
    coming = Coming(1, 2)
    for _, arrival in coming.arriving:
        arrival.advance(1)
    coming.memory.release(2)
    with pytest.raises(LostError, match="slot 2"):
        coming.load(0.1).until(0)
    assert all(coming.flat(i).isnan().all() for i in range(L))


def test_chunks_are_held_on_their_way_or_missing() -> None:
    chunks = Chunks(LAYOUT, 1 << 14)
    for slot, tokens in ((1, T), (2, T - 1), (3, T)):
        assert chunks.reserve(slot, tokens)
        if slot != 3:
            chunks.memory.publish(slot)
    chunks.expect(record(4))
    loads = [ChunkLoad(slot, 0, T, 0, T, 0) for slot in (1, 2, 3, 4, 5, 1)]
    layered = find(chunks, loads, layered=True, deadline=time.monotonic() + 10)
    assert [load.slot for load, _ in layered.held] == [1, 1]
    assert [load.slot for load, _ in layered.arriving] == [4]
    assert [load.slot for load in layered.missing] == [2, 3, 5]  # 2 is of another length
    whole = find(chunks, loads, layered=False, deadline=time.monotonic() + 0.05)
    assert [load.slot for load in whole.missing] == [2, 3, 4, 5] and not whole.arriving
    arrival = chunks.arrival(4)
    assert arrival is not None and chunks.reserve(4, T)
    chunks.memory.publish(4)
    threading.Timer(0.05, arrival.end, [True]).start()
    whole = find(chunks, loads, layered=False, deadline=time.monotonic() + 10)
    assert [load.slot for load, _ in whole.held] == [1, 4, 1]


# -- against a chunk at a time -------------------------------------------------------------------


def one_by_one(
    loads: Sequence[ChunkLoad], memory: HostMemory, blocks: list[int], paged: PagedKV,
    rotations: Rotations,
) -> None:  # fmt: skip
    """The plain way: a scatter for each part of each chunk in each layer, -1 for rows that are not
    wanted."""
    for load in loads:
        slots = torch.full((load.T,), -1)
        wanted = np.arange(load.start, load.end)
        here = slice(load.start - load.at, load.end - load.at)
        slots[here] = page_slots_of(wanted, blocks, paged.P, paged.device)
        for part in memory.parts(load.slot) or []:
            some, slots = slots[: part.shape[2]], slots[part.shape[2] :]
            for i, which in enumerate(rotations.of):
                layer = PagedKV(paged.k[i : i + 1], paged.v[i : i + 1])
                rope = rotations.ropes[which]
                turns = load.delta and which >= 0
                angles = [torch.from_numpy(x) for x in rope.angles(load.delta)] if turns else []
                scatter(part[i : i + 1], layer, some, *angles, interleaved=rope.interleaved)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    order=st.lists(st.tuples(st.integers(0, 5), st.integers(-300, 300)), min_size=1, max_size=9),
    trims=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    run=st.integers(1, 20), R=st.sampled_from([8, 32]), interleaved=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    layout=st.sampled_from(["cpu", "nhd"]), cut=st.integers(0, 3),
    of=st.sampled_from([(0, 0, 0), (0, 1, 0), (1, -1, 0), (-1, 0, 0)]),
)  # fmt: skip
def test_a_claim_is_placed_as_its_chunks_one_by_one(
    lengths, order, trims, run, R, interleaved, dtype, layout, cut, of
) -> None:
    """Repeated chunks, some in part, in runs as memory has them: not a bit is another."""
    memory = HostMemory(KVLayout(3, 2, 32, dtype), 3000 * KVLayout(3, 2, 32, dtype).bytes_per_token)
    scattered(memory, run)
    torch.manual_seed(len(lengths))
    for slot, tokens in enumerate(lengths):
        for part in memory.reserve(slot, tokens) or []:
            part.copy_(torch.randn(part.shape))
        memory.publish(slot)
    loads, at = [], 7
    for i, delta in order:
        slot = i % len(lengths)
        # The claim begins within its first chunk, and ends within its last.
        start = at + min(trims[0], lengths[slot] - 1) * (not loads)
        end = at + lengths[slot]
        loads.append(ChunkLoad(slot, start, end, at, lengths[slot], delta if delta % 3 else 0))
        at = end + delta % 5
    last = loads[-1]
    end = max(last.start + 1, last.end - trims[1])
    loads[-1] = ChunkLoad(last.slot, last.start, end, last.at, last.T, last.delta)

    case = Case(T=at, G=2, D=32, L=3, P=P, layout=layout)
    expected, got = (make_paged(case, getattr(torch, dtype), "cpu", poisoned=False) for _ in "12")
    blocks = np.random.default_rng(at).permutation(case.N - 1) + 1
    both = (Rope(np.logspace(0, end, R // 2), interleaved, "default") for end in (-3, -5))
    rope = Rotations(tuple(both), of)
    one_by_one(loads, memory, blocks.tolist(), expected, rope)
    held = [(load, memory.runs([load.slot])[0] or []) for load in loads]
    placement = Placement(held, memory, Target([blocks], got, rope))
    for layers in ((0, cut), (cut, 3)):
        if layers[0] < layers[1]:
            placement.put(layers)
    for x, y in zip((*expected.k, *expected.v), (*got.k, *got.v), strict=True):
        assert torch.equal(x, y)


def test_what_placing_costs_grows_with_the_prompt_and_no_faster() -> None:
    """A block table or a launch a chunk would make it 64 times as much for 8 times the tokens."""
    cost = {tokens: placing_s(tokens) for tokens in (8192, 65536)}
    assert cost[65536] / cost[8192] < 12, cost


def placing_s(tokens: int) -> float:
    """Seconds of this process to place a prompt of chunks of 33 tokens, the least of several."""
    layout = KVLayout(L=1, G=1, D=2, dtype="float32")  # bytes are not what is timed
    chunks, n = Chunks(layout, tokens * layout.bytes_per_token), tokens // 33
    for slot in range(n):
        assert chunks.reserve(slot, 33)
        chunks.memory.publish(slot)
    order = np.random.default_rng(0).permutation(n).tolist()
    loads = [
        ChunkLoad(slot, i * 33, i * 33 + 33, i * 33, 33, (i - slot) * 33)
        for i, slot in enumerate(order)
    ]
    N = 1 + -(-tokens // 16)
    paged = PagedKV((torch.zeros(N, 16, 1, 2),), (torch.zeros(N, 16, 1, 2),))
    blocks = np.arange(1, N)
    rope = Rotations((Rope(np.ones(1), False, "default"),), (0,))
    taken = []
    for _ in range(7):
        start = time.process_time()
        found = find(chunks, loads, layered=True, deadline=0)
        Placement(found.held, chunks.memory, Target([blocks], paged, rope)).put()
        taken.append(time.process_time() - start)
    assert len(found.held) == n
    return min(taken)
