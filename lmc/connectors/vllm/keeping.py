"""What requests leave in the store, until the workers have copied it out of their blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from vllm.platforms import current_platform

from lmc.chunking.pieces import Piece, split
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.messages import ChunkSave, Encode
from lmc.connectors.vllm.tracked import Tracked
from lmc.store import Index
from lmc.store.keep import keep


class Keeping:
    """Decides which chunks of a request are stored, and knows which are on their way.

    No request keeps its blocks for them: the workers are told when blocks that are still to be
    read become somebody else's, and read them first.

    Args:
        bytes_per_token: of one rank.
        block_size: tokens of a block.
        ranks: workers that must say that they have a chunk.
    """

    def __init__(
        self, config: LMCConfig, index: Index, bytes_per_token: int, block_size: int, ranks: int
    ) -> None:
        self._index, self._ranks, self._bytes_per_token = index, ranks, bytes_per_token
        self._block_size = block_size
        self._chunker = config.build_chunker()
        self._longest = config.limits.chunk_tokens
        self._saves: list[ChunkSave] = []
        self._missing: dict[int, int] = {}  # by slot, ranks that have yet to say that they have it
        self._reads: dict[int, list[int]] = {}  # by slot, the blocks that it is copied from

    @property
    def pending(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._missing)

    def keep(self, tracked: Tracked, computed: int, blocks: list[int]) -> list[int]:
        """Have the workers keep every chunk of the first `computed` tokens that is not stored.

        Args:
            blocks: the request's block ids, in order.

        Returns:
            Their slots.
        """
        assert tracked.options is not None
        tokens = np.asarray(tracked.request.all_token_ids[:computed], "<i8")
        n = min(computed, tracked.request.num_prompt_tokens)
        spans = [span for span in tracked.options.chunks or () if span[1] <= n]
        pieces = split(tokens[:n], self._chunker, spans, self._longest)
        # What was answered is apart: the next turn may go on behind another answer.
        answer = split(tokens[n:], self._chunker, longest=self._longest)
        pieces += [Piece(start + n, end + n, closed) for start, end, closed in answer]
        namespace, blended_from = tracked.namespace, tracked.blended_from
        per_token = self._bytes_per_token
        of = (namespace, tokens, pieces, blended_from, per_token, spans, tracked.seen_to)
        kept = keep(self._index, *of)
        tracked.seen_to = computed
        for piece, record in kept:
            request_id = tracked.request.request_id
            self._saves.append(ChunkSave(record, request_id, piece.start, piece.end, blocks))
            self._missing[record.slot] = self._ranks
            first, end = piece.start // self._block_size, -(-piece.end // self._block_size)
            self._reads[record.slot] = blocks[first:end]
        return [record.slot for _, record in kept]

    def take(self) -> list[ChunkSave]:
        """What the workers must copy, each told once."""
        saves, self._saves = self._saves, []
        return saves

    def reading(self) -> set[int]:
        """Blocks that are still to be copied from."""
        return {block for blocks in self._reads.values() for block in blocks}

    def settle(self, slot: int) -> bool:
        """One more rank has saved `slot`, or failed to; True of the last: nobody reads pages."""
        if slot not in self._missing:
            return False
        self._missing[slot] -= 1
        if self._missing[slot]:
            return False
        del self._missing[slot], self._reads[slot]
        return True


def given_out(scheduler_output: Any, encodes: list[Encode]) -> set[int]:
    """Blocks that a step may write to for the first time."""
    new = [data.block_ids for data in scheduler_output.scheduled_new_reqs]
    new += [blocks for blocks in scheduler_output.scheduled_cached_reqs.new_block_ids if blocks]
    lent = [block for encode in encodes for block in encode.saves[0].blocks]
    return {block for groups in new for block in groups[0]}.union(lent)


def prompts_done(
    scheduler_output: Any, requests: dict[str, Tracked]
) -> Iterator[tuple[str, Tracked]]:
    """Requests whose prompts a step computes to their ends, and those that others wait for in vain
    by now, since nothing of them is stored."""
    for request_id, n in scheduler_output.num_scheduled_tokens.items():
        tracked = requests.get(request_id)
        if tracked is not None and not tracked.prompt_saved:
            done = tracked.request.num_computed_tokens + n >= tracked.request.num_prompt_tokens
            if done or (tracked.leads and not tracked.saves):
                yield request_id, tracked


def computes_prompts(scheduler_output: Any) -> bool:
    """Whether a step computes prompts, and not only answers and what was drafted of them."""
    drafts = scheduler_output.scheduled_spec_decode_tokens
    scheduled = scheduler_output.num_scheduled_tokens.items()
    return any(n > 1 + len(drafts.get(i, ())) for i, n in scheduled)


def misadapted(scheduler_output: Any, requests: dict[str, Tracked]) -> list[Tracked]:
    """Requests under no LoRA adapter that a step computes beside others, on a CPU.

    There vLLM applies the last adapter to them (`lora/ops/torch_ops` reads an index of -1 so), and
    what it leaves in their pages is of use to nobody.
    """
    ids = scheduler_output.num_scheduled_tokens
    some = [requests[i] for i in ids if i in requests]
    plain = [tracked for tracked in some if tracked.request.lora_request is None]
    mixed = 0 < len(plain) < len(some)
    return plain if mixed and current_platform.is_cpu() else []
