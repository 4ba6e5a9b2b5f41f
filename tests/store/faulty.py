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

from lmc.store.disk.catalog import Catalog
from lmc.store.disk.config import DiskConfig
from lmc.store.disk.segments import Segments
from lmc.store.disk.tier import Disk
from lmc.store.record import Record
from lmc.store.tier import Rows, Tier

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
        self.name, self.capacity = tier.name, tier.capacity
        self.counts: Counter[str] = Counter()
        self._tier: Tier = tier
        self._rng = random.Random(seed)

    @property
    def size(self) -> int:
        return self._tier.size

    def contains(self, records: Sequence[Record]) -> list[bool]:
        return [held and not self._fails() for held in self._tier.contains(records)]

    def put(self, items: Sequence[tuple[Record, Sequence[Rows]]]) -> list[bool]:
        return [not self._fails() and self._tier.put([item])[0] for item in items]

    def get(
        self,
        record: Record,
        into: Sequence[Rows] | None = None,
        deadline: float | None = None,
        arrived: Callable[[int], None] = lambda layers: None,
    ) -> Sequence[Rows] | None:
        if self._fails():
            if self._rng.random() < 0.5:
                time.sleep(0.02)
            for part in into or ():  # a fetch that breaks off leaves something behind
                part[..., :1] = 255
            return None
        return self._tier.get(record, into, deadline, arrived)

    def find(self, namespace: bytes, key: bytes) -> list[Record]:
        found: list[Record] = self._tier.find(namespace, key)  # type: ignore[attr-defined]
        return [record for record in found if not self._fails()]

    def after(self, namespace: bytes, context: bytes, first: bytes) -> list[Record]:
        found: list[Record] = self._tier.after(namespace, context, first)  # type: ignore[attr-defined]
        return [record for record in found if not self._fails()]

    def evict(self, records: Sequence[Record]) -> None:
        self._tier.evict(records)

    def close(self) -> None:
        self._tier.close()

    def _fails(self) -> bool:
        return self._rng.random() < self.rate


@dataclass(frozen=True)
class FaultyDisk(DiskConfig):
    """A disk tier behind `Faulty`, as a config names it."""

    rate: float = 0.3
    seed: int = 0

    def open(self, *arguments: Any, **options: Any) -> Any:
        return Faulty(super().open(*arguments, **options), self.rate, self.seed)
