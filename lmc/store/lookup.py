"""What of a prompt is stored: in host memory, and in the tiers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from lmc.chunking.pieces import Piece, chunk_key, context_digests
from lmc.store.index import Index
from lmc.store.record import ContextPolicy, Record

NOTHING = context_digests(np.empty(0, np.int64), [0])[0]
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


@dataclass(frozen=True)
class Place:
    """Where in a prompt a chunk is to go.

    Attributes:
        start: its first token. context: digest of all before it.
        before: the moved chunk that ends there, if one does.
        own: digests of what a chunk that is moved here may have been computed behind.
        chained: whether all before it is exact or the engine's own. Else a tier is not asked for
            an exact one beside what memory has: it would have had those before it too.
        moves: whether chunks may be used outside their exact context.
    """

    start: int
    context: bytes
    before: Found | None
    own: AbstractSet[bytes]
    chained: bool
    moves: bool


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
        policy: what a chunk that is moved may have been computed behind.
        begins: the token that a prompt begins with, if the model has one: a chunk behind nothing
            else counts as isolated.
    """

    def __init__(
        self,
        index: Index,
        namespace: bytes,
        tiers: Sequence[Directory] = (),
        policy: ContextPolicy = "any",
        begins: int | None = None,
    ) -> None:
        self._index, self.namespace, self._tiers = index, namespace, tiers
        self.policy = policy
        first = [] if begins is None else context_digests(np.array([begins]), [1])
        self.alone = frozenset([NOTHING, *first])

    def variants(self, key: bytes, tokens: bytes, place: Place) -> list[Record]:
        """Variants of the content `tokens` that serve there, the latest first; memory's, or more.

        Tiers are asked as long as nothing is known that serves, or nothing that is exact.
        """
        known = [r for r in self._index.variants(key) if r.tokens == tokens]
        known = [r for r in known if self._serves(r, place)]
        for tier in self._tiers:
            if known and (not place.chained or any(exact_in(r, place.context) for r in known)):
                break
            held = {r.id for r in known}
            found = [r for r in reversed(tier.find(self.namespace, key)) if r.tokens == tokens]
            known += [r for r in found if r.id not in held and self._serves(r, place)]
        return known

    def _serves(self, record: Record, place: Place) -> bool:
        if exact_in(record, place.context):
            return True
        if not place.moves or self.policy == "any":
            return place.moves
        if record.origin == "blended":
            return False
        # Behind the chunk it was computed behind, it has seen nothing that is not here.
        behind = place.before is not None and continues(place.before, record, place.start)
        return behind or record.context in place.own

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
    own = set(known.alone)
    for piece, context in zip(pieces, contexts, strict=True):
        if known.policy == "shared_prefix":
            own.add(context)
        if piece.end <= local:
            continue
        content = ids[piece.start : piece.end].tobytes()
        key = chunk_key(known.namespace, tokens[piece.start : piece.end])
        chained = reached >= piece.start
        place = Place(piece.start, context, before, own, chained, moves)
        variants = known.variants(key, content, place)
        exact = next((r for r in variants if exact_in(r, context)), None)
        if exact is not None:
            found = Found(piece.start, piece.end, "exact", exact, piece.start)
        elif tail := known.tail(context, content, chained):
            found = Found(piece.start, piece.start + tail.T, "exact", tail, piece.start)
        elif variants:
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
