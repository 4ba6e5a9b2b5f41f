"""Which chunks of a request are stored."""

from __future__ import annotations

import numpy as np

from lmc.chunk import chunk_key, context_digests, split
from lmc.chunking import Chunker
from lmc.connectors.vllm.messages import ChunkSave
from lmc.connectors.vllm.tracked import Tracked
from lmc.store import Index, origin_of


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
    contexts = context_digests(tokens, [*(p.start for p in pieces), computed])
    saves = []
    for piece, context, after in zip(pieces, contexts, contexts[1:], strict=False):
        ids = tokens[piece.start : piece.end]
        record = index.put(
            namespace=tracked.namespace,
            key=chunk_key(tracked.namespace, ids),
            tokens=ids.tobytes(),
            start=piece.start,
            context=context,
            context_after=after,
            origin=origin_of(piece.start, pieces[0].end, tracked.blended_from, piece.end),
            nbytes=len(ids) * bytes_per_token,
            tail=not piece.closed,
        )
        if record is not None:
            request_id = tracked.request.request_id
            saves.append(ChunkSave(record.slot, request_id, piece.start, piece.end, blocks))
    return saves
