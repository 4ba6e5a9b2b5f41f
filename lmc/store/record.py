"""What is known of one stored chunk, wherever its bytes are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from blake3 import blake3

from lmc.chunking.pieces import Contexts

Origin = Literal["exact", "isolated", "anchored", "blended"]
# What a moved chunk may have been computed behind: any text, text that stands in front of it here
# too, or none.
ContextPolicy = Literal["any", "shared_prefix", "isolated"]


BUSY = 16  # variants of one content that are all in use, or on their way: no more are taken then


def origin_of(
    start: int,
    first_end: int,
    blended_from: int | None,
    end: int,
    second_end: int | None = None,
) -> Origin:
    """How a chunk `[start, end)` of a request came by its KV.

    Args:
        start, end: the chunk's tokens.
        first_end: where the text ends that the request begins with: a span, or a chunk.
        blended_from: the first token whose KV is not exact, or None.
        second_end: where the text ends that follows; by default where its first chunk does.
    """
    if blended_from is not None and end > blended_from:
        return "blended"
    if start < first_end:
        return "isolated"
    return "anchored" if start < (second_end or first_end + 1) else "exact"


@dataclass(frozen=True, slots=True)
class Record:
    """One stored variant of one content.

    Attributes:
        slot: names its bytes in host memory, on every worker; never used twice. -1 where it is
            in no host memory.
        namespace: all that makes KV incompatible, the tenant included.
        key: ChunkKey of the content (32 bytes).
        tokens: its token ids as int64 bytes, compared on every use.
        start: the position its keys are rotated for.
        context: digest of all tokens before it when its KV was computed.
        context_after: the same digest through its last token.
        origin: how its KV came to be (docs/glossary.md); only `blended` KV is not what full
            prefill gave there.
        nbytes: bytes on one rank.
        tail: it ends where its prompt ended, not at a cut: used in its exact context only.
    """

    slot: int
    namespace: bytes
    key: bytes
    tokens: bytes
    start: int
    context: bytes
    context_after: bytes
    origin: Origin
    nbytes: int
    tail: bool = False
    _id: bytes | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def T(self) -> int:  # noqa: N802 the letter of tokens, as everywhere
        return len(self.tokens) // 8

    @property
    def id(self) -> bytes:
        """What names this variant in every tier but host memory: 32 bytes, the same each time."""
        if self._id is None:
            digest = id_of(self.key, self.context, self.tail, self.origin == "blended")
            object.__setattr__(self, "_id", digest)
            return digest
        return self._id

    def at(self, slot: int, namespace: bytes | None = None) -> Record:
        """The same variant in another place, or under another name of its namespace."""
        there = Record(
            slot, self.namespace if namespace is None else namespace, self.key, self.tokens,
            self.start, self.context, self.context_after, self.origin, self.nbytes, self.tail,
        )  # fmt: skip
        object.__setattr__(there, "_id", self.id)
        return there


def id_of(key: bytes, context: bytes, tail: bool = False, blended: bool = False) -> bytes:
    """`Record.id` of what has this ChunkKey and context digest."""
    return blake3(key + context + bytes([tail, blended])).digest()


def exact_at(record: Record, start: int, contexts: Contexts) -> bool:
    """Whether a record is, at `start`, what full prefill would give."""
    # What stands before it has a length: that comes first, since digests cost a pass.
    return (
        record.start == start and record.origin != "blended" and record.context == contexts[start]
    )


def variants_kept(said: int | None, moves: bool) -> int:
    """How many exact contexts of one content are kept where nobody says it.

    What is moved serves behind any text, and of what stands in the way of others two are enough.
    Where nothing is moved each of them is a prefix of its own: as many as a put can look through.
    """
    return said if said is not None else 2 if moves else 64


def superseded(
    known: Iterable[Record],
    new: Record,
    exact_variants: int,
    leased: Callable[[Record], bool] = lambda record: False,
) -> list[Record] | None:
    """Of one content, the records that `new` takes the place of; None when it would add nothing.

    Kept of a content: the latest `exact_variants` isolated ones (it may be part of several texts
    that were computed alone), as many anchored and as many exact ones, and a blended one only
    while there is no better. So none of these ways of encoding a text pushes out another, whoever
    sends it.

    Args:
        known: the records of that content, the oldest first; of a tail, the tail of its context.
        new: the record to come.
        leased: what must stay.
    """
    if new.tail:
        if new.origin == "blended":
            return None  # a tail serves its exact context only
        for record in known:
            grown = len(record.tokens) < len(new.tokens)
            return [record] if grown and not leased(record) else None
        return []
    same = [record for record in known if not record.tail]
    if new.origin == "blended":
        return None if same else []
    if any(r.context == new.context and r.origin != "blended" for r in same):
        return None
    free = [r for r in same if not leased(r)]
    out = [r for r in free if r.origin == "blended"]
    alike = [r for r in same if r.origin == new.origin]
    if len(alike) >= max(BUSY, exact_variants) and not any(r in free for r in alike):
        return None  # a prompt that repeats one text, and none of it is stored yet
    oldest = alike[: max(0, len(alike) + 1 - exact_variants)]
    return out + [r for r in oldest if r in free]
