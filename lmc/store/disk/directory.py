"""What a folder tells of its records without reading them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from lmc.model.layout import KVLayout
from lmc.store import wire
from lmc.store.disk import header as fmt
from lmc.store.disk.catalog import RECORD, Reading
from lmc.store.disk.folder import Folder
from lmc.store.record import Record
from lmc.store.sections import Form, Heads, complete, covered, full_attention, own
from lmc.store.tier import Behind

# Records whose headers have been looked at: a prompt of 128,000 tokens has 2,000.
REMEMBERED = 1 << 14
LISTED = 48  # bytes with which the index lists a part


class Told(NamedTuple):
    """What the parts that there are of a record come to.

    Attributes:
        record: None unless they have all heads, and what this rank can take.
        held: whether they have this rank's heads.
    """

    record: Record | None
    held: bool


class _Judged(NamedTuple):
    """The same of all records of some forms; `nbytes` are of this rank."""

    usable: bool
    held: bool
    nbytes: int


class Directory:
    """What of a folder's records one rank can use.

    Args:
        layout: of the rank; None for whatever there is.
        heads: which of the model's heads those of the layout are.
        bad: ids of parts that failed to verify.
    """

    def __init__(
        self, folder: Folder, layout: KVLayout | None, heads: Heads | None, bad: Collection[bytes]
    ) -> None:
        self._folder, self._layout, self._bad = folder, layout, bad
        self._heads = heads or (None if layout is None else (0, layout.G, layout.G))
        self._digests: dict[bytes, bytes] = {}
        # By namespace and what the index lists of a record's parts, number of the put and id of
        # each: nothing of what was put under a number is ever another.
        self._told: dict[tuple[bytes, bytes], Told] = {}
        self._judged: dict[tuple[tuple[int, bytes], ...], _Judged] = {}

    def lookup_many(
        self, namespace: bytes, keys: Sequence[bytes], behind: Sequence[Behind], deadline: float
    ) -> tuple[list[list[Record]], list[list[Record]]]:
        """As `Tier.lookup_many`; raises what an index can."""
        digest = self.digest_of(namespace)
        variants: dict[bytes, list[Record]] = {}
        by_id: dict[bytes, Record | None] = {}
        after: list[list[Record]] = [[] for _ in behind]
        with self._folder.catalog.reading() as index:
            parts: dict[bytes, list[bytes]] = {}
            all_listed = index.listed(dict.fromkeys(keys))
            for key, listed in all_listed:
                parts.setdefault(key, []).append(listed)
            # Many are fetched in half the time that one after the other takes.
            new = [listed[8:] for _, listed in all_listed if (namespace, listed) not in self._told]
            headers = index.headers(new)
            for key, several in parts.items():
                if time.monotonic() > deadline:
                    break
                records: dict[bytes, bytes] = {}  # of each, all of its parts
                for listed in several:
                    id = listed[RECORD]
                    records[id] = records[id] + listed if id in records else listed
                found = variants[key] = []
                for id, listed in records.items():
                    by_id[id] = record = self._tell(index, listed, namespace, headers).record
                    if record is not None:
                        found.append(record)
            questions = [digest + context + first for context, first in behind]
            for out, ids in zip(after, index.latest(questions), strict=True):
                if ids and time.monotonic() > deadline:
                    break
                for id in ids:
                    if id not in by_id:
                        by_id[id] = self._tell(index, index.listed_parts(id), namespace).record
                    record = by_id[id]
                    if record is not None:
                        out.append(record)
        return [variants.get(key, []) for key in keys], after

    def contains(self, records: Sequence[Record]) -> list[bool]:
        """Of which records this rank's heads are there; raises what an index can."""
        with self._folder.catalog.reading() as index:
            return [
                bool(listed) and self._tell(index, listed, record.namespace).held
                for record in records
                for listed in [index.listed_parts(record.id)]
            ]

    def own(self, forms: Iterable[Form]) -> list[Form]:
        """What this rank has of a record of these forms, each kin once, in the order told."""
        return own(forms, self._heads)

    def digest_of(self, namespace: bytes) -> bytes:
        """What stands for a namespace in files."""
        digest = self._digests.get(namespace)
        if digest is None:
            if len(self._digests) >= REMEMBERED:
                self._digests.clear()
            digest = self._digests[namespace] = wire.namespace_digest(namespace)
        return digest

    def _tell(
        self,
        index: Reading,
        listed: bytes,
        namespace: bytes,
        headers: Mapping[bytes, memoryview] | None = None,
    ) -> Told:
        """Of a record's parts, as the index lists them, one after the other.

        headers: of parts, as far as they are at hand.
        """
        if self._bad:
            each = (listed[at : at + LISTED] for at in range(0, len(listed), LISTED))
            listed = b"".join(part for part in each if part[8:] not in self._bad)
        told = self._told.get((namespace, listed))
        if told is None:
            if len(self._told) >= REMEMBERED:
                self._told.clear()
            told = self._read(index, listed, namespace, headers)
            self._told[namespace, listed] = told
        return told

    def _read(
        self,
        index: Reading,
        listed: bytes,
        namespace: bytes,
        headers: Mapping[bytes, memoryview] | None,
    ) -> Told:
        ids = [listed[at + 8 : at + LISTED] for at in range(0, len(listed), LISTED)]
        if headers is None or not all(id in headers for id in ids):
            headers = index.headers(ids)
        shapes = []
        first: memoryview | None = None
        for id in ids:
            if id in headers:
                part = fmt.part_of(headers[id])
                shapes.append(wire.shape_of(part))
                first = part if first is None else first
        key = tuple(shapes)
        judged = self._judged.get(key)
        if judged is None:
            if len(self._judged) >= REMEMBERED:
                self._judged.clear()
            judged = self._judged[key] = self._judge(key)
        if first is None or not judged.usable:
            return Told(None, judged.held)
        record = wire.record_of(first, None, judged.nbytes)
        if record.namespace != self.digest_of(namespace):
            return Told(None, False)
        object.__setattr__(record, "namespace", namespace)
        return Told(record, judged.held)

    def _judge(self, shapes: Sequence[tuple[int, bytes]]) -> _Judged:
        forms = [form for _, described in shapes for form in wire.forms_of(described)]
        own = self.own(forms)
        if not own or not self._fits(shapes[0][0], own):
            return _Judged(False, False, 0)
        held = all(covered(form, forms) for form in own)
        return _Judged(complete(forms), held, sum(form.nbytes for form in own))

    def _fits(self, T: int, own: Sequence[Form]) -> bool:
        """Whether this rank can take a record: one of full attention must be of its layout."""
        if self._layout is None or len(own) != 1 or own[0].kind != "kv":
            return True
        return own[0] == full_attention(self._layout, T, self._heads)
