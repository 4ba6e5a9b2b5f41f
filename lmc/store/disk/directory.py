"""What a folder tells of its records without reading them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lmc.model.layout import KVLayout
from lmc.store.disk import header as fmt
from lmc.store.disk.catalog import RECORD, Reading
from lmc.store.disk.folder import Folder
from lmc.store.record import Record
from lmc.store.sections import Form, Heads, complete, covered, full_attention, whole
from lmc.store.tier import Behind
from lmc.store.wire import namespace_digest

# Records whose headers have been looked at: a prompt of 128,000 tokens has 2,000.
REMEMBERED = 1 << 14


class Told(NamedTuple):
    """What the parts that there are of a record come to.

    Attributes:
        record: None unless they have all heads, and what this rank can take.
        held: whether they have this rank's heads.
    """

    record: Record | None
    held: bool


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
        # By what the index lists of a record's parts, number of the put and id of each: nothing of
        # what was put under a number is ever another.
        self._told: dict[tuple[bytes, ...], Told] = {}

    def lookup_many(
        self, namespace: bytes, keys: Sequence[bytes], behind: Sequence[Behind], deadline: float
    ) -> tuple[list[list[Record]], list[list[Record]]]:
        """As `Tier.lookup_many`; raises what an index can."""
        digest = self.digest_of(namespace)
        variants: dict[bytes, list[Record]] = {}
        by_id: dict[bytes, Record | None] = {}
        after: list[list[Record]] = [[] for _ in behind]
        with self._folder.catalog.reading() as index:
            parts: dict[bytes, dict[bytes, list[bytes]]] = {}
            for key, listed in index.listed(dict.fromkeys(keys)):
                parts.setdefault(key, {}).setdefault(listed[RECORD], []).append(listed)
            for key, records in parts.items():
                if time.monotonic() > deadline:
                    break
                found = variants[key] = []
                for id, listed_parts in records.items():
                    by_id[id] = record = self._record(index, listed_parts, namespace)
                    if record is not None:
                        found.append(record)
            questions = [digest + question.context + question.first for question in behind]
            for out, ids in zip(after, index.latest(questions), strict=True):
                if ids and time.monotonic() > deadline:
                    break
                for id in ids:
                    if id not in by_id:
                        by_id[id] = self._record(index, _listed(index, id), namespace)
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
                for listed in [_listed(index, record.id)]
            ]

    def own(self, forms: Iterable[Form]) -> list[Form]:
        """What this rank has of a record of these forms, each kin once, in the order told."""
        each: dict[object, Form] = {}
        for form in forms:
            each.setdefault(form.kin, form)
        heads = self._heads
        return [
            form.of(heads) if heads and form.heads[2] == heads[2] else whole(form)
            for form in each.values()
        ]

    def digest_of(self, namespace: bytes) -> bytes:
        """What stands for a namespace in files."""
        digest = self._digests.get(namespace)
        if digest is None:
            if len(self._digests) >= REMEMBERED:
                self._digests.clear()
            digest = self._digests[namespace] = namespace_digest(namespace)
        return digest

    def _record(self, index: Reading, listed: list[bytes], namespace: bytes) -> Record | None:
        return self._tell(index, listed, namespace).record

    def _tell(self, index: Reading, listed: list[bytes], namespace: bytes) -> Told:
        """Of a record's parts, as the index lists them."""
        if self._bad:
            listed = [part for part in listed if part[8:] not in self._bad]
        key = (namespace, *listed)
        told = self._told.get(key)
        if told is None:
            if len(self._told) >= REMEMBERED:
                self._told.clear()
            told = self._told[key] = self._read(index, listed, namespace)
        return told

    def _read(self, index: Reading, listed: list[bytes], namespace: bytes) -> Told:
        forms: list[Form] = []
        record: Record | None = None
        for part in listed:
            data = index.header(part[8:])
            if data is None:
                continue
            record, some = fmt.brief(data)
            if record.namespace != self.digest_of(namespace):
                return Told(None, False)
            forms += some
        if record is None:
            return Told(None, False)
        own = self.own(forms)
        if not self._fits(record, own):
            return Told(None, False)
        held = all(covered(form, forms) for form in own)
        if not complete(forms):
            return Told(None, held)
        nbytes = sum(form.nbytes for form in own)
        return Told(replace(record, namespace=namespace, nbytes=nbytes), held)

    def _fits(self, record: Record, own: Sequence[Form]) -> bool:
        """Whether this rank can take a record: one of full attention must be of its layout."""
        if self._layout is None or len(own) != 1 or own[0].kind != "kv":
            return True
        return own[0] == full_attention(self._layout, record.T, self._heads)


def _listed(index: Reading, record: bytes) -> list[bytes]:
    """The parts of a record as the index lists them elsewhere."""
    return [
        fmt.seq_of(located.header).to_bytes(8, "big") + id for id, located in index.parts(record)
    ]
