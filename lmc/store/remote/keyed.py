"""A tier on a server that holds bytes by key.

A part of a record (what one rank put) is one value: header and payload as `lmc.store.wire` has
them. Beside it its header is added to two entries, by content key and by what stands before it, so
that a lookup of a whole prompt is one question; a second one, whether the parts are still there, is
asked of what was found alone. A server may let go of any value at any time: what an entry tells of
is believed only as far as its part is there, and its bytes as far as they verify, and whoever puts
what is there tells of it again where an entry does not.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np

from lmc.model.layout import KVLayout
from lmc.store import payload, wire
from lmc.store.assembly import Progress, Takes, fill, plan
from lmc.store.flights import Flights
from lmc.store.reads import Reads
from lmc.store.record import Record, superseded
from lmc.store.remote.entries import Entry, Parts, behind_key, content_key, home_of, keys_of
from lmc.store.remote.server import CACHED, Fault, Key, Put, Server, header_of
from lmc.store.sections import Form, Heads, Section, complete, covered, full_attention, own
from lmc.store.tier import Behind, Durability, Outcome, Wanted
from lmc.store.wire import Header

logger = logging.getLogger(__name__)

_FRONT = 1024  # bytes of a header, at most, but for its tokens and spans
LATEST = 16  # of what continues one text; the disk tier tells as many
REMEMBERED = 1 << 13  # records whose parts are known: four prompts of 128,000 tokens
BATCH_BYTES = 16 << 20  # of one put on its way


class Keyed:
    """Chunks on a server, for one rank; see `lmc.store.tier.Tier`.

    Args:
        name: for reports.
        layout: of the rank.
        heads: which of the model's heads those of the layout are; by default all.
        compression: one of `lmc.store.compress.CODECS`.
        label: the model's name, for people.
    """

    durability: Durability = "evictable"
    capacity: int | None = None
    size: int | None = None
    epoch: int | None = None

    def __init__(
        self,
        name: str,
        server: Server,
        layout: KVLayout,
        heads: Heads | None = None,
        exact_variants: int = 2,
        compression: str = "none",
        label: str = "",
    ) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self._server, self._layout = server, layout
        self._heads = heads or (0, layout.G, layout.G)
        self._exact_variants, self._compression = exact_variants, compression
        self._label = label.encode()[:255].decode(errors="ignore")
        self._parts: OrderedDict[bytes, Parts] = OrderedDict()  # by record id
        self._said: set[str] = set()
        self.flights: Flights | None = None  # of a server that can tell
        self._reads = Reads(name, self._read, server.reads)
        self.get_many = self._reads.start

    def register(self, address: int, nbytes: int) -> None:
        """Nothing here is written by a transport of its own."""

    def lookup_many(
        self, namespace: bytes, keys: Sequence[bytes], behind: Sequence[Behind], deadline: float
    ) -> tuple[list[list[Record]], list[list[Record]]]:
        digest = wire.namespace_digest(namespace)
        asked = [content_key(digest, key) for key in keys]
        asked += [behind_key(digest, context, first) for context, first in behind]
        told: list[list[Record]] = [[] for _ in asked]
        with self._surviving("lookup"):
            entries = self._entries(dict.fromkeys(asked))
            found = self._parsed(entries)
            parts = [part for entry in found.values() for part in entry.parts()]
            if parts and time.monotonic() < deadline:
                there = self._there(parts)
                for i, key in enumerate(asked):
                    if entries[key] and time.monotonic() < deadline:
                        told[i] = self._told(found[key], there, namespace)
        by_key = [[r for r in some if not r.tail] for some in told[: len(keys)]]
        return by_key, [some[-LATEST:] for some in told[len(keys) :]]

    def contains(self, records: Sequence[Record]) -> list[bool]:
        held: dict[bytes, Parts] = {}
        with self._surviving("lookup"):
            held = self._held(records)
        return [self._has_own(held.get(record.id, {})) for record in records]

    def put(self, items: Sequence[tuple[Record, Sequence[Section]]]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for batch in _batches(items):
            done: list[Outcome] = ["failed"] * len(batch)
            with self._surviving("put"):
                done = self._put(batch)
            outcomes += done
        self.counts.update(outcomes)
        return outcomes

    def evict(self, records: Sequence[Record]) -> None:
        with self._surviving("evict"):
            held = self._held(records)
            self._server.delete([Key("part", id) for some in held.values() for id in some])
        for record in records:
            self._parts.pop(record.id, None)

    def close(self) -> None:
        self._reads.close()
        self._server.close()

    # -- parts -------------------------------------------------------------------------------

    def _put(self, batch: Sequence[tuple[Record, Sequence[Section]]]) -> list[Outcome]:
        """Of each what became of it; raises Fault."""
        found = self._parsed(self._entries({k: None for r, _ in batch for k in keys_of(r)}))
        there = self._there([part for entry in found.values() for part in entry.parts()])
        outcomes: list[Outcome] = []
        new: list[tuple[int | None, Put]] = []
        gone: list[Key] = []
        for record, sections in batch:
            entry = found[home_of(record)]
            forms = tuple(form for form, _ in sections)
            mine = {id: part for id, part in entry.of(record.id).items() if id in there}
            held = _forms(mine)
            if forms and all(covered(form, held) for form in forms):
                outcomes.append("known")
                # A server may have let go of what tells of it by one of its names.
                untold = [k for k in keys_of(record) if mine.keys() - found[k].of(record.id).keys()]
                new += [(None, _frame(id, header, untold)) for id, header in mine.items() if untold]
                continue
            known = [r for r in self._told(entry, there, record.namespace) if r.id != record.id]
            alike = [r for r in known if _rivals(r, record)]
            out = superseded(alike, record, self._exact_variants)
            if out is None and not mine:
                outcomes.append("known")
                continue
            try:
                id, header, data = self._encoded(record, sections)
            except (ValueError, IndexError):
                outcomes.append("failed")
                continue
            of_part = Put(Key("part", id), data, keys_of(record), id + header)
            new.append((len(outcomes), of_part))
            outcomes.append("stored")
            gone += [Key("part", part) for other in out or [] for part in entry.of(other.id)]
            for key in keys_of(record):
                found[key].add(id + header)
            there.add(id)
            self._remember(record.id, mine | {id: header_of(header)})
        for (i, _), fault in zip(new, self._server.put([put for _, put in new]), strict=True):
            if fault is not None:
                self._count(str(fault), "put")
                if i is not None:
                    outcomes[i] = "full" if str(fault) == "full" else "failed"
        if gone:
            self._server.delete(gone)
        return outcomes

    def _encoded(
        self, record: Record, sections: Sequence[Section]
    ) -> tuple[bytes, bytes, memoryview]:
        """A part's id, its header, and header and payload as one; ValueError as `encode`."""
        room: list[np.ndarray] = []
        front = _FRONT + 4 * record.T + sum(64 + 32 * form.L for form, _ in sections)

        def memory(n: int) -> np.ndarray:
            room.append(np.empty(front + n, np.uint8))
            return room[0][front:]

        codec, label = self._compression, self._label
        encoded = payload.encode(record, sections, codec, label, self.counts, memory)
        if not room:  # it is where it was
            memory(encoded.payload.nbytes)[:] = encoded.payload
        header, _ = encoded.packed()
        start = front - len(header)
        room[0][start:front] = np.frombuffer(header, np.uint8)
        id = wire.part_id(record.id, encoded.header.forms)
        return id, header, room[0][start : front + encoded.payload.nbytes].data

    def _read(self, wanted: Wanted, arrived: Callable[[int], None]) -> bool:
        """Bring a chunk's sections; whether all of it is there."""
        record, into = wanted.record, wanted.into
        with self._surviving("get"):
            parts = self._parts.get(record.id)
            for fresh in (parts is None, True):
                if fresh:
                    parts = self._held([record])[record.id]
                assert parts is not None
                takes = plan([p.forms for p in parts.values()], [form for form, _ in into])
                if takes is None:
                    continue
                progress = Progress(into, [some for _, some in takes], arrived)
                some_parts = [*parts.items()]
                came = [
                    self._take(record, *some_parts[i], some, into, partial(progress.have, n))
                    for n, (i, some) in enumerate(takes)
                ]
                if all(came):
                    return True
            self.counts["missing" if not parts else "not_all_there"] += 1
        return False

    def _take(
        self,
        record: Record,
        id: bytes,
        header: Header,
        takes: Takes,
        into: Sequence[Section],
        arrived: Callable[[int, int], None],
    ) -> bool:
        """Fill sections from one part; whether it was there, and what was put."""
        try:
            found = self._server.get(Key("part", id), header)
            if found is None:
                self._parts.pop(record.id, None)
                return False
            header, spans = found
            if header.id != id or not _same(header.record, record):
                raise ValueError("another part")
            fill(header, spans, takes, into, arrived)
        except ValueError:
            # It can serve nobody: the next one puts it again.
            self._count("damaged", "get")
            self._parts.pop(record.id, None)
            self._server.delete([Key("part", id)])
            return False
        return True

    def _entries(self, keys: Iterable[Key]) -> dict[Key, bytes]:
        keys = list(keys)
        return dict(zip(keys, self._server.entries(keys), strict=True)) if keys else {}

    def _parsed(self, entries: dict[Key, bytes]) -> dict[Key, Entry]:
        """What entries tell, as far as they can be read; who adds to one mends it."""
        found = {key: Entry(data) for key, data in entries.items()}
        if any(entry.damaged for entry in found.values()):
            self._count("damaged", "lookup")
        return found

    def _there(self, parts: Sequence[bytes]) -> set[bytes]:
        """Which parts are there."""
        parts = list(dict.fromkeys(parts))
        if not parts:
            return set()
        held = self._server.holds([Key("part", id) for id in parts])
        return {id for id, here in zip(parts, held, strict=True) if here}

    def _held(self, records: Sequence[Record]) -> dict[bytes, Parts]:
        """By record, the parts that are there of it."""
        entries = self._entries({home_of(record): None for record in records})
        found = self._parsed(entries)
        known = {r.id: found[home_of(r)].of(r.id) for r in records}
        there = self._there([id for some in known.values() for id in some])
        held = {
            record: {id: part for id, part in some.items() if id in there}
            for record, some in known.items()
        }
        for record, some in held.items():
            self._remember(record, some)
        return held

    def _remember(self, record: bytes, parts: Parts) -> None:
        if any(header.size > CACHED for header in parts.values()):
            return
        self._parts[record] = parts
        while len(self._parts) > REMEMBERED:
            try:
                self._parts.popitem(last=False)
            except KeyError:  # another thread has
                break

    def _told(self, entry: Entry, there: set[bytes], namespace: bytes) -> list[Record]:
        """Records of an entry that this rank can use, the oldest first."""
        told = []
        for id, record in entry.records.items():
            parts = {part: header for part, header in entry.of(id).items() if part in there}
            forms = _forms(parts)
            if not parts or not complete(forms):
                continue
            mine = own(forms, self._heads)
            fits = len(mine) != 1 or mine[0].kind != "kv"
            if not fits and mine[0] != full_attention(self._layout, record.T, self._heads):
                continue
            self._remember(id, parts)
            nbytes = sum(form.nbytes for form in mine)
            told.append(replace(record, namespace=namespace, nbytes=nbytes))
        return told

    def _has_own(self, parts: Parts) -> bool:
        forms = _forms(parts)
        return bool(forms) and all(covered(form, forms) for form in own(forms, self._heads))

    @contextmanager
    def _surviving(self, doing: str) -> Iterator[None]:
        """What a server does wrong is counted, and said once a kind."""
        try:
            yield
        except Fault as fault:
            self._count(str(fault), doing)
        except Exception:  # nothing of a server's is a caller's to bear
            logger.exception("lmc: tier %s: a %s failed", self.name, doing)
            self._count("unexpected", doing)

    def _count(self, kind: str, doing: str) -> None:
        self.counts[f"faults:{kind}"] += 1
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("lmc: tier %s: %s at a %s; it goes on without", self.name, kind, doing)


def _batches(
    items: Sequence[tuple[Record, Sequence[Section]]],
) -> Iterator[list[tuple[Record, Sequence[Section]]]]:
    batch: list[tuple[Record, Sequence[Section]]] = []
    nbytes = 0
    for record, sections in items:
        batch.append((record, sections))
        nbytes += sum(part.nbytes for _, parts in sections for part in parts)
        if nbytes >= BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _forms(parts: Parts) -> list[Form]:
    return [form for header in parts.values() for form in header.forms]


def _frame(id: bytes, header: Header, entries: Sequence[Key]) -> Put:
    """What tells of a part that is there."""
    return Put(Key("part", id), memoryview(b""), entries, id + wire.pack(header))


def _rivals(known: Record, new: Record) -> bool:
    """Whether one of them may take the place of the other: of a content, or tails of a context."""
    if new.tail:
        return known.tail and known.context == new.context
    return known.key == new.key


def _same(stored: Record, record: Record) -> bool:
    return (
        stored.tokens == record.tokens
        and stored.key == record.key
        and stored.namespace == wire.namespace_digest(record.namespace)
    )
