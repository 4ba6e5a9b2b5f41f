"""Room in a folder: what is evicted, and how the space of the dead comes back."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmc.policies import POLICIES, Item, Policy
from lmc.store.disk import header as fmt
from lmc.store.disk import strays
from lmc.store.disk.catalog import SegmentUse
from lmc.store.disk.faults import NoRoomError, kind_of
from lmc.store.disk.folder import Folder
from lmc.store.disk.header import Header, HeaderError
from lmc.store.disk.order import About, about, tick_of
from lmc.store.disk.read import Damaged, verify
from lmc.store.disk.segments import Located
from lmc.store.disk.write import Place

# Live bytes over capacity, and files of a full folder, at least. Measured: 1.4 to 2.0 bytes written
# a byte put, against 3.9 to 4.6 at 0.85 and 16 (benchmarks/store.py, churn).
OCCUPANCY = 0.8
SEGMENTS = 64
LARGEST_SEGMENT = 256 << 20
# What a put tells the policy of puts and reads: twice as many as there were since the last one, so
# that it comes to know all of a folder, some more, and never so many that one waits for it.
SOME, MOST = 256, 4096
REMOVED = 1 << 14  # ids of records that are gone, until somebody asks for them
SPACE_S = 0.1  # how soon a file that was removed gives its space back, or somebody has it open


class Room:
    """Decides where records go and which of them leave. Its caller is the folder's writer.

    The policy is this process's. With every put it is told of some of the puts and reads in the
    folder, whoever they are of, in their order: what it does not know yet was used last. What
    others evicted it learns of when it would go. Ids of what is gone are appended to `removed`.
    """

    def __init__(
        self,
        folder: Folder,
        capacity: int,
        policy: Mapping[str, Any] | str,
        counts: Counter[str],
        removed: deque[bytes] | None = None,
    ) -> None:
        if policy == "belady" or (isinstance(policy, Mapping) and policy.get("name") == "belady"):
            raise ValueError("policy belady needs the accesses to come, which no store knows")
        self.capacity = capacity
        self.segment_bytes = min(LARGEST_SEGMENT, capacity // SEGMENTS)
        self.limit = int(OCCUPANCY * capacity)
        self._folder = folder
        self._counts, self._removed = counts, removed
        self._policy: Policy = POLICIES.build(policy, capacity=self.limit)
        self._items: dict[bytes, bytes] = {}  # what the policy holds, and what it was told of it
        self._ends: dict[bytes, bytes] = {}  # of a context's digest -> id
        self._seen = -1  # which index that was of
        self._told = b""  # how far in the order of puts and reads
        self._happened: int | None = None  # how many there were at the last look
        self._doubted: list[bytes] = []  # what the policy holds, and others may have evicted
        self._full_at = -1  # bytes that were free when to give up a segment gave nothing back

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
        self._tell()
        for number, use in self._folder.catalog.segments().items():
            if not fmt.PAGE * use.records <= use.live <= use.end:  # or all might be evicted for it
                raise HeaderError(f"the index is wrong about segment {number}: {use}")
        last: Place | None = self._tidy()  # before it is counted: what is found takes room
        used = self._folder.catalog.segments()
        for _ in range(2):  # the first may find what a killed writer was about to mark as dead
            if sum(use.live for use in used.values()) + need <= self.limit:
                break
            self._evict_for(need)
            last = None
            used = self._folder.catalog.segments()
        while sum(use.end for use in used.values()) + need + self.segment_bytes > self.capacity:
            if not self.compact_one(used):
                break
            last = None
            used = self._folder.catalog.segments()
        if sum(use.end for use in used.values()) + need > self.capacity:
            raise NoRoomError(f"got {need} bytes, and what is alive leaves less")
        return self._append(sizes, last or self._tidy())

    @contextlib.contextmanager
    def undone_on_failure(self, places: Sequence[Place]) -> Iterator[None]:
        """Cut off what was written at `places` when it could not be acknowledged."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                for segment in {segment for segment, _ in places}:
                    begun = min(at for other, at in places if other == segment)
                    if begun:
                        self._folder.segments.truncate(segment, begun)
                    else:
                        self._folder.segments.unlink(segment)
            raise

    def evict(self, ids: Sequence[bytes]) -> int:
        """Forget records with all of their parts, and remove the files that hold nothing else."""
        with self._folder.catalog.change() as change:
            dead = change.remove_records(ids)
        self.mark([*dead.values()], fmt.DEAD)
        for id in dead:
            self._forget(id)
        self._counts["evicted"] += len(dead)
        self._drop_dead_segments()
        return len(dead)

    def quarantine(self, id: bytes, located: Located | None, reason: str) -> bool:
        """Never serve a record again that failed to verify at `located`, whoever asks.

        Returns:
            False when it is not there any more: moved, evicted or put anew since it was read.
        """
        if located is None or self._folder.catalog.locate(id) != located:
            return False
        with self._folder.catalog.change() as change:
            change.quarantine(id, reason)
        self.mark([located], fmt.QUARANTINED)
        self._forget(id)
        return True

    def mark(self, places: Sequence[Located], state: int) -> None:
        """Write states into records, so that an index made again knows of them.

        Only where the header is the one that the index has: it may be another folder's.
        """
        if others := self._folder.segments.mark_all(places, state):
            self._counts["not_marked"] += others

    def give_up_a_segment(self) -> bool:
        """Where a disk is full and nothing can be copied: let the emptiest file go, live or not.

        Of equals the oldest; the latest, which is still being filled, only where it is alone. When
        that gave no space back, since somebody has the file open or others took the space, none is
        given up again before there is more.

        Returns:
            Whether there may be room now.
        """
        used, segments = self._folder.catalog.segments(), self._folder.segments
        free = segments.free()
        if not used or free <= self._full_at:
            return False
        number = min(sorted(used)[:-1] or used, key=lambda n: used[n].live)
        segments.unlink(number)  # first: the index may need the space
        wanted = free + used[number].end // 2
        until = time.monotonic() + SPACE_S
        while segments.free() < wanted and time.monotonic() < until:
            time.sleep(0.001)  # some file systems take their time
        self._full_at = -1 if segments.free() >= wanted else wanted
        self._counts["evicted"] += self._drop(number)
        return self._full_at < 0

    def compact_one(self, used: dict[int, SegmentUse]) -> bool:
        """Give back the space of the dead in one file; False when no file has any."""
        sparse = [number for number, use in used.items() if use.live < use.end]
        for number in sorted(sparse, key=lambda n: used[n].live / used[n].end):
            try:
                self._adopt(number, 0, used[number].end)  # or they were removed with it
                moved = self._whole(number)
            except OSError:  # one bad sector must not be the end of all puts
                self._counts["io_error"] += 1
                continue
            self._move(number, moved)
            return True
        return False

    # -- parts -------------------------------------------------------------------------------

    def _drop(self, number: int) -> int:
        """Forget what was in a file that is gone; how many records."""
        dropped = [id for id, _ in self._folder.catalog.within(number)]
        with self._folder.catalog.change() as change:
            for id in dropped:
                change.remove(id)
            change.drop_segment(number)
        for id in dropped:
            self._forget(id)
        return len(dropped)

    def _whole(self, number: int) -> list[tuple[Located, Header]]:
        """Records of one file that are what was put; those that are not are quarantined."""
        moved = []
        for id, located in self._folder.catalog.within(number):
            header = located.unpack()
            try:
                verify(self._folder.segments, located, header)
            except (Damaged, EOFError, FileNotFoundError) as e:
                self._counts["damaged:payload"] += 1
                self.quarantine(id, located, kind_of(e))
                continue
            moved.append((located, header))
        return moved

    def _move(self, number: int, moved: Sequence[tuple[Located, Header]]) -> None:
        """Copy records out of a file, and remove it."""
        sizes = [header.record_bytes for _, header in moved]
        places = self._append(sizes, self._tidy(leaving=number))
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

    def _append(self, sizes: Sequence[int], last: Place) -> list[Place]:
        """Places from the end of the last segment on, and in new ones."""
        number, end = last
        latest = self._folder.catalog.last_segment()
        places = []
        for size in sizes:
            if end + size > self.segment_bytes and end > 0:
                number, end = latest + 1, 0
                while not self._folder.segments.create(number):
                    number += 1  # what has this name is no file, so not ours
                latest = number
            places.append((number, end))
            end += size
        return places

    def _tidy(self, leaving: int = 0) -> Place:
        """Index what dead writers left, cut off what is torn; the last segment, and its end.

        leaving: a segment that nothing is put into, since it is about to go.
        """
        segments, catalog = self._folder.segments, self._folder.catalog
        known = catalog.segments()
        there = set(segments.numbers()) - catalog.unreadable()
        for number in there - known.keys():
            if not self._adopt(number):
                segments.unlink(number)
        for number in known.keys() - there - catalog.unreadable():
            self._counts["evicted"] += self._drop(number)  # removed when the index was full
        # Files that others removed give their space back once nobody has them open.
        segments.forget(segments.opened() - there)
        # Only the last is ever appended to: no other can have been left with more than is known.
        number = max(there & known.keys(), default=0)
        if number in (0, leaving):
            return number, self.segment_bytes  # a new one
        end = known[number].end
        if (size := segments.appendable(number)) != end:
            if size is None or size < end:
                end = self.segment_bytes  # it is not ours alone, or was cut short: a new one
            else:
                end = self._adopt(number, end, end)
                segments.truncate(number, end)
        return number, end

    def _drop_dead_segments(self) -> None:
        used = self._folder.catalog.segments()
        empty = [number for number, use in used.items() if use.records == 0]
        dead = [number for number in empty if not self._adopt(number)]
        if not dead:
            return
        with self._folder.catalog.change() as change:
            for number in dead:
                change.drop_segment(number)
        for number in dead:
            self._folder.segments.unlink(number)

    def _adopt(self, number: int, start: int = 0, end: int = 0) -> int:
        """Index what a file has from `start` on and is not known; as `strays.adopt`."""
        folder = self._folder
        return strays.adopt(folder.segments, folder.catalog, folder.identity, number, start, end)

    def _evict_for(self, need: int) -> None:
        """Evict until `need` bytes more are within the limit, and as many again."""
        self._expire()
        live = sum(use.live for use in self._folder.catalog.segments().values())
        goal = max(0, self.limit - 2 * need)
        incoming = Item(key=b"", size=need)
        out: list[bytes] = []
        later: list[tuple[bytes, bytes]] = []
        while live > goal:
            id = self._policy.evict(incoming, time.time()) if self._items else None
            if id is None or id == incoming.key:
                if live + need <= self.limit or not self._tell():
                    break
                continue
            assert isinstance(id, bytes)
            row = self._pop(id)
            use = self._folder.catalog.use(id)
            if use is None:  # others evicted it
                continue
            if use.tick > tick_of(self._told):  # it was read since, as the policy will be told
                later.append((id, row))
                continue
            live -= about(row).size
            out.append(id)
        for id, row in later:
            self._hold(id, row)
        self.evict(out)
        if live + need > self.limit:
            raise NoRoomError(f"got {need} bytes, and the policy keeps what it has")

    def _tell(self) -> int:
        """Tell the policy of puts and reads that it has not been told of; how many."""
        catalog = self._folder.catalog
        if catalog.number != self._seen:  # one that was made again counts anew
            self._seen, self._told, self._happened = catalog.number, b"", None
        happened = catalog.next_seq()
        new = 0 if self._happened is None else max(0, happened - self._happened)
        most = min(SOME + 2 * new, MOST)
        self._happened = happened
        found = catalog.since(self._told, most)
        for after, id, row in found:
            self._told = after
            if id in self._items:
                self._items[id] = row
                self._policy.touch(_item(id, about(row)), time.time())
            else:
                self._hold(id, row)
        self._doubt()
        return len(found)

    def _doubt(self) -> None:
        """Forget what others evicted, some of it at a time, where it is as much as there is."""
        if not self._doubted and len(self._items) > 2 * len(self._folder.catalog) + MOST:
            self._doubted = list(self._items)
        some = self._doubted[-SOME:]
        del self._doubted[-SOME:]
        for id, held in zip(some, self._folder.catalog.contains(some), strict=True):
            if not held:
                self._forget(id)

    def _expire(self) -> None:
        """Evict what the policy does not serve any more."""
        expired = [id for id in self._policy.expired(time.time()) if isinstance(id, bytes)]
        if expired:
            self.evict(expired)

    def _hold(self, id: bytes, row: bytes) -> None:
        """Let the policy hold a record."""
        told = about(row)
        self._policy.insert(_item(id, told, self._ends.get(told.begins)), told.created)
        self._ends[told.ends] = id
        self._items[id] = row

    def _forget(self, id: bytes) -> None:
        if self._removed is not None:
            self._removed.append(id[:32])
        if id in self._items:
            self._pop(id)
            self._policy.remove(id)

    def _pop(self, id: bytes) -> bytes:
        """Let go of what is known of a record that the policy has let go of, or is about to."""
        row = self._items.pop(id)
        ends = about(row).ends
        if self._ends.get(ends) == id:
            del self._ends[ends]
        return row


def _item(id: bytes, told: About, parent: bytes | None = None) -> Item:
    return Item(key=id, size=told.size, cost=float(told.T), parent=parent)
