"""What requests leave in the store, until the workers have copied it out of their blocks."""

from __future__ import annotations

import numpy as np

from lmc.chunking.pieces import split
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.messages import ChunkSave
from lmc.connectors.vllm.tracked import Tracked
from lmc.store import Index
from lmc.store.keep import keep


class Keeping:
    """Decides which chunks of a request are stored, and knows which are on their way.

    Args:
        bytes_per_token: of one rank.
        ranks: workers that must say that they have a chunk.
    """

    def __init__(self, config: LMCConfig, index: Index, bytes_per_token: int, ranks: int) -> None:
        self._index, self._ranks, self._bytes_per_token = index, ranks, bytes_per_token
        self._chunker = config.build_chunker()
        self._longest = config.limits.chunk_tokens
        self._saves: list[ChunkSave] = []
        self._saving: dict[int, Tracked] = {}  # by slot

    def keep(self, tracked: Tracked, computed: int, blocks: list[int]) -> None:
        """Have the workers keep every chunk of the first `computed` tokens that is not stored.

        Args:
            blocks: the request's block ids, in order.
        """
        assert tracked.options is not None
        tokens = np.asarray(tracked.request.all_token_ids[:computed], "<i8")
        spans = [span for span in tracked.options.chunks or () if span[1] <= computed]
        pieces = split(tokens, self._chunker, spans, self._longest)
        namespace, blended_from = tracked.namespace, tracked.blended_from
        kept = keep(self._index, namespace, tokens, pieces, blended_from, self._bytes_per_token)
        for piece, record in kept:
            request_id = tracked.request.request_id
            self._saves.append(ChunkSave(record, request_id, piece.start, piece.end, blocks))
            tracked.unacknowledged[record.slot] = self._ranks
            self._saving[record.slot] = tracked

    def take(self) -> list[ChunkSave]:
        """What the workers must copy, each told once."""
        saves, self._saves = self._saves, []
        return saves

    def settle(self, slot: int) -> None:
        """One more rank has saved `slot`, or failed to; behind the last one nobody reads pages."""
        if tracked := self._saving.get(slot):
            tracked.unacknowledged[slot] -= 1
            if tracked.unacknowledged[slot] == 0:
                del tracked.unacknowledged[slot], self._saving[slot]
