"""Pieces of a token list, their content keys, and the digests of what stands before them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from blake3 import blake3

from lmc.chunking import Chunker


@dataclass(frozen=True)
class Piece:
    """Tokens `[start, end)` of a list.

    closed: False only for the tail, the last run, which no cut has ended: it may still grow.
    """

    start: int
    end: int
    closed: bool = True


def chunk_key(namespace: bytes, tokens: np.ndarray) -> bytes:
    """The content key of a chunk: BLAKE3, 32 bytes, of the namespace and the token ids [T].

    The namespace covers all that makes KV incompatible. Its length goes first, so that no
    namespace and ids join to the same bytes as another pair.
    """
    hasher = blake3(len(namespace).to_bytes(8, "little"))
    hasher.update(namespace)
    hasher.update(_id_bytes(tokens))
    return hasher.digest()


def context_digests(tokens: np.ndarray, positions: Iterable[int]) -> list[bytes]:
    """BLAKE3, 32 bytes each, of `tokens[:p]` for each of the ascending positions p, in one pass.

    tokens: [T]. Raises ValueError for positions that descend or lie outside `[0, T]`.
    """
    ids = memoryview(_id_bytes(tokens))
    hasher, done, digests = blake3(), 0, []
    for p in positions:
        if not done <= p <= len(tokens):
            raise ValueError(f"got position {p} after {done}, want ascending in [0, {len(tokens)}]")
        hasher.update(ids[done * 8 : p * 8])
        digests.append(hasher.digest())
        done = p
    return digests


def split(
    tokens: np.ndarray,
    chunker: Chunker,
    spans: Sequence[tuple[int, int]] | None = None,
    longest: int | None = None,
) -> list[Piece]:
    """Cut tokens [T] into pieces that partition `[0, T)`.

    spans: `(start, end)` that the caller wants as one chunk each. What lies between them is cut
    by `chunker` as if it stood alone, and its last run is closed by the span behind it; what
    follows the last span ends in an open tail, as a whole list does without spans.
    longest: tokens of a piece at most; longer ones are cut there.

    Raises ValueError for spans that are empty, overlap, descend or lie outside `[0, T)`.
    """
    pieces: list[Piece] = []
    position = 0
    for start, end in checked_spans(spans or [], len(tokens)):
        pieces += _cut(tokens, position, start, chunker, closed=True)
        pieces.append(Piece(start, end))
        position = end
    pieces += _cut(tokens, position, len(tokens), chunker, closed=False)
    return pieces if longest is None else [part for p in pieces for part in _shorter(p, longest)]


def checked_spans(spans: Sequence[tuple[int, int]], T: int) -> list[tuple[int, int]]:
    """Spans of T tokens as pairs of int.

    Raises ValueError for what is no pair of integers, and for spans that are empty, overlap,
    descend or lie outside `[0, T)`.
    """
    checked: list[tuple[int, int]] = []
    allowed = 0
    for span in spans:
        try:
            start, end = (operator.index(x) for x in span)
            if any(isinstance(x, bool) for x in span):
                raise TypeError
        except (TypeError, ValueError):
            raise ValueError(f"got span {span!r:.100}, want two integers (start, end)") from None
        if not allowed <= start < end <= T:
            raise ValueError(
                f"got span {f'({start}, {end})':.100}, want {allowed} <= start < end <= {T} "
                "(ascending, not empty, no overlap, inside the prompt)"
            )
        checked.append((start, end))
        allowed = end
    return checked


def _cut(tokens: np.ndarray, start: int, end: int, chunker: Chunker, closed: bool) -> list[Piece]:
    """The pieces of one region; `closed` is that of a last run without a cut."""
    borders = [start, *(chunker.cuts(tokens[start:end]) + start).tolist()]
    pieces = [Piece(a, b) for a, b in pairwise(borders)]
    if borders[-1] < end:
        pieces.append(Piece(borders[-1], end, closed))
    return pieces


def _shorter(piece: Piece, longest: int) -> list[Piece]:
    """A piece in parts of at most `longest` tokens; all but the last are closed."""
    starts = range(piece.start, piece.end, longest)
    parts = [Piece(start, min(start + longest, piece.end)) for start in starts]
    return [*parts[:-1], Piece(parts[-1].start, piece.end, piece.closed)]


def _id_bytes(tokens: np.ndarray) -> bytes:
    return np.ascontiguousarray(tokens, dtype="<i8").tobytes()
