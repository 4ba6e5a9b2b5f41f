"""KV events without an engine: what the scheduler's side makes of what happens to chunks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash as h

from lmc.connectors.vllm.events import BLENDED, HOST, TIER, Events
from lmc.connectors.vllm.messages import Kept
from lmc.connectors.vllm.tracked import Tracked
from lmc.store import Index, Record

NBYTES = 100


def put(index: Index, seed: int, start: int = 0, T: int = 5) -> Record:
    ids = np.random.default_rng(seed).integers(0, 100, T).astype("<i8").tobytes()
    digests = [bytes([seed, i] * 16) for i in range(3)]
    record = index.put(
        namespace=b"n", key=digests[0], tokens=ids, start=start, context=digests[1],
        context_after=digests[2], origin="exact", nbytes=NBYTES,
    )  # fmt: skip
    assert record is not None
    return record


def received(events: list[Any]) -> list[Any]:
    """As a subscriber decodes what vLLM sends."""
    sent = msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=events))
    return msgspec.msgpack.decode(sent, type=KVEventBatch).events


def test_a_chunk_is_published_once_every_rank_has_it_and_when_it_goes() -> None:
    index = Index(3 * NBYTES, ranks=2)
    events = Events(index, ranks=2, block_size=32)
    a, b = put(index, 1), put(index, 2, start=7)
    index.acknowledge(a.slot, 0)
    assert events.take() == []
    index.acknowledge(a.slot, 1)
    index.acknowledge(a.slot, 1)
    for rank in range(2):
        index.acknowledge(b.slot, rank)
    first, second = received(events.take())
    assert isinstance(first, BlockStored) and isinstance(second, BlockStored)
    assert (
        first.block_hashes == [h(a.id)]
        and first.token_ids == np.frombuffer(a.tokens, "<i8").tolist()
    )
    assert (first.medium, first.block_size, first.locality) == (HOST, 5, "LOCAL")
    # Only what began a prompt looks like the beginning of one.
    assert first.parent_block_hash is None and second.parent_block_hash == h(b.context)
    assert second.extra_keys == [("lmc", "exact", 7, b.key, b.context, b.context_after)]
    c, d = put(index, 3), put(index, 4)  # `a` goes for the last one, `c` was never whole
    index.acknowledge(d.slot, 0)
    index.acknowledge(d.slot, 1)
    index.drop(c.slot)
    index.clear()
    gone, stored, rest = received(events.take())
    assert gone == BlockRemoved([h(a.id)], HOST, locality="LOCAL")
    assert stored.block_hashes == [h(d.id)]
    assert set(rest.block_hashes) == {h(b.id), h(d.id)} and rest.medium == HOST
    assert events.take() == []


def test_a_tier_has_a_chunk_when_all_ranks_put_it_there_and_lost_it_when_one_has() -> None:
    index = Index(10 * NBYTES, ranks=2)
    events = Events(index, ranks=2, block_size=32)
    a, b = put(index, 1), put(index, 2)
    events.kept([Kept("disk", 0, a), Kept("disk", 0, b), Kept("disk", 0, a)])
    assert events.take() == []
    events.kept([Kept("disk", 1, a)])
    (stored,) = received(events.take())
    assert (stored.medium, stored.ownership, stored.block_hashes) == (TIER, "disk", [h(a.id)])
    events.removed([("disk", a.id), ("disk", b.id), ("disk", a.id)])
    assert received(events.take()) == [BlockRemoved([h(a.id), h(b.id)], TIER, ownership="disk")]
    events.kept([Kept("disk", 1, b)])  # gone on the other rank meanwhile
    assert events.take() == []


def test_blended_blocks_are_marked_by_the_hashes_that_vllm_gives_them() -> None:
    events = Events(Index(NBYTES), ranks=1, block_size=4)
    hashes = [bytes([i] * 32) for i in range(4)]
    request = SimpleNamespace(
        block_hashes=hashes, num_prompt_tokens=15, all_token_ids=list(range(17))
    )
    tracked = Tracked(request, None, None)
    for blended_from, first in ((0, 0), (6, 1)):
        tracked.blended_from = blended_from
        events.blended(tracked)
        (event,) = received(events.take())
        assert event.medium == BLENDED and event.block_hashes == [h(x) for x in hashes[first:3]]
        assert event.token_ids == list(range(4 * first, 12)) and event.block_size == 4
        assert event.parent_block_hash == (h(hashes[first - 1]) if first else None)
    tracked.blended_from = 14  # in a block that is not full
    events.blended(tracked)
    assert events.take() == []
