"""What of a prompt is stored: in host memory, and in the tiers behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lmc.chunking.pieces import Contexts, Piece, context_digests
from lmc.store.directory import Answers
from lmc.store.index import Index
from lmc.store.record import ContextPolicy, Record, exact_at

# Tokens in front of a chunk that are looked at for what it was computed behind: where more stands
# between the begin of a text and the first of its chunks that is cut alike, it is not found.
AHEAD = 2048
# Of several variants to move, the one with the least foreign context.
FOREIGN = {"isolated": 0, "anchored": 0, "exact": 1, "blended": 2}


class Found(NamedTuple):
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


class Place(NamedTuple):
    """Where in a prompt a chunk is to go.

    Attributes:
        start: its first token.
        contexts: of the prompt: digests of what stands before each of its chunks up to this one.
        before: the moved chunk that ends there, if one does.
        chained: whether all before it is exact or the engine's own. Else a tier is not asked for
            an exact one beside what memory has: it would have had those before it too.
        moves: whether chunks may be used outside their exact context.
    """

    start: int
    contexts: Contexts
    before: Found | None
    chained: bool
    moves: bool


class Known:
    """What one namespace has, host memory first.

    Args:
        index: of host memory.
        tiers: behind it, in order, what they said. Their records have no slot: `Index.adopt` gives
            them one.
        policy: what a chunk that is moved may have been computed behind.
        begins: the token that a prompt begins with, if the model has one: a chunk behind nothing
            else counts as isolated.

    Attributes:
        coming: slots of what would have served, and is still being stored.
        free: whether what memory has of a content serves anywhere, and nobody else is asked.
    """

    def __init__(
        self,
        index: Index,
        namespace: bytes,
        tiers: Sequence[Answers] = (),
        policy: ContextPolicy = "any",
        begins: int | None = None,
    ) -> None:
        self._index, self.namespace = index, namespace
        self._tiers = [tier for tier in tiers if tier.ids]
        self.policy = policy
        self.coming: set[int] = set()
        self.free = policy == "any" and not self._tiers
        # What a text that was computed alone may have stood behind: token ids, by their digest.
        begin = [] if begins is None else [np.array([begins], "<i8")]
        fronts = [np.empty(0, "<i8"), *begin]
        self._alone = {context_digests(ids, [len(ids)])[0]: ids.tobytes() for ids in fronts}

    def in_memory(self, contents: Sequence[bytes]) -> Iterator[list[Record]]:
        """What memory has of each content, the latest first."""
        return self._index.variants_of(self.namespace, contents)

    def variants(self, content: bytes, stored: list[Record], place: Place) -> list[Record]:
        """Variants of a content that serve there, the latest first; memory's, or more.

        Tiers are asked as long as nothing is known that serves, or nothing that is exact.

        Args:
            stored: what memory has of it.
        """
        known = stored
        if self.policy != "any" or not place.moves:
            known = [r for r in stored if self._serves(r, place)]
        if not known:
            coming = self._index.coming(self.namespace, content)
            self.coming.update(r.slot for r in coming if self._serves(r, place))
        for tier in self._tiers:
            if known and (not place.chained or any(exact_at(r, *place[:2]) for r in known)):
                break
            held = {r.id for r in known}
            found = [r for r in reversed(tier.of(content)) if r.id not in held]
            known = [*known, *(r for r in found if self._serves(r, place))]
        return known

    def unused(self, contents: Sequence[bytes], moves: bool) -> Iterator[str | None]:
        """Why what is known of each content serves nowhere in a prompt; None if nothing is known.

        `unmoved` where it would serve if chunks were moved at all; else one of `CAUSES`.
        """
        stored = self._index.variants_of(self.namespace, contents)
        for content, here in zip(contents, stored, strict=True):
            coming = [] if here else self._index.coming(self.namespace, content)
            behind = [record for tier in self._tiers for record in tier.of(content)]
            if not moves and (here or behind):
                yield "unmoved"
            elif coming or any(self._anywhere(record) for record in here):
                yield "being_stored"
            elif any(self._anywhere(record) for record in behind):
                yield "no_room"
            else:
                yield "other_context" if here or behind else None

    def _anywhere(self, record: Record) -> bool:
        """Whether a chunk may be moved to any place."""
        alone = record.origin != "blended" and record.context in self._alone
        return alone or self.policy == "any"

    def alone(self, contents: Sequence[bytes]) -> bool:
        """Whether contents are known, or coming, as computed behind each other and nothing else."""
        behind = frozenset(self._alone)
        for content in contents:
            stored = self._index.variants(self.namespace, content)
            stored += self._index.coming(self.namespace, content)
            for tier in self._tiers:
                if not any(r.context in behind for r in stored):
                    stored += tier.of(content)
            known = [r for r in stored if r.context in behind and r.origin != "blended"]
            behind = frozenset(record.context_after for record in known)
        return bool(behind)

    def displaced(self, content: bytes, start: int, contexts: Contexts) -> bool:
        """Whether a content is known, but not as it stands at `start` of a prompt."""
        records = self._index.variants(self.namespace, content)
        for tier in self._tiers:
            records = records or tier.of(content)
        return bool(records) and not any(exact_at(r, start, contexts) for r in records)

    def _serves(self, record: Record, place: Place) -> bool:
        if exact_at(record, place.start, place.contexts):
            return True
        if not place.moves or self.policy == "any":
            return place.moves
        if record.origin == "blended":
            return False
        # Behind the chunk it was computed behind, it has seen nothing that is not here.
        if place.before is not None and continues(place.before, record, place.start):
            return True
        if record.context in self._alone or self._stands_in_front(record, place):
            return True
        # Behind a chunk border of this very prompt: text that stands in front of it here too.
        shares = self.policy == "shared_prefix" and record.start <= place.start
        return shares and place.contexts.known(record.start) == record.context

    def _stands_in_front(self, record: Record, place: Place) -> bool:
        """Whether all that a chunk was computed behind stands right in front of `place`, however
        that is cut: the begin of its text, of which the engine has been told elsewhere."""
        if record.start > AHEAD:
            return False
        for front in self._alone.values():
            n = record.start - len(front) // 8
            fits = 0 < n <= place.start
            if fits and place.contexts.of_last(n, place.start, front) == record.context:
                return True
        return False

    def after(self, ids: bytes, place: Place) -> Record | None:
        """What continues the prompt at `place` exactly, wherever it was cut; the longest there is.

        Args:
            ids: the whole prompt's token ids, int64.
        """
        context, at = place.contexts[place.start], 8 * place.start
        first = ids[at : at + 8]
        stored = self._index.after(self.namespace, context, first)
        fits = [r for r in stored if ids.startswith(r.tokens, at)]
        for tier in self._tiers:
            if not fits:
                stored = tier.after(context, first)
                fits = [r for r in stored if ids.startswith(r.tokens, at)]
        return max(fits, key=lambda record: record.T, default=None)


def find(
    tokens: np.ndarray,
    pieces: Sequence[Piece],
    known: Known,
    local: int = 0,
    moves: bool = True,
) -> list[Found]:
    """What stored chunks serve of tokens [T] past `local`, each whole, in order.

    By content, piece for piece. Where all so far is exact and that finds nothing that is, what was
    stored behind the very same text is, wherever it was cut: so that prompts find each other with
    spans and without, and what ends in the midst of a chunk is of use.

    Args:
        pieces: the chunks of the prompt, a partition of `[0, T)`.
        local: tokens that the engine has already.
        moves: whether chunks may be used outside their exact context.
    """
    ids = np.ascontiguousarray(tokens, "<i8").tobytes()
    contexts = Contexts(ids)
    everything: list[Found] = []
    before: Found | None = None  # the moved chunk that ends where this piece starts
    reached = local  # exact, or the engine's own, as far as this
    at = 0  # what is found reaches this far; into a piece, if it was cut elsewhere
    if known.policy == "shared_prefix":
        for start, _, _ in pieces:
            contexts[start]  # borders that chunks may have been computed behind
    freely = known.free and moves
    wanted = [piece for piece in pieces if piece.end > local]
    contents = [ids[8 * start : 8 * end] for start, end, _ in wanted]
    stored = known.in_memory(contents)
    for (start, end, _), content, held in zip(wanted, contents, stored, strict=True):
        if end <= at:
            continue
        variants: list[Record] = []
        exact: Record | None = None
        if at <= start:
            at = start
            if held and freely:
                variants = held
            else:
                place = Place(start, contexts, before, reached >= start, moves)
                variants = known.variants(content, held, place)
            for record in variants:
                if record.start == start and exact_at(record, start, contexts):
                    exact = record
                    break
        if exact is not None:
            everything.append(Found(start, end, "exact", exact, start))
            contexts.learn(end, exact.context_after)
            reached, at, before = max(reached, end), end, None
            continue
        while at < end and reached >= at:
            place = Place(at, contexts, None, True, moves)
            if (behind := known.after(ids, place)) is None:
                break
            variants = []
            at += behind.T
            if at > local:
                everything.append(Found(place.start, at, "exact", behind, place.start))
            contexts.learn(at, behind.context_after)
            reached = max(reached, at)
        if variants:
            before = Found(start, end, "moved", _best_variant(variants, before, start), start)
            everything.append(before)
            at = end
        else:
            before = None
    return everything


def reach(found: Sequence[Found], local: int = 0) -> int:
    """Tokens from the first on that are exact in one run, or the engine's own `local`."""
    for one in found:
        if one.end <= local:
            continue
        if one.kind != "exact" or one.start > local:
            break
        local = one.end
    return local


def lacking(pieces: Sequence[Piece], found: Sequence[Found]) -> list[Piece]:
    """Those of a prompt's pieces that what was found does not serve whole and exact."""
    exact = iter(one for one in found if one.kind == "exact")
    out, reached, start = [], 0, 0
    for piece in pieces:
        # What is exact in one run, however it was cut.
        while reached < piece.end and (one := next(exact, None)) is not None:
            start = start if one.start == reached else one.start
            reached = one.end
        if not start <= piece.start < piece.end <= reached:
            out.append(piece)
    return out


def _best_variant(known: list[Record], before: Found | None, start: int) -> Record:
    """The variant with the least foreign context.

    One that was stored right behind what now stands before it; else one encoded alone or
    behind the shared prefix, else the latest exact one, else a blended one.
    """
    if len(known) == 1:
        return known[0]
    if before is not None:
        for record in known:
            if continues(before, record, start):
                return record
    return min(known, key=lambda record: FOREIGN[record.origin])


def continues(before: Found, record: Record, start: int) -> bool:
    """Whether `record`, placed at `start`, was stored right behind what `before` places."""
    other = before.record
    return (
        record.context == other.context_after
        and start == before.end
        and start - record.start == before.at - other.start
    )
