"""The store as a library: lookup, retrieve and save, with and without a disk behind memory."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from docs.example_tier import Example, Remembering
from lmc.store.lookup import Found
from lmc.store.memory import HostMemory
from lmc.store.store import Store
from lmc.store.tier import Progress
from tests.store.library import LAYOUT, SPANS, TOKENS, kv, store


def test_what_is_saved_is_known_and_given_back() -> None:
    with store() as s:
        whole = kv(1, 400)
        assert s.lookup(TOKENS, SPANS) == []
        assert s.save(TOKENS, whole, SPANS) == 3
        assert s.save(TOKENS, whole, SPANS) == 0
        found = s.lookup(TOKENS, SPANS)
        assert [(f.start, f.end, f.kind, s.where(f)) for f in found] == [
            (start, end, "exact", "memory") for start, end in SPANS
        ]
        for f in found:
            got = s.retrieve(f)
            assert got is not None and torch.equal(got, whole[:, :, f.start : f.end])


def test_elsewhere_it_is_moved() -> None:
    with store() as s:
        s.save(TOKENS, kv(1, 400), SPANS)
        front = [7] * 30
        found = s.lookup([*front, *TOKENS[250:], 5], [(30, 180)])
        assert [(f.start, f.end, f.kind, f.delta) for f in found] == [(30, 180, "moved", -220)]
        assert found[0].record.origin == "exact"


def test_a_tail_is_found_where_its_context_is_and_only_there() -> None:
    with store() as s:
        s.save(TOKENS, kv(1, 400), SPANS[:2])  # the last run, which no cut has ended
        assert s.lookup(TOKENS, SPANS[:2])[-1].end == 400
        longer = [*TOKENS, 1, 2, 3]
        last = s.lookup(longer, SPANS[:2])[-1]
        assert (last.start, last.end, last.kind) == (last.record.start, 400, "exact")
        elsewhere = s.lookup([9, *longer], [(1, 101), (101, 251)])
        assert not [f for f in elsewhere if f.record.tail]


@pytest.mark.parametrize("write", ["through", "back"])
def test_it_outlives_the_process_that_saved_it(tmp_path: Path, write: str) -> None:
    whole = kv(1, 400)
    with store(tmp_path / "kv", write=write) as s:
        s.save(TOKENS, whole, SPANS)
    with store(tmp_path / "kv") as s:
        found = s.lookup(TOKENS, SPANS)
        assert [(f.kind, s.where(f)) for f in found] == [("exact", "disk")] * 3
        got = s.retrieve(found[1])
        assert got is not None and torch.equal(got, whole[:, :, 100:250])
        assert [s.where(f) for f in s.lookup(TOKENS, SPANS)] == ["disk", "memory", "disk"]
        s.prefetch(TOKENS, SPANS)
        for f in found:
            got = s.retrieve(f)
            assert got is not None and torch.equal(got, whole[:, :, f.start : f.end])


def test_memory_that_is_too_small_is_no_loss(tmp_path: Path) -> None:
    """More than memory holds: what is pushed out is on disk, and comes back."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 9999, 200) for _ in range(20)]
    room = 3 * 200 * LAYOUT.bytes_per_token
    with store(tmp_path / "kv", memory_bytes=room) as s:
        for i, tokens in enumerate(prompts):
            assert s.save(tokens, kv(i, 200), [(0, 200)]) == 1
            s.drain()
        assert s.index.counts["evicted"] == 17
        for i, tokens in enumerate(prompts):
            (found,) = s.lookup(tokens, [(0, 200)])
            got = s.retrieve(found)
            assert got is not None and torch.equal(got, kv(i, 200))


def test_tenants_do_not_read_each_others_chunks(tmp_path: Path) -> None:
    with store(tmp_path / "kv", namespace=b"model+one") as s:
        s.save(TOKENS, kv(1, 400), SPANS)
        mine = s.lookup(TOKENS, SPANS)
    with store(tmp_path / "kv", namespace=b"model+two") as s:
        assert s.lookup(TOKENS, SPANS) == []
        # Nor with a record that says whose it is: the key of a content holds the namespace.
        from dataclasses import replace

        forged = [replace(f.record, namespace=b"model+two", slot=-1) for f in mine]
        assert [s.retrieve(record) for record in forged] == [None] * 3


def test_a_chunk_that_is_damaged_on_disk_is_a_miss(tmp_path: Path) -> None:
    with store(tmp_path / "kv") as s:
        s.save(TOKENS, kv(1, 400), SPANS)
    segment = min((tmp_path / "kv" / "segments").iterdir())
    data = bytearray(segment.read_bytes())
    data[4096 + 50] ^= 1  # of the first record's payload
    segment.write_bytes(data)
    with store(tmp_path / "kv") as s:
        found = s.lookup(TOKENS, SPANS)
        assert [f.start for f in found] == [0, 100, 250]
        assert s.retrieve(found[0]) is None
        assert s.retrieve(found[1]) is not None
        assert s.tiers[0].counts["damaged:payload"] == 1
        assert [f.start for f in s.lookup(TOKENS, SPANS)] == [100, 250]
        assert s.save(TOKENS, kv(1, 400), SPANS) == 2  # the lost one, and the last from disk
        s.drain()
    with store(tmp_path / "kv") as s:
        assert [s.where(f) for f in s.lookup(TOKENS, SPANS)] == ["disk"] * 3


