"""Gets of one rank from a folder: where a record's parts are, and what is met on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from lmc.store.assembly import Progress, plan
from lmc.store.disk.directory import REMEMBERED, Directory
from lmc.store.disk.faults import FAULTS, kind_of
from lmc.store.disk.folder import Folder
from lmc.store.disk.header import HeaderError
from lmc.store.disk.read import (
    Damaged,
    Part,
    Sources,
    known,
    read_part,
    read_straight,
    straight,
    view_part,
)
from lmc.store.disk.room import Room
from lmc.store.record import Record
from lmc.store.sections import Section


class _Found(NamedTuple):
    """Parts of a record, and the one that is all that this rank has, as it was put, if one is."""

    parts: list[Part]
    whole: Part | None


class _LostError(Exception):
    """A part is not where it was, or not what it was: `met` is what was met."""

    def __init__(self, part: Part, met: Exception) -> None:
        self.part, self.met = part, met


class Reader:
    """Reads sections, and looks again where others have moved them.

    Args:
        bad: ids of parts that failed to verify, as far as this process knows; more are added.
    """

    def __init__(
        self,
        folder: Folder,
        room: Room,
        directory: Directory,
        bad: set[bytes],
    ) -> None:
        self._folder, self._room, self._directory, self._bad = folder, room, directory, bad
        self._counts = folder.counts
        self._uses: dict[bytes, int] = {}  # reads that the index has not been told of
        # By id, what the index said of records that were read: the file is compared with it at
        # every read, and where it says otherwise the index is asked again.
        self._found: dict[bytes, _Found] = {}

    def forget(self, id: bytes) -> None:
        """A record has been changed."""
        self._found.pop(id, None)

    def uses(self) -> dict[bytes, int]:
        """How often parts were read since this was last asked, by id."""
        uses, self._uses = self._uses, {}
        return dict(uses)  # in one go: a get that has begun may still count

    def get(
        self,
        record: Record,
        into: Sequence[Section] | None,
        deadline: float | None,
        arrived: Callable[[int], None],
    ) -> Sequence[Section] | None:
        """As `Disk.get`; raises what a disk and an index can, and TimeoutError."""
        id = record.id
        found = self._found.get(id)
        if found is not None and into is None and found.whole is not None:
            # The way of most gets: all that a longer one costs shows beside a small chunk.
            part = found.whole
            if not self._is(record, part):
                return None
            try:
                view = view_part(self._folder.segments, part, deadline)
            except (Damaged, EOFError, FileNotFoundError):
                self.forget(id)
                self._folder.segments.forget({part.located.segment})
                found = None
            else:
                arrived(part.known.shape[0])
                self._uses[part.known.id] = self._uses.get(part.known.id, 0) + 1
                return view
        before: Part | None = None
        while True:
            if found is None:
                found = self._locate(record)
            if not found.parts or not self._is(record, found.parts[0]):
                return None
            try:
                got = self._read(found, into, deadline, arrived)
            except _LostError as e:
                part = e.part
                self.forget(id)
                self._folder.segments.forget({part.located.segment})
                # Has a writer moved it meanwhile? Then it is elsewhere now.
                if part.fresh and before is not None and part.located == before.located:
                    self._set_aside(part, e.met)
                    return None
                before, found = part if part.fresh else before, None
                continue
            if got is None and not found.parts[0].fresh:  # there may be more of it by now
                self.forget(id)
                found = None
                continue
            return got

    def _locate(self, record: Record) -> _Found:
        """What the index has of a record; raises HeaderError where that cannot be."""
        with self._folder.catalog.reading() as index:
            there = index.parts(record.id)
        parts = []
        for id, located in there:
            if id in self._bad:
                continue
            part = Part(located, known(located.header))
            # Then it is the index that cannot be believed.
            if part.known.id != id or part.known.header.folder != self._folder.identity:
                raise HeaderError("another's record")
            parts.append(part)
        found = _Found(parts, self._whole(parts))
        if len(self._found) >= REMEMBERED:
            self._found.clear()
        again = [Part(part.located, part.known, fresh=False) for part in parts]
        if again:
            self._found[record.id] = _Found(again, self._whole(again))
        return found

    def _whole(self, parts: Sequence[Part]) -> Part | None:
        forms = [form for part in parts for form in part.known.forms]
        own = tuple(self._directory.own(forms))
        return next((p for p in parts if p.known.plain and p.known.forms == own), None)

    def _is(self, record: Record, part: Part) -> bool:
        """Whether a part is of the record that was asked for."""
        stored = part.known.record
        if (
            stored.tokens == record.tokens
            and stored.key == record.key
            and stored.namespace == self._directory.digest_of(record.namespace)
        ):
            return True
        self._counts["not_its_record"] += 1  # who asks is wrong: what is stored stays
        return False

    def _read(
        self,
        found: _Found,
        into: Sequence[Section] | None,
        deadline: float | None,
        arrived: Callable[[int], None],
    ) -> Sequence[Section] | None:
        """The sections; None where the parts do not have them. Raises _LostError too."""
        segments = self._folder.segments
        if into is None and found.whole is not None:
            with _losing(found.whole):
                got = view_part(segments, found.whole, deadline)
            arrived(got[0].form.L)
            self._used([found.whole])
            return got
        if into is None:
            wanted = self._directory.own(f for part in found.parts for f in part.known.forms)
        else:
            wanted = [form for form, _ in into]
        sources: Sources | None
        if found.whole is not None and (*wanted,) == found.whole.known.forms:
            sources = [(found.whole, [(0, wanted[0])])]
        else:
            takes = plan([part.known.forms for part in found.parts], wanted)
            sources = None if takes is None else [(found.parts[i], some) for i, some in takes]
        if sources is None:
            if found.parts[0].fresh:
                self._counts["other_layout"] += 1
            return None
        if into is None:
            into = [Section(form, [np.empty(form.shape, np.uint8)]) for form in wanted]
        self._fill(sources, into, deadline, arrived)
        self._used([part for part, _ in sources])
        return into

    def _fill(
        self,
        sources: Sources,
        into: Sequence[Section],
        deadline: float | None,
        arrived: Callable[[int], None],
    ) -> None:
        segments = self._folder.segments
        if straight(sources, into):
            with _losing(sources[0][0]):
                read_straight(segments, sources[0][0], into[0], deadline, arrived)
            return
        progress = Progress(into, [wanted for _, wanted in sources], arrived)
        for i, (part, wanted) in enumerate(sources):
            with _losing(part):
                read_part(segments, part, wanted, into, deadline, partial(progress.have, i))

    def _used(self, parts: Sequence[Part]) -> None:
        uses = self._uses
        for part in parts:
            uses[part.known.id] = uses.get(part.known.id, 0) + 1

    def _set_aside(self, part: Part, fault: Exception) -> None:
        """Never serve a part again that failed to verify where it was."""
        id, reason = part.known.id, kind_of(fault)
        self._counts[f"damaged:{reason}"] += 1
        self._bad.add(id)
        if self._folder.read_only:
            return
        try:
            with self._folder.writing(1.0):
                if not self._room.quarantine(id, part.located, reason):  # it has been put again
                    self._bad.discard(id)
                    return
            self._counts["quarantined"] += 1
        except FAULTS as e:
            self._folder.index_fault(e)


class _losing:  # noqa: N801 as `contextlib.suppress`; a generator takes longer than a get
    """Says of which part it was that a read found it lost."""

    __slots__ = ("_part",)

    def __init__(self, part: Part) -> None:
        self._part = part

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, fault: object, trace: object) -> None:
        if isinstance(fault, Damaged | EOFError | FileNotFoundError):
            raise _LostError(self._part, fault) from fault
