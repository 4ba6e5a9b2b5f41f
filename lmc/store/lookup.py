"""What of a prompt is stored: in host memory, and in the tiers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from lmc.chunking.pieces import Piece, chunk_key, context_digests
from lmc.store.index import Index
from lmc.store.record import Record

# Of several variants to move, the one with the least foreign context.
FOREIGN = {"isolated": 0, "anchored": 0, "exact": 1, "blended": 2}


@dataclass(frozen=True)
class Found:
    """Tokens `[start, end)` of a prompt that a stored chunk serves.

    Attributes:
        kind: `exact` behind what stands before them here, or `moved`: to be rotated and blended.
        record: what is known of the chunk, and where it is.
        at: the prompt's position of the chunk's first token; before `start` where an engine has
            the chunk's first tokens already.
    """

    start: int
    end: int
    kind: Literal["exact", "moved"]
    record: Record
    at: int

    @property
    def delta(self) -> int:
        """Positions that the chunk's keys must move by."""
        return self.at - self.record.start


class Directory(Protocol):
    """Tells, without reading bytes, what a tier has of a content."""

    def find(self, namespace: bytes, key: bytes) -> list[Record]:
        """Variants of one content, the oldest first; tails excepted."""
        ...

    def tail(self, namespace: bytes, context: bytes) -> Record | None:
        """The tail that continues `context`."""
        ...


class Known:
    """What one namespace has, host memory first.

    Args:
        index: of host memory.
        tiers: behind it, in order. Their records have no slot: `Index.adopt` gives them one.
    """

    def __init__(self, index: Index, namespace: bytes, tiers: Sequence[Directory] = ()) -> None:
        self._index, self.namespace, self._tiers = index, namespace, tiers

    def variants(
        self, key: bytes, tokens: bytes, context: bytes, chained: bool = True
    ) -> list[Record]:
        """Variants of the content `tokens`, the latest first; all that memory has, or more.

        Tiers are asked as long as nothing is known, or nothing that is exact in `context`.

        Args:
            chained: whether all before it is exact or the engine's own. Else a tier is not asked
                for an exact one beside what memory has: it would have had those before it too.
        """
        known = [r for r in self._index.variants(key) if r.tokens == tokens]
        for tier in self._tiers:
            if known and (not chained or any(exact_in(r, context) for r in known)):
                break
            held = {r.id for r in known}
            found = reversed(tier.find(self.namespace, key))
            known += [r for r in found if r.tokens == tokens and r.id not in held]
        return known

    def tail(self, context: bytes, content: bytes, chained: bool = True) -> Record | None:
        """The tail behind `context` that `content` starts with; the longest there is."""
        tails = [self._index.tail(self.namespace, context)]
        if chained:
            tails += [tier.tail(self.namespace, context) for tier in self._tiers]
        fits = [t for t in tails if t is not None and content.startswith(t.tokens)]
        return max(fits, key=lambda t: t.T, default=None)


def exact_in(record: Record, context: bytes) -> bool:
    """Whether a record is, behind `context`, what full prefill would give."""
    return record.context == context and record.origin != "blended"


def find(
    tokens: np.ndarray,
    pieces: Sequence[Piece],
    known: Known,
    local: int = 0,
    moves: bool = True,
) -> list[Found]:
    """Every stored chunk of tokens [T] that reaches past `local`, whole, in order.

    Args:
        pieces: the chunks of the prompt, a partition of `[0, T)`.
        local: tokens that the engine has already.
        moves: whether chunks may be used outside their exact context.
    """
    contexts = context_digests(tokens, [p.start for p in pieces])
    ids = np.ascontiguousarray(tokens, "<i8")
    everything: list[Found] = []
    before: Found | None = None  # the moved chunk that ends where this piece starts
    reached = local  # exact, or the engine's own, as far as this
    for piece, context in zip(pieces, contexts, strict=True):
        if piece.end <= local:
            continue
        content = ids[piece.start : piece.end].tobytes()
        key = chunk_key(known.namespace, tokens[piece.start : piece.end])
        chained = reached >= piece.start
        variants = known.variants(key, content, context, chained)
        exact = [r for r in variants if exact_in(r, context)]
        if exact:
            found = Found(piece.start, piece.end, "exact", exact[0], piece.start)
        elif tail := known.tail(context, content, chained):
            found = Found(piece.start, piece.start + tail.T, "exact", tail, piece.start)
        elif variants and moves:
            record = _best_variant(variants, before, piece.start)
            found = Found(piece.start, piece.end, "moved", record, piece.start)
        else:
            before = None
            continue
        everything.append(found)
        reached = found.end if found.kind == "exact" else reached
        before = found if found.kind == "moved" else None
    return everything


def _best_variant(known: list[Record], before: Found | None, start: int) -> Record:
    """The variant with the least foreign context.

    One that was stored right behind what now stands before it; else one encoded alone or
    behind the shared prefix, else the latest exact one, else a blended one.
    """
    if before is not None:
        for record in known:
            if continues(before, record, start):
                return record
    return min(known, key=lambda record: FOREIGN[record.origin])


def continues(before: Found, record: Record, start: int) -> bool:
    """Whether `record`, placed at `start`, was stored right behind what `before` places."""
    return (
        record.context == before.record.context_after
        and start == before.end
        and start - record.start == before.delta
    )
