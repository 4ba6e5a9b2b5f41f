"""What requests leave in the store, until the workers have copied it out of their blocks."""

from __future__ import annotations

import numpy as np

from lmc.chunking.pieces import Piece, split
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.messages import ChunkSave
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

    def keep(self, tracked: Tracked, computed: int, blocks: list[int]) -> None:
        """Have the workers keep every chunk of the first `computed` tokens that is not stored.

        Args:
            blocks: the request's block ids, in order.
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

    def take(self) -> list[ChunkSave]:
        """What the workers must copy, each told once."""
        saves, self._saves = self._saves, []
        return saves

    def reading(self) -> set[int]:
        """Blocks that are still to be copied from."""
        return {block for blocks in self._reads.values() for block in blocks}

    def settle(self, slot: int) -> None:
        """One more rank has saved `slot`, or failed to; behind the last one nobody reads pages."""
        if slot in self._missing:
            self._missing[slot] -= 1
            if self._missing[slot] == 0:
                del self._missing[slot], self._reads[slot]