def test_wrong_input_is_refused_before_anything_is_stored() -> None:
    with store() as s:
        with pytest.raises(ValueError, match=r"got KV \[3, 2, 399, 2, 16\]"):
            s.save(TOKENS, kv(1, 399))
        with pytest.raises(ValueError, match=r"bfloat16, want \[3, 2, 400, 2, 16\] of float32"):
            s.save(TOKENS, kv(1, 400).bfloat16())
        with pytest.raises(ValueError, match="span"):
            s.save(TOKENS, kv(1, 400), [(10, 5)])
        assert len(s.index) == 0
    with pytest.raises(ValueError, match="memory_bytes: got 10, allowed: at least"):
        store(memory_bytes=10)
    with pytest.raises(ValueError, match="unknown tier: got 'tape'; valid: disk"):
        Store(LAYOUT, b"", tiers=["tape"])
    disk = {"name": "disk", "path": "/nowhere", "capacity": "1GiB"}
    with pytest.raises(ValueError, match="capacity: got 'much', want a number such as"):
        Store(LAYOUT, b"", tiers=[disk | {"capacity": "much"}])
    with pytest.raises(ValueError, match="compression: got 'int3', valid: none, zstd"):
        Store(LAYOUT, b"", tiers=[disk | {"compression": "int3"}])
    with pytest.raises(ValueError, match="unknown field size; valid: path, capacity, write"):
        Store(LAYOUT, b"", tiers=[disk | {"size": 1}])


def test_a_chunk_that_was_evicted_since_it_was_found_is_a_miss() -> None:
    with store(memory_bytes=450 * LAYOUT.bytes_per_token) as s:
        s.save(TOKENS, kv(1, 400), SPANS)
        found = s.lookup(TOKENS, SPANS)
        s.save(TOKENS + 1, kv(2, 400), SPANS)
        assert [s.retrieve(f) for f in found] == [None] * 3
        assert [s.where(f) for f in found] == [""] * 3
        assert s.save(TOKENS, kv(1, 400), SPANS) == 3  # and nothing is held for them
        for f, got in zip(found, s.retrieve_many(s.lookup(TOKENS, SPANS)), strict=True):
            assert got is not None and torch.equal(got, kv(1, 400)[:, :, f.start : f.end])


def test_what_is_prefetched_and_never_used_is_in_nobodys_way(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 9999, 200) for _ in range(12)]
    with store(tmp_path / "kv", memory_bytes=3 * 200 * LAYOUT.bytes_per_token) as s:
        for i, tokens in enumerate(prompts):
            s.save(tokens, kv(i, 200), [(0, 200)])
            assert s.drain()
        for tokens in prompts:  # one after the other, as they come
            s.prefetch(tokens, [(0, 200)])
        for i in range(3):  # what is new finds room at once
            assert s.save(prompts[0] + 1 + i, kv(50 + i, 200), [(0, 200)]) == 1
        for i, tokens in enumerate(prompts):
            (got,) = s.retrieve_many(s.lookup(tokens, [(0, 200)]))
            assert got is not None and torch.equal(got, kv(i, 200))
        assert all(not entry.missing for entry in s.index._entries.values())


def test_many_chunks_are_brought_together_even_where_memory_has_no_room_for_all(
    tmp_path: Path,
) -> None:
    spans = [(i, i + 50) for i in range(0, 400, 50)]
    with store(tmp_path / "kv") as s:
        s.save(TOKENS, kv(1, 400), spans)
    with store(tmp_path / "kv", memory_bytes=150 * LAYOUT.bytes_per_token) as s:
        found = s.lookup(TOKENS, spans)
        got = s.retrieve_many([*found, found[0]])
        assert all(not entry.leases for entry in s.index._entries.values())
        assert len(found) == 8 and len(got) == 9
        for f, chunk in zip([*found, found[0]], got, strict=True):
            assert chunk is not None and torch.equal(chunk, kv(1, 400)[:, :, f.start : f.end])
        assert s.retrieve_many([]) == []


