"""A tier of your own, whole: chunks in a dict, as a stand-in for whatever holds bytes by key.

In a config: `{"name": "docs.example_tier:Example"}`, or your module and class. docs/store.md says
what is promised; `tests/store/test_contract.py` checks it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from lmc.store.reads import Reads
from lmc.store.rows import copy_rows
from lmc.store.sections import complete
from lmc.store.tier import Behind

PLACES = {}  # by name: what is held, and how it is found; scheduler and worker share it


class Remembering:
    name, capacity, durability, epoch = "example", None, "evictable", None

    def __init__(self, place):
        self.counts = Counter()
        # By id: record, and rows by form. By namespace and key, or Behind: ids, the oldest first.
        self.held, self.known = PLACES.setdefault(place, ({}, {}))
        self.reads = Reads(self.name, self.read)  # threads for reads that block
        self.get_many = self.reads.start

    @property
    def size(self):
        return sum(rows.nbytes for _, forms in self.held.values() for rows in forms.values())

    def register(self, address, nbytes):
        pass  # a transport that reads and writes memory directly would pin it here

    def lookup_many(self, namespace, keys, behind, deadline):
        def of(question):
            ids = self.known.get((namespace, question), ())
            found = [self.held[id] for id in ids if id in self.held]
            # Of a model on several ranks, once all of them have put their heads.
            return [record for record, forms in found if complete([*forms])]

        return [of(key) for key in keys], [of(question) for question in behind]

    def contains(self, records):
        return [record.id in self.held for record in records]

    def put(self, items):
        return [self.put_one(record, sections) for record, sections in items]

    def put_one(self, record, sections):
        _, there = self.held.get(record.id, (None, {}))
        if sections and all(form in there for form, _ in sections):
            self.counts["known"] += 1
            return "known"
        # A copy: the memory of the sections is another's once this returns.
        forms = {form: np.empty(form.shape, np.uint8) for form, _ in sections}
        try:
            for form, parts in sections:
                copy_rows(parts, [forms[form]])
        except ValueError:  # rows that are not what their form says
            forms = {}
        if not forms:
            self.counts["failed"] += 1
            return "failed"
        self.held[record.id] = replace(record, slot=-1), there | forms
        if not record.tail:
            self.known.setdefault((record.namespace, record.key), {})[record.id] = True
        if record.origin != "blended":
            question = Behind(record.context, record.tokens[:8])
            self.known.setdefault((record.namespace, question), {})[record.id] = True
        return "stored"

    def read(self, wanted, arrived):
        _, forms = self.held.get(wanted.record.id, (None, {}))
        if not all(form in forms for form, _ in wanted.into):
            return False
        layers = 0
        for form, parts in sorted(wanted.into, key=lambda section: section.form.group):
            copy_rows([forms[form]], parts)
            layers += form.L
            arrived(layers)
        return True

    def evict(self, records):
        for record in records:
            self.held.pop(record.id, None)

    def close(self):
        self.reads.close()


@dataclass(frozen=True)
class Example:
    """What a config says of it: any fields of your own, and `write`."""

    place: str = "here"
    write: str = "through"

    def open(self, layout, *, heads=None, exact_variants=2, label=""):
        return Remembering(self.place)
