"""What a new part takes the place of."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lmc.store.disk import header as fmt
from lmc.store.disk.catalog import Reading
from lmc.store.disk.header import Header
from lmc.store.disk.segments import Located
from lmc.store.record import Record, superseded
from lmc.store.sections import Form, complete, covered

Parts = Sequence[tuple[bytes, Located]]  # of one record, by their ids


def ids_replaced(
    index: Reading, new: Header, there: Parts, bad: Collection[bytes], exact_variants: int
) -> list[bytes] | None:
    """Ids of the records that a new part takes the place of; None when it would add nothing.

    Ranks put their parts one after the other, and one may never come: a record that is not whole
    counts for nothing, and takes no place before its last part is there.

    Args:
        there: parts of the same record.
        bad: parts that are known to be damaged: they stand in nobody's way.
    """
    record = new.record
    if has_all(there, new.forms, bad):
        return None
    if record.tail:
        tail = index.tail(record.namespace, record.context)
        parts = [] if tail is None else [part for part, _ in index.parts(tail)]
    else:
        parts = [listed[8:] for _, listed in index.listed([record.key])]
    if not parts:  # of most of what is put nothing is known
        return None if superseded((), record, exact_variants) is None else []
    headers = index.headers(part for part in parts if part not in bad)
    known: dict[bytes, Record] = {}
    forms: dict[bytes, list[Form]] = {}
    for data in headers.values():
        other = fmt.record_of(data)
        known.setdefault(other.id, other)
        forms.setdefault(other.id, []).extend(fmt.forms_of(data))
    known.pop(record.id, None)
    whole = [other for id, other in known.items() if complete(forms[id])]
    replaced = superseded(whole, record, exact_variants)
    if replaced is None or complete([*_forms(there, bad), *new.forms]):
        return None if replaced is None else [other.id for other in replaced]
    return []


def has_all(parts: Parts, wanted: Sequence[Form], bad: Collection[bytes]) -> bool:
    """Whether parts have all that is wanted of their record."""
    forms = _forms(parts, bad)
    return bool(forms) and all(covered(form, forms) for form in wanted)


def within(parts: Parts, new: Header) -> list[bytes]:
    """Ids of parts that have nothing beside what a new one has."""
    return [
        id for id, located in parts
        if all(covered(form, new.forms) for form in fmt.forms_of(located.header))
    ]  # fmt: skip


def _forms(parts: Parts, bad: Collection[bytes]) -> list[Form]:
    headers = [at.header for part, at in parts if part not in bad]
    return [form for data in headers for form in fmt.forms_of(data)]
