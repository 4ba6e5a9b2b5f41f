"""What every place that holds chunks promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from lmc.model.layout import KVLayout
from lmc.registry import Registry
from lmc.store.record import Record
from lmc.store.sections import Heads, Rows

# What became of a put: it is held now, it was (or a better variant is), there was no room, the
# place failed, or it never got there.
Outcome = Literal["stored", "known", "full", "failed", "dropped"]
# How long what is stored lasts: as long as a disk, as its copies, or as the place likes.
Durability = Literal["device", "replicated", "evictable"]


class Behind(NamedTuple):
    """A question: what was computed behind `context` and begins with the token `first`?"""

    context: bytes
    first: bytes  # 8 bytes, int64


def taken(counts: Counter[str]) -> dict[str, int]:
    """What a counter holds, by kind; it starts anew, while other threads go on counting."""
    gathered = dict(counts)  # in one go: to walk through it is not
    for kind, n in gathered.items():
        counts[kind] -= n
    return {kind: n for kind, n in gathered.items() if n}


class Tier(Protocol):
    """One place that holds chunks.

    A put is whole or not at all, and lasts from the moment it is acknowledged as long as the place
    does. A get gives the bytes that were put, or None. What is damaged, missing, full, slow or
    gone is never an exception: it is a miss, counted by its kind in `counts`. Methods may be called
    by several threads.

    Attributes:
        name: for reports.
        capacity: bytes.
        size: bytes held now, at most `capacity`.
        counts: what happened, by kind, since the tier was opened.
    """

    name: str
    capacity: int
    counts: Counter[str]

    @property
    def size(self) -> int: ...

    def contains(self, records: Sequence[Record]) -> list[bool]:
        """Which of the records are held; no bytes are read."""
        ...

    def put(self, items: Sequence[tuple[Record, Sequence[Rows]]]) -> list[bool]:
        """Hold these chunks: for each, whether it is acknowledged.

        One that is held already, or that has a better variant here, is not put again: False.
        """
        ...

    def get(
        self,
        record: Record,
        into: Sequence[Rows] | None = None,
        deadline: float | None = None,
        arrived: Callable[[int], None] = lambda layers: None,
    ) -> Sequence[Rows] | None:
        """The chunk's bytes, verified, or None.

        Args:
            into: where they go; without it the tier may answer with a view of its own, which must
                not be written and lasts until the record is evicted.
            deadline: `time.monotonic()` at which to give up.
            arrived: called with the number of layers that are there and verified, as they come.
        """
        ...

    def evict(self, records: Sequence[Record]) -> None:
        """Let go of records; of one that is not held, too."""
        ...

    def close(self) -> None:
        """Let go of files and memory; what was acknowledged stays where the place outlives us."""
        ...


class TierConfig(Protocol):
    """What a config says of a tier behind host memory.

    Attributes:
        write: `through` when a chunk is stored, `back` when host memory lets it go.
    """

    write: Literal["through", "back"]

    def open(
        self,
        layout: KVLayout,
        *,
        heads: Heads | None = None,
        exact_variants: int = 2,
        label: str = "",
    ) -> Any:
        """The tier, for one rank.

        Raises:
            ValueError: a wrong setting, or a place that is not a store's.
            OSError: the place cannot be opened.
        """
        ...


TIERS = Registry("tier", {"disk": "lmc.store.disk.config:DiskConfig"}, has=["open", "write"])
