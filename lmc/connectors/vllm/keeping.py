"""What workers must copy out of a request's blocks."""

from __future__ import annotations

import numpy as np

from lmc.chunking import Chunker
from lmc.chunking.pieces import split
from lmc.connectors.vllm.messages import ChunkSave
from lmc.connectors.vllm.tracked import Tracked
from lmc.store import Index
from lmc.store.keep import keep


def chunks_to_keep(
    tracked: Tracked,
    chunker: Chunker,
    index: Index,
    computed: int,
    blocks: list[int],
    bytes_per_token: int,
) -> list[ChunkSave]:
    """Room in `index` for every chunk of the first `computed` tokens that it lacks.

    Args:
        blocks: the request's block ids, in order.
        bytes_per_token: of one rank.

    Returns:
        What the workers must copy out of those blocks.
    """
    assert tracked.options is not None
    tokens = np.asarray(tracked.request.all_token_ids[:computed], "<i8")
    pieces = split(tokens, chunker, tracked.options.chunks)
    kept = keep(index, tracked.namespace, tokens, pieces, tracked.blended_from, bytes_per_token)
    request_id = tracked.request.request_id
    return [ChunkSave(r, request_id, p.start, p.end, blocks) for p, r in kept]
