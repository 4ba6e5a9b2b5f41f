"""Pieces of a token list, their content keys, and the digests of what stands before them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from blake3 import blake3

from lmc.chunking import Chunker


class Piece(NamedTuple):
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
    front = len(namespace).to_bytes(8, "little") + namespace
    return blake3(front + _id_bytes(tokens)).digest()


def content_keys(namespace: bytes, contents: Iterable[bytes]) -> list[bytes]:
    """As `chunk_key`, of token ids that are int64 bytes each."""
    front = len(namespace).to_bytes(8, "little") + namespace
    return [blake3(front + content).digest() for content in contents]


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


class Contexts:
    """Digests of what stands before positions of one prompt, each made when first asked for.

    All that are asked for in ascending order cost one pass over the tokens together.

    ids: the token ids' bytes, int64.
    """

    def __init__(self, ids: bytes) -> None:
        self._ids = memoryview(ids)
        self._hasher, self._done = blake3(), 0
        self._known: dict[int, bytes] = {}

    def __getitem__(self, p: int) -> bytes:
        """The digest of the first p tokens, as of `context_digests`."""
        digest = self._known.get(p)
        if digest is None:
            if p < self._done:
                self._hasher, self._done = blake3(), 0
            self._hasher.update(self._ids[self._done * 8 : p * 8])
            self._done = p
            digest = self._known[p] = self._hasher.digest()
        return digest

    def known(self, p: int) -> bytes | None:
        """The digest of the first p tokens, if it was made."""
        return self._known.get(p)

    def of_last(self, n: int, p: int, behind: bytes = b"") -> bytes:
        """The digest of the n tokens right in front of p, behind token ids of another prompt."""
        return blake3(behind + bytes(self._ids[(p - n) * 8 : p * 8])).digest()

    def learn(self, p: int, digest: bytes) -> None:
        """What it is at p is known from elsewhere."""
        self._known[p] = digest


def split(
    tokens: np.ndarray,
    chunker: Chunker,
    spans: Sequence[tuple[int, int]] | None = None,
    longest: int | None = None,
    whole: bool = False,
) -> list[Piece]:
    """Cut tokens [T] into pieces that partition `[0, T)`.

    spans: `(start, end)` of texts that may come again elsewhere. Their borders are cuts too; in
    each of them, and between them, `chunker` cuts as if it stood alone. So a text is cut alike
    whatever stands beside it, and, but for its ends, whether it was given as a span or not. What
    follows the last span ends in an open tail, as a whole list does without spans.
    longest: tokens of a piece at most; longer ones are cut there.
    whole: each span is one piece: what papers call a chunk.

    Raises ValueError for spans that are empty, overlap, descend or lie outside `[0, T)`.
    """
    T, position = len(tokens), 0
    regions: list[Piece] = []
    given = checked_spans(spans or [], T)
    for start, end in given:
        regions += [Piece(position, start), Piece(start, end)]
        position = end
    regions = [r for r in [*regions, Piece(position, T, closed=False)] if r.start < r.end]
    kept = set(given) if whole else set()
    asked = [(r.start, r.end) for r in regions if (r.start, r.end) not in kept]
    if hasattr(chunker, "cuts_within"):
        cuts = chunker.cuts_within(tokens, asked)
    else:
        cuts = [chunker.cuts(tokens[start:end]) + start for start, end in asked]
    found = dict(zip(asked, cuts, strict=True))
    pieces: list[Piece] = []
    for start, end, closed in regions:
        borders = [start, *found[start, end].tolist()] if (start, end) in found else [start]
        pieces += map(Piece, borders, borders[1:])
        if borders[-1] < end:
            pieces.append(Piece(borders[-1], end, closed))
    if longest is None or all(end - start <= longest for start, end, _ in pieces):
        return pieces
    return [part for p in pieces for part in _shorter(p, longest)]


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


def _shorter(piece: Piece, longest: int) -> list[Piece]:
    """A piece in parts of at most `longest` tokens; all but the last are closed."""
    starts = range(piece.start, piece.end, longest)
    parts = [Piece(start, min(start + longest, piece.end)) for start in starts]
    return [*parts[:-1], Piece(parts[-1].start, piece.end, piece.closed)]


def _id_bytes(tokens: np.ndarray) -> bytes:
    return np.ascontiguousarray(tokens, dtype="<i8").tobytes()
