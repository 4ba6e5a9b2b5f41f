"""What lmc stores, lets go of and blends, as KV events of vLLM's: for routers that follow them.

vLLM's event is of blocks that stand one behind the other from a prompt's first token on. A chunk is
not: it has a length of its own and serves at any position. So it is published as one block of that
length in a medium of lmc's own, which who does not know it leaves alone; its tokens say what it is,
`extra_keys` the rest. Its parent is no block's hash unless it began a prompt, so that nobody takes
it for the beginning of one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

from lmc.connectors.vllm.messages import Kept
from lmc.connectors.vllm.states import is_state
from lmc.connectors.vllm.tracked import Tracked
from lmc.store import Index, Record

HOST = "LMC_CPU"
TIER = "LMC_STORAGE"
BLENDED = "LMC_BLENDED"
PARTLY = 1 << 14  # chunks that some ranks have put into a tier, and others have yet to


def published(vllm_config: Any) -> bool:
    """Whether vLLM publishes KV events."""
    config = vllm_config.kv_events_config
    return config is not None and bool(config.enable_kv_cache_events)


class Events:
    """Gathers them on the scheduler's side, for vLLM to publish with its own.

    Args:
        index: of host memory, which tells of its changes from now on.
        ranks: workers that must have a chunk before a tier counts as having it.
        block_size: tokens of a block of vLLM's.
    """

    def __init__(self, index: Index, ranks: int, block_size: int) -> None:
        self._index, self._ranks, self._block_size = index, ranks, block_size
        index.changes = []
        self._others: list[KVCacheEvent] = []  # than those of host memory
        self._partly: OrderedDict[tuple[str, bytes], set[int]] = OrderedDict()

    def kept(self, told: Iterable[Kept]) -> None:
        """Ranks have chunks in tiers: published when all of them have."""
        for tier, rank, record in told:
            if is_state(record):
                continue
            ranks = self._partly.setdefault((tier, record.id), set())
            ranks.add(rank)
            if len(ranks) == self._ranks:
                del self._partly[tier, record.id]
                self._others.append(_stored(record, TIER, tier))
        while len(self._partly) > PARTLY:
            self._partly.popitem(last=False)

    def removed(self, told: Iterable[tuple[str, bytes]]) -> None:
        """Tiers have let go of chunks, on any rank."""
        by_tier: dict[str, dict[bytes, None]] = {}
        for tier, id in told:
            by_tier.setdefault(tier, {})[id] = None
            self._partly.pop((tier, id), None)
        for tier, ids in by_tier.items():
            self._others.append(_removed(ids, TIER, tier))

    def blended(self, tracked: Tracked) -> None:
        """A request's blocks from its first moved token on are of no plain prompt.

        vLLM publishes them too, under the same hashes, as it does all of its blocks.
        """
        assert tracked.blended_from is not None
        first = tracked.blended_from // self._block_size
        hashes = tracked.request.block_hashes
        n = min(len(hashes), tracked.request.num_prompt_tokens // self._block_size)
        if first < n:
            start, end = first * self._block_size, n * self._block_size
            event = BlockStored(
                block_hashes=[maybe_convert_block_hash(h) for h in hashes[first:n]],
                parent_block_hash=maybe_convert_block_hash(hashes[first - 1]) if first else None,
                token_ids=list(tracked.request.all_token_ids[start:end]),
                block_size=self._block_size,
                lora_id=None,
                medium=BLENDED,
                lora_name=None,
                locality="LOCAL",
            )
            self._others.append(event)

    def take(self) -> list[KVCacheEvent]:
        """All that happened since the last call, in its order."""
        changes, self._index.changes = self._index.changes or [], []
        events: list[KVCacheEvent] = []
        gone: list[bytes] = []  # that stand behind each other: one event
        for record, here in changes:
            if is_state(record):  # no KV of the tokens that it is named by
                continue
            if not here:
                gone.append(record.id)
                continue
            if gone:
                events.append(_removed(gone, HOST, None))
                gone = []
            events.append(_stored(record, HOST, None))
        if gone:
            events.append(_removed(gone, HOST, None))
        others, self._others = self._others, []
        return events + others


def _stored(record: Record, medium: str, tier: str | None) -> BlockStored:
    about = ("lmc", record.origin, record.start, record.key, record.context, record.context_after)
    return BlockStored(
        block_hashes=[maybe_convert_block_hash(BlockHash(record.id))],
        parent_block_hash=maybe_convert_block_hash(BlockHash(record.context))
        if record.start
        else None,
        token_ids=np.frombuffer(record.tokens, "<i8").tolist(),
        block_size=record.T,
        lora_id=None,
        medium=medium,
        lora_name=None,
        extra_keys=[about],
        locality=None if tier else "LOCAL",
        ownership=tier,
    )


def _removed(ids: Iterable[bytes], medium: str, tier: str | None) -> BlockRemoved:
    return BlockRemoved(
        block_hashes=[maybe_convert_block_hash(BlockHash(id)) for id in ids],
        medium=medium,
        locality=None if tier else "LOCAL",
        ownership=tier,
    )
