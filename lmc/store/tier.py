"""What every place that holds chunks promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from lmc.model.layout import KVLayout
from lmc.registry import Registry
from lmc.store.record import Record
from lmc.store.sections import Heads, Section

# What became of a put: it is held now, it was (or a better variant is), there was no room, the
# place failed, or it never got there.
Outcome = Literal["stored", "known", "full", "failed", "dropped"]
# How long what is stored lasts: as long as a disk, as its copies, or as the place likes.
Durability = Literal["device", "replicated", "evictable"]
LOST = 1 << 16


def taken(counts: Counter[str]) -> dict[str, int]:
    """What a counter holds, by kind; it starts anew, while other threads go on counting."""
    gathered = dict(counts)  # in one go: to walk through it is not
    for kind, n in gathered.items():
        counts[kind] -= n
    return {kind: n for kind, n in gathered.items() if n}


@dataclass(frozen=True)
class Drained:
    """What tiers have of what they were to have; true where that is all of it.

    Attributes:
        lacking: by tier, chunks in host memory that it has not acknowledged.
        lost: of what host memory let go of, chunks that a tier was to have and did not take, since
            this was last asked; no more than `LOST` are counted.
    """

    lacking: dict[str, int]
    lost: int

    def __bool__(self) -> bool:
        return not self.lost and not any(self.lacking.values())


class Behind(NamedTuple):
    """A question: what was computed behind `context` and begins with the token `first`?"""

    context: bytes
    first: bytes  # 8 bytes, int64


class Wanted(NamedTuple):
    """A chunk that is asked for.

    Attributes:
        into: where its bytes go, the sections in any order; written until the handle is over.
        deadline: `time.monotonic()` at which to give up.
        news: to be called, on any thread, when `poll` has something new to say. A place that
            cannot tell is polled.
    """

    record: Record
    into: Sequence[Section]
    deadline: float
    news: Callable[[], None]


class Progress(NamedTuple):
    """How far a chunk has come.

    Attributes:
        layers: how many of its first layers are there and verified.
        over: whether all of it is there, or will not be; None as long as it is on its way. Once
            this is told nothing is written into its destination any more.
    """

    layers: int
    over: Literal["here", "missing"] | None


class Handle(Protocol):
    """A chunk on its way out of a tier."""

    def poll(self) -> Progress:
        """How far it has come; does not wait."""
        ...

    def cancel(self) -> None:
        """Nobody wants it any more: it is over as soon as nothing writes. Does not wait."""
        ...


class Tier(Protocol):
    """One place that holds chunks.

    A put is whole or not at all, and once it is `stored` it lasts as `durability` says. A get gives
    the bytes that were put, or none. What is damaged, missing, full, slow or gone is never an
    exception: it is counted by its kind in `counts`. Methods may be called by several threads.
    None is ever called on a thread that serves a model: each tier has threads of its own, which
    call it and may wait for it (`lmc.store.chunks`, `lmc.store.directory`).

    Attributes:
        name: for reports.
        capacity: bytes; None where that is not known.
        durability: what `stored` means.
        counts: what happened, by kind, since the tier was opened.

    A tier that knows what it let go of may have a deque `removed`, of bounded length, to which it
    appends the ids of those records; who publishes KV events takes them out. One that several
    engines share may have `flights`, as `lmc.store.flights.Flights`: through it they know what each
    is computing.
    """

    name: str
    durability: Durability
    counts: Counter[str]

    @property
    def capacity(self) -> int | None: ...

    @property
    def size(self) -> int | None:
        """Bytes held now, at most `capacity`; None where that is not known."""
        ...

    @property
    def epoch(self) -> int | None:
        """Another number whenever something was put that was not there; None if it cannot tell."""
        ...

    def register(self, address: int, nbytes: int) -> None:
        """Memory that chunks come from and go to, as long as the tier is open; told once."""
        ...

    def lookup_many(
        self, namespace: bytes, keys: Sequence[bytes], behind: Sequence[Behind], deadline: float
    ) -> tuple[list[list[Record]], list[list[Record]]]:
        """What is held, without reading bytes, in one go for all the questions.

        Args:
            deadline: `time.monotonic()` at which to answer with what is known.

        Returns:
            For each key the variants of that content that every rank has, the oldest first, tails
            excepted; for each of `behind` what continues it, tails too, but nothing blended, and
            of very many only the latest.
        """
        ...

    def contains(self, records: Sequence[Record]) -> list[bool]:
        """Which of the records are held here, on this rank."""
        ...

    def put(self, items: Sequence[tuple[Record, Sequence[Section]]]) -> list[Outcome]:
        """Hold these chunks: what became of each."""
        ...

    def get_many(self, wanted: Sequence[Wanted]) -> list[Handle]:
        """Begin to bring chunks, the first layers of each first; returns at once."""
        ...

    def evict(self, records: Sequence[Record]) -> None:
        """Let go of records; of one that is not held, too."""
        ...

    def close(self) -> None:
        """Let go of files and memory, a second time too; what is stored stays."""
        ...


@dataclass(frozen=True)
class Attached:
    """A tier behind host memory.

    write: `through` when a chunk is stored, `back` when host memory lets it go.
    """

    tier: Tier
    write: Literal["through", "back"]


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

        Args:
            layout: of the rank.
            heads: which of the model's heads the rank has; by default all of them.
            exact_variants: exact contexts kept of one content.
            label: the model's name, for people who list the tier.

        Raises:
            ValueError: a wrong setting, or a place that is not a store's.
            OSError: the place cannot be opened.
        """
        ...


TIERS = Registry(
    "tier",
    {
        "disk": "lmc.store.disk.config:DiskConfig",
        "redis": "lmc.store.remote.redis:RedisConfig",
        "nixl": "lmc.store.remote.nixl:NixlConfig",
        "nixl_files": "lmc.store.remote.nixl_files:NixlFilesConfig",
        "s3": "lmc.store.remote.s3:S3Config",
    },
    has=["open", "write"],
)


def opened(said: Sequence[TierConfig], layout: KVLayout, **options: Any) -> list[Any]:
    """The tiers that configs say, all of them or none; `options` as `TierConfig.open`.

    Raises:
        ValueError, OSError: one that cannot be opened; the others are closed.
    """
    tiers: list[Any] = []
    try:
        for config in said:
            tiers.append(config.open(layout, **options))
    except BaseException:
        for tier in tiers:
            tier.close()
        raise
    return tiers


def size_of(tier: Tier) -> int | None:
    """Bytes held; None where the tier does not say."""
    try:
        return tier.size
    except Exception:  # a tier may be anybody's
        return None
