"""Which chunks of a prompt are stored."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

from lmc.chunking.pieces import Piece, chunk_key, context_digests
from lmc.store.history import WINDOW
from lmc.store.index import Index
from lmc.store.record import Record, origin_of


def keep(
    index: Index,
    namespace: bytes,
    tokens: np.ndarray,
    pieces: Sequence[Piece],
    blended_from: int | None,
    bytes_per_token: int,
    spans: Sequence[tuple[int, int]] = (),
    done: int = 0,
    without: Container[int] = (),
) -> list[tuple[Piece, Record]]:
    """Make room in `index` for every chunk of tokens [T] that it lacks and takes.

    Args:
        pieces: a partition of `[0, T)`.
        blended_from: the first token whose KV is not exact, or None.
        bytes_per_token: of one rank.
        spans: texts that are cut into several of them, and count as computed as one.
        done: what ends up to here was seen to before.
        without: where chunks start of which there are no bytes.
    """
    ids = np.ascontiguousarray(tokens, "<i8")
    contexts = context_digests(ids, [*(p.start for p in pieces), len(ids)])
    ends = {start: end for start, end, _ in pieces} | dict(spans)
    first_end = ends.get(0, 0)
    second_end = ends.get(first_end)
    kept = []
    for piece, context, after in zip(pieces, contexts, contexts[1:], strict=False):
        if piece.end <= done or piece.start in without:
            continue
        content = ids[piece.start : piece.end]
        record = index.put(
            namespace=namespace,
            key=chunk_key(namespace, content),
            tokens=content.tobytes(),
            start=piece.start,
            context=context,
            context_after=after,
            origin=origin_of(piece.start, first_end, blended_from, piece.end, second_end),
            nbytes=len(content) * bytes_per_token,
            tail=not piece.closed,
        )
        if record is not None:
            kept.append((piece, record))
    if index.history is not None:
        index.history.saw(namespace, ids[max(0, done - WINDOW + 1) :])
    return kept
