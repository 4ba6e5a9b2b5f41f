"""The store as a library: lookup, retrieve and save, with and without a disk behind memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmc.model.layout import KVLayout
from lmc.store.lookup import Found
from lmc.store.store import Store

LAYOUT = KVLayout(L=3, G=2, D=16, dtype="float32")
TOKENS = np.random.default_rng(0).integers(0, 9999, 400)
SPANS = [(0, 100), (100, 250), (250, 400)]


def kv(seed: int, T: int) -> torch.Tensor:
    return torch.randn(LAYOUT.shape(T), generator=torch.Generator().manual_seed(seed))


def store(path: Path | None = None, *, memory_bytes: int = 1 << 20, namespace: bytes = b"model",
          **fields: Any) -> Store:  # fmt: skip
    tiers = [{"name": "disk", "path": str(path), "capacity": "16MiB", **fields}] if path else []
    return Store(LAYOUT, namespace, memory_bytes=memory_bytes, tiers=tiers)


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


def test_found_says_how_far_keys_must_move() -> None:
    with store() as s:
        s.save(TOKENS, kv(1, 400), SPANS)
        (first, *_) = s.lookup(TOKENS, SPANS)
        assert Found(50, 150, "moved", first.record, 50).delta == 50
