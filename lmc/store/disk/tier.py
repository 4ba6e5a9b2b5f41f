"""The disk tier: chunks in segment files, found through an LMDB index."""

from __future__ import annotations

import errno
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmc.model.layout import KVLayout
from lmc.store import compress
from lmc.store.disk import header as fmt
from lmc.store.disk.directory import Directory
from lmc.store.disk.encode import Encoded, Encoder
from lmc.store.disk.faults import FAULTS, kind_of
from lmc.store.disk.flights import FolderFlights
from lmc.store.disk.folder import Folder
from lmc.store.disk.guard import otherwise
from lmc.store.disk.reader import Reader
from lmc.store.disk.replaced import has_all, ids_replaced, within
from lmc.store.disk.room import REMOVED, Room
from lmc.store.disk.write import write_records
from lmc.store.reads import Reads
from lmc.store.record import Record
from lmc.store.sections import Heads, Section
from lmc.store.tier import Behind, Durability, Handle, Outcome, Wanted


class Disk:
    """Chunks in a folder, which outlive the process and may be shared by several.

    A put is acknowledged when its bytes are synced to the disk and indexed. A get checks every
    byte that it gives. One process writes at a time, and none ever waits in order to read. In a
    child of a fork the folder is opened anew when it is first needed. A tier that is closed has
    nothing and takes nothing; one that is dropped, or open when the interpreter ends, is closed.

    A record is one whatever the number of ranks: each puts its part, the heads that it has, and
    any rank of any other number reads its own from those that there are.

    Args:
        path: the folder, made when missing. Nothing is written outside it.
        capacity: bytes of its segment files, dead records included.
        layout: of the chunks, on one rank; None to read what is there, whatever it is.
        heads: which of the model's heads the layout's are; by default all there are.
        compression: one of `lmc.store.compress.CODECS`.
        policy: which records go when there is no room, one of `lmc.policies.POLICIES`.
        exact_variants: exact contexts kept of one content.
        label: the model's name, for people who list the store.
        read_only: nothing in the folder is changed.

    Raises:
        ValueError: a folder that is no store, or of another format; a codec or policy that cannot
            be; heads that are not the layout's; a capacity of less than a MiB.
        OSError: it cannot be opened: see `Folder`.
    """

    name = "disk"
    durability: Durability = "device"

    def __init__(
        self,
        path: str | Path,
        capacity: int,
        *,
        layout: KVLayout | None = None,
        heads: Heads | None = None,
        compression: str = "none",
        policy: Mapping[str, Any] | str = "lru",
        exact_variants: int = 2,
        label: str = "",
        read_only: bool = False,
    ) -> None:
        if capacity < 1 << 20:
            raise ValueError(f"capacity: got {capacity} bytes, allowed: at least {1 << 20}")
        if layout is not None:
            compress.check_codec(compression, layout)
        if heads is not None and (layout is None or heads[1] - heads[0] != layout.G):
            raise ValueError(f"heads: got {heads} for {layout}")
        self.capacity = capacity
        self.layout = layout
        self.read_only = read_only
        self._exact_variants = exact_variants
        self._path, self._policy = Path(path), policy
        self._heads, self._compression = heads, compression
        self._label = label.encode()[:255].decode(errors="ignore")
        self.counts: Counter[str] = Counter()
        self.removed: deque[bytes] = deque(maxlen=REMOVED)
        self._open()

    def _open(self) -> None:
        self.folder = Folder(self._path, self.read_only, self.counts)
        # Not `self`, which could never be dropped then.
        self._closer = weakref.finalize(self, Folder.close, self.folder)
        try:
            self.room = Room(self.folder, self.capacity, self._policy, self.counts, self.removed)
        except ValueError:
            self.folder.close()
            raise
        self._path = self.folder.root  # wherever the process goes
        identity = self.folder.identity
        self._encode = Encoder(identity, self._compression, self._label, self.counts)
        self.flights = None if self.read_only else FolderFlights(self.folder, self.counts)
        self._bad: set[bytes] = set()  # what failed to verify, as far as this process knows
        self._directory = Directory(self.folder, self.layout, self._heads, self._bad)
        self._reader = Reader(self.folder, self.room, self._directory, self._bad)
        read = weakref.WeakMethod(self._read)  # or its threads would keep a tier that is dropped
        self._reads = Reads(
            self.name, lambda wanted, arrived: (get := read()) is not None and get(wanted, arrived)
        )

    def open_again(self) -> None:
        """In a child, whose locks, files and index are its parent's, and may be half changed."""
        if self._closer.detach():  # one thread does; for the others it is closed
            try:
                self._open()
            except (ValueError, *FAULTS) as e:
                self.counts[f"not_opened:{kind_of(e)}"] += 1

    # -- what is here ------------------------------------------------------------------------

    @property
    @otherwise(lambda: 0)
    def size(self) -> int:
        """Bytes of the segment files; 0 where the index cannot be read."""
        return self.room.size

    @property
    @otherwise(lambda: None)
    def epoch(self) -> int | None:
        """The number of the index's last change, whoever made it."""
        return self.folder.catalog.epoch

    def register(self, address: int, nbytes: int) -> None:
        """Files need no memory registered."""

    @otherwise(lambda records: [False] * len(records))
    def contains(self, records: Sequence[Record]) -> list[bool]:
        """Of which records this rank's heads are there."""
        return self._directory.contains(records)

    @otherwise(lambda namespace, keys, behind, deadline: ([[] for _ in keys], [[] for _ in behind]))
    def lookup_many(
        self, namespace: bytes, keys: Sequence[bytes], behind: Sequence[Behind], deadline: float
    ) -> tuple[list[list[Record]], list[list[Record]]]:
        """As `Tier.lookup_many`."""
        return self._directory.lookup_many(namespace, keys, behind, deadline)

    # -- reading -----------------------------------------------------------------------------

    def get_many(self, wanted: Sequence[Wanted]) -> list[Handle]:
        """As `Tier.get_many`."""
        return self._reads.start(wanted)

    def _read(self, wanted: Wanted, arrived: Callable[[int], None]) -> bool:
        return self.get(wanted.record, wanted.into, wanted.deadline, arrived) is not None

    @otherwise(lambda *arguments, **options: None)
    def get(
        self,
        record: Record,
        into: Sequence[Section] | None = None,
        deadline: float | None = None,
        arrived: Callable[[int], None] = lambda layers: None,
    ) -> Sequence[Section] | None:
        """A record's sections, verified, or None.

        Args:
            into: where they go; without it the answer is all that this rank has of the record,
                as a view that must not be written where one part is just that.
            deadline: `time.monotonic()` at which to give up.
            arrived: called with the number of layers that are there and verified, as they come:
                of all sections, one after the other in the order of `lmc.store.wire.order`.
        """
        got = None
        try:
            got = self._reader.get(record, into, deadline, arrived)
        except MemoryError:
            self.counts["no_memory"] += 1
        finally:
            if got is None:
                self.counts["misses"] += 1
        if got is not None:
            self.counts["hits"] += 1
            self.counts["bytes_read"] += record.nbytes
        return got

    # -- writing -----------------------------------------------------------------------------

    def put(self, items: Sequence[tuple[Record, Sequence[Section]]]) -> list[Outcome]:
        """As `Tier.put`; of each record what the sections are: this rank's part of it."""
        outcomes: list[Outcome] = ["failed"] * len(items)
        encoded: dict[int, Encoded] = {}
        held = self._held(items)
        seen: set[object] = set()
        for i, (record, sections) in enumerate(items):
            # Of one content one before it may replace it.
            is_known = held[i] and _content(record) not in seen
            seen.add(_content(record))
            if is_known:
                self.counts["known"] += 1
                outcomes[i] = "known"
                continue
            try:
                encoded[i] = self._encode(record, sections)
            except Exception:  # whatever it is that cannot be stored: others can
                self.counts["put_failed:not_a_chunk"] += 1
        for i, outcome in zip(encoded, self.put_encoded([*encoded.values()]), strict=True):
            outcomes[i] = outcome
        return outcomes

    @otherwise(lambda items: [False] * len(items))
    def _held(self, items: Sequence[tuple[Record, Sequence[Section]]]) -> list[bool]:
        with self.folder.catalog.reading() as index:
            return [
                has_all(index.parts(record.id), [form for form, _ in sections], self._bad)
                for record, sections in items
            ]

    @otherwise(lambda encoded: ["failed"] * len(encoded))
    def put_encoded(self, encoded: Sequence[Encoded]) -> list[Outcome]:
        """As `put`, of parts whose namespaces are digests already."""
        outcomes: list[Outcome] = ["failed"] * len(encoded)
        if not encoded:
            return outcomes
        done: set[int] = set()
        try:
            with self.folder.writing():
                self._tell_uses()
                for group in self._groups(encoded):
                    try:
                        told = self._write(group)
                    except FAULTS as e:
                        if not self._make_room(e):
                            raise
                        told = self._write(group)  # if that is not enough, nothing is
                    for i, outcome in told.items():
                        outcomes[i] = outcome
                    done.update(told)
        except FAULTS as e:
            self.counts[f"put_failed:{kind_of(e)}"] += len(encoded) - len(done)
            self.folder.index_fault(e)
            full = kind_of(e) in ("disk_full", "index_full", "no_room")
            for i in set(range(len(encoded))) - done:
                outcomes[i] = "full" if full else "failed"
        return outcomes

    def _make_room(self, fault: Exception) -> bool:
        """Whether what failed may succeed now."""
        if kind_of(fault) == "index_full":
            return self.folder.catalog.env.grow()
        # Not where a file has grown as far as it may, or there is space: it would be in vain.
        number = getattr(fault, "errno", 0)
        space = number == errno.ENOSPC and self.folder.segments.free() > 4 * self.room.segment_bytes
        if kind_of(fault) != "disk_full" or number == errno.EFBIG or space:
            return False
        return self.room.give_up_a_segment()

    def _groups(self, encoded: Sequence[Encoded]) -> list[dict[int, Encoded]]:
        """What is written and synced together, by index: no more than there can be room for.

        Of one content there is one in each, since what it replaces is known when it is its turn.
        """
        groups: list[dict[int, Encoded]] = []
        size, seen = 0, set[object]()
        for i, e in enumerate(encoded):
            size += e.header.record_bytes
            content = _content(e.header.record)
            if not groups or size > self.room.limit // 4 or content in seen:
                groups.append({})
                size, seen = e.header.record_bytes, set()
            groups[-1][i] = e
            seen.add(content)
        return groups

    def _write(self, encoded: Mapping[int, Encoded]) -> dict[int, Outcome]:
        """Write, sync, index; then what became of each, by its index."""
        folder = self.folder
        outcomes: dict[int, Outcome] = {}
        records: set[bytes] = set()  # replaced, with all of their parts
        parts: set[bytes] = set()  # of the same records, that the new ones have too
        with folder.catalog.reading() as index:
            for i, e in encoded.items():
                there = index.parts(e.header.record.id)
                replaced = ids_replaced(index, e.header, there, self._bad, self._exact_variants)
                if replaced is None:
                    self.counts["known"] += 1
                    outcomes[i] = "known"
                elif e.header.record_bytes > self.room.limit:
                    self.counts["no_room"] += 1
                    outcomes[i] = "full"
                else:
                    outcomes[i] = "stored"
                    records.update(replaced)
                    parts.update(within(there, e.header))
        new = [encoded[i] for i, outcome in outcomes.items() if outcome == "stored"]
        if not new:
            return outcomes
        sizes = [e.header.record_bytes for e in new]
        places = self.room.place(sizes)
        seq = folder.catalog.next_seq()  # behind what is found on the way to a place
        # The index is written meanwhile, and valid when it is left, behind the sync.
        with self.room.undone_on_failure(places), folder.catalog.change() as change:
            dead = [*change.remove_records(records).values()]
            dead += [at for part in parts if (at := change.remove(part)) is not None]
            write_records(folder.segments, new, places, seq, change.add)
        self.room.mark(dead, fmt.DEAD)
        self.removed.extend(id[:32] for id in records)
        for e in new:
            self._bad.discard(e.header.id)
            self._reader.forget(e.header.record.id)
        self.counts["puts"] += len(new)
        self.counts["bytes_written"] += sum(sizes)
        return outcomes

    def evict(self, records: Sequence[Record]) -> None:
        """As `Tier.evict`, with all of their parts."""
        self.evict_ids([record.id for record in records])

    @otherwise(lambda ids: 0)
    def evict_ids(self, ids: Sequence[bytes]) -> int:
        """Let go of records by their ids, or those of their parts; how many parts there were."""
        for id in ids:
            self._reader.forget(id[:32])
        try:
            with self.folder.writing():
                return self.room.evict(ids)
        except FAULTS as e:
            self.counts[f"evict_failed:{kind_of(e)}"] += len(ids)
            self.folder.index_fault(e)
            return 0

    def _tell_uses(self) -> None:
        """Write down who was read how often; the caller is the folder's writer."""
        if uses := self._reader.uses():
            now = time.time()
            with self.folder.catalog.change() as change:
                for id, hits in uses.items():
                    change.used(id, hits, now)

    def close(self) -> None:
        """As `Tier.close`."""
        self._reads.close()
        if self.flights is not None:
            self.flights.close()
        if not self._closer.detach():  # it is closed, or somebody is closing it
            return
        if not self.read_only and not self.folder.forked:
            try:
                with self.folder, self.folder.writing(1.0):
                    self._tell_uses()
            except FAULTS as e:
                if not self.folder.index_fault(e):
                    self.counts[kind_of(e)] += 1
        self.folder.close()


def _content(record: Record) -> object:
    """What is equal of records that may replace each other."""
    return (record.namespace, record.context) if record.tail else record.key
