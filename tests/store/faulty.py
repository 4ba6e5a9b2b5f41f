"""A disk that fails now and then, beneath a disk tier; and a tier that misses now and then."""

from __future__ import annotations

import errno
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lmdb

from docs.example_tier import Example
from lmc.store.disk.catalog import Catalog
from lmc.store.disk.config import DiskConfig
from lmc.store.disk.segments import Segments
from lmc.store.disk.tier import Disk
from lmc.store.reads import Ended
from lmc.store.record import Record
from lmc.store.sections import Section
from lmc.store.tier import Behind, Handle, Outcome, Tier, Wanted

# What may go wrong with each call of the files, and of the index.
FILE_CALLS = ("append", "sync", "read", "pread", "view", "mark", "create", "truncate", "size")
INDEX_CALLS = ("locate", "contains", "reading", "change", "segments", "next_seq", "uses")


class Faults:
    """Calls that fail at a rate, as a disk's do."""

    def __init__(self, rate: float, seed: int) -> None:
        self.rate = rate
        self.happened: Counter[str] = Counter()
        self._rng = random.Random(seed)

    def wrap(self, owner: Any, name: str, fault: Callable[[], Exception]) -> None:
        """Make `owner.name` fail before it does anything."""
        call = getattr(owner, name)

        def failing(*arguments: Any, **options: Any) -> Any:
            if self._rng.random() < self.rate:
                self.happened[name] += 1
                raise fault()
            return call(*arguments, **options)

        setattr(owner, name, failing)


def failing_disk(disk: Disk, rate: float, seed: int) -> Faults:
    """Make the files and the index of `disk` fail; set `rate` to 0 and they are sound again."""
    faults = Faults(rate, seed)
    segments: Segments = disk.folder.segments
    catalog: Catalog = disk.folder.catalog
    for name in FILE_CALLS:
        # Not that it is full: then the tier makes room, and evicts.
        faults.wrap(segments, name, lambda: OSError(errno.EIO, "the disk fails"))
    for name in INDEX_CALLS:
        faults.wrap(catalog, name, lambda: lmdb.Error("the index fails"))
    return faults


class Faulty:
    """A tier that misses, refuses, or is late, at a rate; never wrong, as no tier ever is."""

    def __init__(self, tier: Any, rate: float, seed: int) -> None:
        self.rate = rate
        self.name, self.durability = tier.name, tier.durability
        self.counts: Counter[str] = Counter()
        self._tier: Tier = tier
        self._rng = random.Random(seed)

    @property
    def capacity(self) -> int | None:
        return self._tier.capacity

    @property
    def size(self) -> int | None:
        return self._tier.size

    @property
    def epoch(self) -> int | None:
        return None

    def register(self, address: int, nbytes: int) -> None:
        self._tier.register(address, nbytes)

    def lookup_many(
        self, namespace: bytes, keys: Sequence[bytes], behind: Sequence[Behind], deadline: float
    ) -> tuple[list[list[Record]], list[list[Record]]]:
        found = self._tier.lookup_many(namespace, keys, behind, deadline)
        by_key, by_context = (
            [[] if self._fails() else list(records) for records in some] for some in found
        )
        return by_key, by_context

    def contains(self, records: Sequence[Record]) -> list[bool]:
        return [held and not self._fails() for held in self._tier.contains(records)]

    def put(self, items: Sequence[tuple[Record, Sequence[Section]]]) -> list[Outcome]:
        return [self._put(*item) for item in items]

    def get_many(self, wanted: Sequence[Wanted]) -> list[Handle]:
        return [self._get(one) for one in wanted]

    def evict(self, records: Sequence[Record]) -> None:
        self._tier.evict(records)

    def close(self) -> None:
        self._tier.close()

    def _put(self, record: Record, sections: Sequence[Section]) -> Outcome:
        if self._fails():
            return self._rng.choice(["full", "failed", "dropped"])  # type: ignore[return-value]
        return self._tier.put([(record, sections)])[0]

    def _get(self, wanted: Wanted) -> Handle:
        if not self._fails():
            return self._tier.get_many([wanted])[0]
        if self._rng.random() < 0.5:
            time.sleep(0.02)
        for _, parts in wanted.into:  # a fetch that breaks off leaves something behind
            for part in parts:
                part[..., :1] = 255
        return Ended(None)

    def _fails(self) -> bool:
        return self._rng.random() < self.rate


@dataclass(frozen=True)
class FaultyDisk:
    """A disk tier behind `Faulty`, as a config names it."""

    place: str
    rate: float = 0.3
    seed: int = 0
    write: str = "through"

    def open(self, *arguments: Any, **options: Any) -> Any:
        disk = DiskConfig(f"{self.place}/kv", "16MiB")
        return Faulty(disk.open(*arguments, **options), self.rate, self.seed)


@dataclass(frozen=True)
class FaultyExample(FaultyDisk):
    """The example tier behind `Faulty`, as a config names it."""

    def open(self, *arguments: Any, **options: Any) -> Any:
        return Faulty(Example(self.place).open(*arguments, **options), self.rate, self.seed)
