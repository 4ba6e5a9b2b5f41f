"""Chunks copied out of the pages of an engine that is not there, piece by piece; and what fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lmc.connectors.vllm import copies as module
from lmc.connectors.vllm.config import load_config
from lmc.connectors.vllm.copies import Copies, Staging, Told, pieces, reading
from lmc.connectors.vllm.layouts import cpu_transposed_keys
from lmc.connectors.vllm.messages import ChunkSave
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedKV
from lmc.model.layout import KVLayout
from lmc.store import Record
from lmc.store.chunks import Chunks
from lmc.store.tier import Attached
from tests.connectors.vllm.grouped import one_group
from tests.store import hanging

L, G, D, P, N = 5, 2, 8, 4, 12
LAYOUT = KVLayout(L, G, D, "float32")
ROW = 2 * G * D * 4  # bytes of one row of one layer
BLOCKS = [7, 3, 10, 11, 5, 9]  # of one request


def pages() -> PagedKV:
    """As vLLM has them on a CPU, keys transposed within a page."""
    views = [cpu_transposed_keys(torch.randn(N, G, P, 2 * D)) for _ in range(L)]
    return PagedKV(k=tuple(k for k, _ in views), v=tuple(v for _, v in views))


def save_of(slot: int, start: int, end: int, blocks: Any = (BLOCKS,)) -> ChunkSave:
    T = end - start
    key = slot.to_bytes(32, "big")
    nbytes = T * LAYOUT.bytes_per_token
    record = Record(slot, b"", key, bytes(8 * T), start, key, b"", "exact", nbytes)
    return ChunkSave(record, f"request {slot}", start, end, blocks)


def expected(paged: PagedKV, start: int, end: int) -> torch.Tensor:
    slots = torch.tensor([BLOCKS[row // P] * P + row % P for row in range(start, end)])
    return gather(paged, slots)


def test_saves_behind_a_spoilt_block_are_known_in_one_pass() -> None:
    blocks, others = [list(range(100))], [list(range(200, 300))]
    saves = [save_of(i, 10 * i, 10 * i + 10, blocks) for i in range(30)]
    saves += [save_of(100 + i, 10 * i, 10 * i + 10, others) for i in range(30)]
    assert reading(saves, {}, P) == set()
    # Block 20 holds tokens 80 to 83: of no use is what ends behind token 80.
    assert reading(saves, {20: 1, 50: 1}, P) == set(range(8, 30))


class World:
    """Copies of room for `tokens` tokens, whose memory is noise at first."""

    def __init__(
        self, staging_bytes: int, tokens: int = 64, tiers: Any = (), direct: bool = False
    ) -> None:
        self.told = Told(0)
        self.chunks = Chunks(LAYOUT, tokens * LAYOUT.bytes_per_token, tiers)
        self.copies = Copies(self.chunks, self.told, one_group(L, P), staging_bytes)
        self.copies.pages = self.pages = pages()
        self.copies._staging.direct = direct  # type: ignore[union-attr]
        self.chunks.memory._buffer.random_(0, 255)

    def saved(self, save: ChunkSave) -> bool:
        """Whether the scheduler is told that it is stored, and no more than once."""
        self.copies.save(save)
        self.copies.finish()
        report = self.told.take()
        assert report is not None
        slot = save.record.slot
        assert (report.saved, report.lost) in (([(slot, 0)], []), ([], [slot]))
        return bool(report.saved)

    def close(self) -> None:
        self.copies.close()
        self.chunks.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World(1 << 20)
    yield made
    made.close()


@pytest.mark.parametrize("room", [1, 2, 3, 7, 17, 18, 34, 40, 3 * 17, 5 * 17, 1000])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_a_copy_is_what_is_in_the_pages(room: int, split: bool, direct: bool) -> None:
    """Whatever fits into the buffer, if there is one, and however the allocator has cut it."""
    w = World(room * ROW + ROW // 2, tokens=40, direct=direct)
    if split:  # 23 tokens are free: 5, 7 and 11
        for slot, T in enumerate((5, 4, 7, 6, 11, 7), start=100):
            assert w.chunks.reserve(slot, T) is not None
        for slot in (100, 102, 104):
            w.chunks.forget(slot)
    w.copies._staging._buffer.fill_(torch.nan)  # type: ignore[union-attr]
    assert w.saved(save_of(1, 2, 19))
    parts = w.chunks.parts(1)
    assert parts is not None and len(parts) == (2 if split else 1)
    assert torch.equal(torch.cat(parts, dim=2), expected(w.pages, 2, 19))
    w.close()


@pytest.mark.parametrize(("T", "room"), [(1, 1), (17, 1), (17, 5), (17, 17), (17, 50), (3, 900)])
def test_pieces_cover_every_row_once_and_fit(T: int, room: int) -> None:
    seen = torch.zeros(L, T)
    for layers, rows in pieces(L, T, room):
        seen[layers, rows] += 1
        assert 0 < seen[layers, rows].numel() <= room
    assert bool((seen == 1).all())


def test_saves_take_the_same_memory_again_and_again(world: World) -> None:
    staging = world.copies._staging
    assert isinstance(staging, Staging)
    before = (staging._buffer.data_ptr(), staging._slots.data_ptr())
    assert staging._buffer.nbytes <= 1 << 20
    for slot in range(5):
        assert world.saved(save_of(slot, slot, slot + 9))
    assert world.copies._staging is staging
    assert (staging._buffer.data_ptr(), staging._slots.data_ptr()) == before


def test_less_than_a_row_of_a_layer_is_refused_at_start() -> None:
    chunks = Chunks(LAYOUT, 1 << 16)
    with pytest.raises(ValueError, match=f"staging_bytes is {ROW - 1}.* allowed: at least {ROW}"):
        Copies(chunks, Told(0), one_group(L, P), ROW - 1)
    Copies(chunks, Told(0), one_group(L, P), ROW).close()
    with pytest.raises(ValueError, match=r"staging_bytes.*greater than 0"):
        load_config({"lmc": {"staging_bytes": 0}})


# -- what fails ----------------------------------------------------------------------------------

ERRORS = [RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit]


def still_works(world: World, slot: int) -> None:
    assert world.saved(save_of(slot, 2, 19))
    parts = world.chunks.parts(slot)
    assert parts is not None
    assert torch.equal(torch.cat(parts, dim=2), expected(world.pages, 2, 19))


def test_blocks_that_are_not_there_cost_their_save_alone(world: World) -> None:
    for slot, blocks in enumerate(([1], [1, 2, 3, 4, 99999])):
        assert not world.saved(save_of(slot, 2, 19, blocks))
    assert world.chunks.memory.size == 0 and world.chunks.counts["saves_failed"] == 2
    still_works(world, 3)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["reserve", "gather", "publish", "after", "held", "forget"])
def test_whatever_a_save_raises_is_told_and_leaves_nothing(
    where: str, error: type[BaseException], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise error(where)

    publish, held = world.chunks.publish, world.told.held

    def published(record: Record) -> None:
        publish(record)
        raise error(where)

    def told(slot: int, whole: bool = True) -> None:
        if whole:
            raise error(where)
        held(slot, whole)

    with monkeypatch.context() as patched:
        if where == "gather":
            patched.setattr(module, "gather", fails)
        elif where == "held":
            patched.setattr(world.told, "held", told)
        elif where == "after":
            patched.setattr(world.chunks, "publish", published)
        elif where == "forget":
            patched.setattr(module, "gather", fails)
            patched.setattr(world.chunks, "forget", fails)
        else:
            patched.setattr(world.chunks, where, fails)
        assert not world.saved(save_of(1, 2, 19))
    assert world.chunks.counts["saves_failed"] == 1
    world.copies.evict([1])  # as the scheduler has it of what is lost
    still_works(world, 2)
    assert world.chunks.memory.size == 17 * LAYOUT.bytes_per_token
    assert set(world.chunks._records) <= {2}


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_an_eviction_raises_gives_the_memory_back(
    error: type[BaseException], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Used:
        """An event of a device that has failed."""

        def synchronize(self) -> None:
            raise error

    assert world.saved(save_of(1, 2, 19)) and world.saved(save_of(2, 2, 19))
    with monkeypatch.context() as patched:
        patched.setattr(module, "recorded", Used)
        world.copies.evict([1])
        world.copies.finish()
    assert world.chunks.counts["evictions_failed"] == 1
    assert world.chunks.memory.size == 17 * LAYOUT.bytes_per_token
    world.copies.evict([2])
    world.copies.finish()
    assert world.chunks.memory.size == 0
    still_works(world, 3)


def test_a_fetch_that_nobody_expects_stops_nothing(world: World) -> None:
    world.copies.fetch([77])
    still_works(world, 1)
    assert world.chunks.counts["fetches_failed"] == 1


@pytest.mark.parametrize("call", hanging.CALLS)
def test_a_tier_that_hangs_keeps_neither_saves_nor_the_model(call: str) -> None:
    """`finish` is called on the model's thread, and returns while the tier still hangs."""
    tier = hanging.Hanging()
    w = World(1 << 20, tokens=(50 + 8) * 17, tiers=[Attached(tier, "through")])
    w.chunks.patience_s = 0.1
    tier.hang(call)
    for slot in range(8):
        assert w.saved(save_of(slot, 2, 19))
    w.copies.evict(range(8))
    absent = [save_of(slot, 2, 19).record for slot in range(100, 150)]
    for record in absent:
        w.chunks.expect(record)
    w.copies.fetch(record.slot for record in absent)
    w.copies.finish()
    for slot in range(20, 28):
        w.copies.save(save_of(slot, 2, 19))
    w.copies.finish()
    assert all(w.chunks.parts(slot) is not None for slot in range(20, 28))
    w.copies.close()
    tier.let_go()
    w.chunks.close()
