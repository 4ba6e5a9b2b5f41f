"""Room in a folder: what is evicted, and how the space of the dead comes back."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmc.policies import POLICIES, Item, Policy
from lmc.store.disk import header as fmt
from lmc.store.disk.catalog import Located, SegmentUse, Use
from lmc.store.disk.encode import Place
from lmc.store.disk.faults import NoRoomError, kind_of
from lmc.store.disk.folder import Folder
from lmc.store.disk.header import Header, HeaderError
from lmc.store.disk.read import Damaged, verify

# Live bytes over capacity, and files of a full folder, at least. Measured: 1.4 to 2.0 bytes written
# a byte put, against 3.9 to 4.6 at 0.85 and 16 (benchmarks/store.py, churn).
OCCUPANCY = 0.8
SEGMENTS = 64
LARGEST_SEGMENT = 256 << 20


class Room:
    """Decides where records go and which of them leave. Its caller is the folder's writer.

    The policy is this process's. It is told of what other processes put, evicted and read when
    room is needed: then it is caught up with the index.
    """

    def __init__(
        self, folder: Folder, capacity: int, policy: Mapping[str, Any] | str, counts: Counter[str]
    ) -> None:
        if policy == "belady" or (isinstance(policy, Mapping) and policy.get("name") == "belady"):
            raise ValueError("policy belady needs the accesses to come, which no store knows")
        self.capacity = capacity
        self.segment_bytes = min(LARGEST_SEGMENT, capacity // SEGMENTS)
        self.limit = int(OCCUPANCY * capacity)
        self._folder = folder
        self._counts = counts
        self._policy: Policy = POLICIES.build(policy, capacity=self.limit)
        # What the policy holds, when it was last used, and its digest through its last token.
        self._items: dict[bytes, tuple[Item, float, bytes]] = {}
        self._ends: dict[bytes, bytes] = {}  # context_after -> id

    @property
    def size(self) -> int:
        """Bytes of the segment files."""
        return sum(use.end for use in self._folder.catalog.segments().values())

    def place(self, sizes: Sequence[int]) -> list[Place]:
        """Where records of these sizes go, behind what is there; the rest of a folder is tidied.

        Raises:
            NoRoomError: they do not fit.
        """
        need = sum(sizes)
        if need > self.limit:
            raise NoRoomError(f"got {need} bytes, the folder takes {self.limit}")
        used = self._folder.catalog.segments()
        if sum(use.live for use in used.values()) + need > self.limit:
            self._evict_for(need)
            used = self._folder.catalog.segments()
        while sum(use.end for use in used.values()) + need + self.segment_bytes > self.capacity:
            if not self.compact_one(used):
                break
            used = self._folder.catalog.segments()
        if sum(use.end for use in used.values()) + need > self.capacity:
            raise NoRoomError(f"got {need} bytes, and what is alive leaves less")
        return self._append(sizes, used)

    @contextlib.contextmanager
    def undone_on_failure(self, places: Sequence[Place]) -> Iterator[None]:
        """Cut off what was written at `places` when it could not be acknowledged."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                known = self._folder.catalog.segments()
                for segment in {segment for segment, _ in places}:
                    if segment in known:
                        self._folder.segments.truncate(segment, known[segment].end)
                    else:
                        self._folder.segments.unlink(segment)
            raise

    def evict(self, ids: Sequence[bytes]) -> int:
        """Forget records, and remove the files that hold nothing else."""
        with self._folder.catalog.change() as change:
            dead = [at for id in ids if (at := change.remove(id)) is not None]
        self.mark(dead, fmt.DEAD)
        for id in ids:
            self._forget(id)
        self._counts["evicted"] += len(dead)
        self._drop_dead_segments()
        return len(dead)

    def quarantine(self, id: bytes, reason: str) -> None:
        """Never serve a record again, whoever asks."""
        with self._folder.catalog.change() as change:
            at = change.quarantine(id, reason)
        if at is not None:
            self.mark([at], fmt.QUARANTINED)
            self._forget(id)

    def mark(self, places: Sequence[Place], state: int) -> None:
        """Write states into records, so that an index made again knows of them."""
        for segment, at in places:
            with contextlib.suppress(OSError):  # else they come back: whole, and evicted again
                self._folder.segments.mark(segment, at, state)

    def give_up_a_segment(self) -> bool:
        """Where a disk is full and nothing can be copied: let the emptiest file go, live or not.

        Of equals the oldest; the latest, which is still being filled, only where it is alone.
        """
        used = self._folder.catalog.segments()
        if not used:
            return False
        number = min(sorted(used)[:-1] or used, key=lambda n: used[n].live)
        dropped = [id for id, _ in self._folder.catalog.within(number)]
        self._folder.segments.unlink(number)  # first: the index may need the space
        with self._folder.catalog.change() as change:
            for id in dropped:
                change.remove(id)
            change.drop_segment(number)
        for id in dropped:
            self._forget(id)
        self._counts["evicted"] += len(dropped)
        return True

    def compact_one(self, used: dict[int, SegmentUse]) -> bool:
        """Give back the space of the dead in one file; False when no file has any."""
        sparse = [number for number, use in used.items() if use.live < use.end]
        for number in sorted(sparse, key=lambda n: used[n].live / used[n].end):
            try:
                moved = self._whole(number)
            except OSError:  # one bad sector must not be the end of all puts
                self._counts["io_error"] += 1
                continue
            self._move(number, moved)
            return True
        return False

    # -- parts -------------------------------------------------------------------------------

    def _whole(self, number: int) -> list[tuple[Located, Header]]:
        """Records of one file that are what was put; those that are not are quarantined."""
        moved = []
        for id, located in self._folder.catalog.within(number):
            header = located.unpack()
            try:
                verify(self._folder.segments, located, header)
            except (Damaged, EOFError, FileNotFoundError) as e:
                self._counts["damaged:payload"] += 1
                self.quarantine(id, kind_of(e))
                continue
            moved.append((located, header))
        return moved

    def _move(self, number: int, moved: Sequence[tuple[Located, Header]]) -> None:
        """Copy records out of a file, and remove it."""
        others = {n: use for n, use in self._folder.catalog.segments().items() if n != number}
        places = self._append([header.record_bytes for _, header in moved], others)
        with self.undone_on_failure(places):
            for (segment, at), (located, header) in zip(places, moved, strict=True):
                self._folder.segments.copy(number, located.at, segment, at, header.record_bytes)
            for segment in {segment for segment, _ in places}:
                self._folder.segments.sync(segment)
            with self._folder.catalog.change() as change:
                for place, (located, header) in zip(places, moved, strict=True):
                    change.add(header, place, located.header)
                change.drop_segment(number)
        self._folder.segments.unlink(number)
        self._counts["segments_compacted"] += 1
        self._counts["bytes_compacted"] += sum(header.record_bytes for _, header in moved)

    def _append(self, sizes: Sequence[int], used: dict[int, SegmentUse]) -> list[Place]:
        """Places behind the last segment, or in new ones; cuts off what a dead writer left."""
        segments, catalog = self._folder.segments, self._folder.catalog
        known = catalog.segments()
        there = set(segments.numbers()) - catalog.unreadable()
        for number in there - known.keys():
            segments.unlink(number)
        # Files that others removed give their space back once nobody has them open.
        segments.forget(segments.opened() - there)
        last = catalog.last_segment()
        # Only the last is ever appended to: no other can have been left with more than is known.
        number = max(there & known.keys(), default=0)
        end = used[number].end if number in used else self.segment_bytes
        if number in used and segments.size(number) > end:
            segments.truncate(number, end)
        places = []
        for size in sizes:
            if end + size > self.segment_bytes and (end > 0 or number not in used):
                number, end = last + 1, 0
                while not segments.create(number):
                    number += 1  # what has this name is no file, so not ours
                last = number
            places.append((number, end))
            end += size
        return places

    def _drop_dead_segments(self) -> None:
        used = self._folder.catalog.segments()
        dead = [number for number, use in used.items() if use.records == 0]
        if not dead:
            return
        with self._folder.catalog.change() as change:
            for number in dead:
                change.drop_segment(number)
        for number in dead:
            self._folder.segments.unlink(number)

    def _evict_for(self, need: int) -> None:
        """Evict until `need` bytes more are within the limit, and a little further."""
        self._catch_up()
        live = sum(use.live for use in self._folder.catalog.segments().values())
        # The policy is caught up once for so many.
        goal = max(0, self.limit - need - self.limit // 32)
        incoming = Item(key=b"", size=need)
        out = []
        while live > goal and self._items:
            id = self._policy.evict(incoming, time.time())
            if id is None or id == incoming.key:
                break
            assert isinstance(id, bytes)
            live -= self._pop(id).size
            out.append(id)
        self.evict(out)
        if live + need > self.limit:
            raise NoRoomError(f"got {need} bytes, and the policy keeps what it has")

    def _catch_up(self) -> None:
        """Tell the policy what was put, evicted and read since it was last asked."""
        now = time.time()
        uses = self._folder.catalog.uses()
        known = dict(self._folder.catalog.records())
        for id in self._items.keys() - known.keys():
            self._forget(id)
        new = []
        for id, located in known.items():
            if id not in self._items:
                try:
                    new.append((fmt.unpack(located.header), id))
                except HeaderError as e:
                    self._folder.index_fault(e)
        for header, id in sorted(new, key=lambda pair: pair[0].seq):
            record = header.record
            item = Item(
                key=id,
                size=header.record_bytes,
                cost=float(record.T),
                parent=self._ends.get(record.context),
            )
            self._ends[record.context_after] = id
            self._items[id] = (item, header.created, record.context_after)
            self._policy.insert(item, header.created)
        read = [(uses.get(id, Use()).last, id) for id in self._items]
        for last, id in sorted(read):
            item, before, end = self._items[id]
            if last > before:
                self._policy.touch(item, last)
                self._items[id] = (item, last, end)
        expired = list(self._policy.expired(now))
        if expired:
            self.evict([id for id in expired if isinstance(id, bytes)])

    def _forget(self, id: bytes) -> None:
        if id in self._items:
            self._pop(id)
            self._policy.remove(id)

    def _pop(self, id: bytes) -> Item:
        """Let go of what is known of a record that the policy has let go of, or is about to."""
        item, _, end = self._items.pop(id)
        if self._ends.get(end) == id:
            del self._ends[end]
        return item