class Kept(torch.autograd.Function):
    """A layer that keeps its input for the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()


def test_a_graph_of_gradients_is_not_kept(tmp_path: Path) -> None:
    with store() as s:
        made = Kept.apply(kv(1, 400).requires_grad_())
        node = weakref.ref(made.grad_fn)
        s.save(TOKENS, made, SPANS)
        del made
        gc.collect()
        assert node() is None
        got = s.retrieve(s.lookup(TOKENS, SPANS)[0])
        assert got is not None and not got.requires_grad
        assert np.array_equal(got.numpy(), kv(1, 400)[:, :, :100].numpy())


def test_drained_says_what_tiers_lack() -> None:
    faulty: Any = {"name": "tests.store.faulty:FaultyExample", "place": "drained", "rate": 1.0}
    s = Store(LAYOUT, b"model", memory_bytes=450 * LAYOUT.bytes_per_token, tiers=[faulty])
    tier: Any = s.tiers[0]
    s.save(TOKENS, kv(1, 400), SPANS)
    drained = s.drain()
    assert not drained and drained.lacking == {"example": 3} and drained.lost == 0
    tier.rate = 0.0
    assert s.drain() and s.drain().lacking == {"example": 0}
    tier.rate = 1.0
    s.save(TOKENS + 1, kv(1, 400), SPANS)
    s.save(TOKENS + 2, kv(1, 400), SPANS)  # pushes out what no tier has taken
    drained = s.drain()
    assert not drained and drained.lacking == {"example": 3} and drained.lost == 3
    tier.rate = 0.0
    assert s.drain()
    stats = s.stats()
    assert (stats["chunks"], stats["capacity"]) == (3, 450 * LAYOUT.bytes_per_token)
    assert stats["size"] == 400 * LAYOUT.bytes_per_token
    assert stats["tiers"]["example"]["durability"] == "evictable"
    s.close()


def test_a_queue_that_is_too_small_is_filled_as_often_as_it_takes(tmp_path: Path) -> None:
    with store(tmp_path / "kv") as s:
        s.chunks._writers[0]._staging = HostMemory(LAYOUT, 160 * LAYOUT.bytes_per_token)
        spans = [(i, i + 50) for i in range(0, 400, 50)]
        s.save(TOKENS, kv(1, 400), spans)
        assert s.drain()
        assert s.tiers[0].contains([f.record for f in s.lookup(TOKENS, spans)]) == [True] * 8


class Endless(Remembering):
    """A tier that brings nothing, and never says that it will not."""

    name = "endless"

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.get_many = lambda wanted: [self for _ in wanted]

    def poll(self) -> Progress:
        return Progress(0, None)

    def cancel(self) -> None:
        pass


@dataclass(frozen=True)
class EndlessConfig(Example):
    def open(self, *arguments: Any, **options: Any) -> Any:
        return Endless(self.place)


def test_a_tier_that_never_ends_holds_a_quarter_of_memory_and_the_rest_goes_on() -> None:
    spans = [(i, i + 20) for i in range(0, 400, 20)]
    endless = {"name": "tests.store.test_store:EndlessConfig", "place": "endless"}
    room = 200 * LAYOUT.bytes_per_token
    with Store(LAYOUT, b"m", memory_bytes=4 << 20, tiers=[endless]) as s:
        s.save(TOKENS, kv(1, 400), spans)
        assert s.drain()
    s = Store(LAYOUT, b"m", memory_bytes=room, tiers=[endless], patience_s=0.3)
    assert s.retrieve_many(s.lookup(TOKENS, spans)) == [None] * 20
    for i in range(1, 30):
        assert s.save(TOKENS[:100] + i, kv(i, 100), [(0, 100)]) == 1
        found = s.lookup(TOKENS[:100] + i, [(0, 100)])
        got = s.retrieve(found[0])
        assert got is not None and torch.equal(got, kv(i, 100))
    assert room // 8 < s.index._lent_bytes <= room // 4
    assert s.index.size + s.index._lent_bytes <= room
    s.chunks.close(1.0)
    s.close()


def test_who_is_tired_of_waiting_leaves_nothing_held() -> None:
    spans = [(i, i + 20) for i in range(0, 400, 20)]
    endless = {"name": "tests.store.test_store:EndlessConfig", "place": "tired"}
    with Store(LAYOUT, b"m", memory_bytes=4 << 20, tiers=[endless]) as s:
        s.save(TOKENS, kv(1, 400), spans)
        assert s.drain()
    s = Store(LAYOUT, b"m", memory_bytes=4 << 20, tiers=[endless], patience_s=60)
    found = s.lookup(TOKENS, spans)
    for one in found:
        arrival = s.chunks.arrival

        def tired(slot: int) -> Any:
            raise KeyboardInterrupt

        s.chunks.arrival = tired  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            s.retrieve(one)
        s.chunks.arrival = arrival  # type: ignore[method-assign]
    assert not s.index._pinned_bytes and len(s.index) == 0
    s.chunks.close(1.0)
    s.close()


def test_found_says_how_far_keys_must_move() -> None:
    with store() as s:
        s.save(TOKENS, kv(1, 400), SPANS)
        (first, *_) = s.lookup(TOKENS, SPANS)
        assert Found(50, 150, "moved", first.record, 50).delta == 50
