"""What is known of a chunk: in host memory, and in the tiers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lmc.store.index import Index
from lmc.store.record import Record


class Behind(Protocol):
    """A tier that tells, without reading bytes, what it has of a content."""

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

    def __init__(self, index: Index, namespace: bytes, tiers: Sequence[Behind] = ()) -> None:
        self._index, self._namespace, self._tiers = index, namespace, tiers

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
            found = reversed(tier.find(self._namespace, key))
            known += [r for r in found if r.tokens == tokens and r.id not in held]
        return known

    def tail(self, context: bytes, content: bytes, chained: bool = True) -> Record | None:
        """The tail behind `context` that `content` starts with; the longest there is."""
        tails = [self._index.tail(self._namespace, context)]
        if chained:
            tails += [tier.tail(self._namespace, context) for tier in self._tiers]
        fits = [t for t in tails if t is not None and content.startswith(t.tokens)]
        return max(fits, key=lambda t: t.T, default=None)


def exact_in(record: Record, context: bytes) -> bool:
    """Whether a record is, behind `context`, what full prefill would give."""
    return record.context == context and record.origin != "blended"
