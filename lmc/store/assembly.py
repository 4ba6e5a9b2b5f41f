"""Sections out of the parts of a record: which part has what, verified band by band."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lmc.store.payload import covered_by, decode_span, head_bytes
from lmc.store.rows import copy_rows
from lmc.store.sections import Form, Rows, Section
from lmc.store.wire import Header, digest_of, order

# Of a part: which of the wanted sections, by index, and which heads of it.
Takes = Sequence[tuple[int, Form]]


def plan(
    parts: Sequence[Sequence[Form]], wanted: Sequence[Form]
) -> list[tuple[int, list[tuple[int, Form]]]] | None:
    """From which parts of a record to take what, by index.

    As few parts as heads need; None where they do not have all that is wanted.

    Args:
        parts: the forms of each.
    """
    taken: dict[int, list[tuple[int, Form]]] = {}
    for n, form in enumerate(wanted):
        kin = form.kin
        have = [
            (*other.heads[:2], i)
            for i, part in enumerate(parts)
            for other in part
            if other.kin == kin
        ]
        at, end, of = form.heads
        while at < end:
            # The one that reaches furthest of those that have the next head.
            reach, i = max(((e, i) for s, e, i in have if s <= at < e), default=(at, -1))
            if i < 0:
                return None
            taken.setdefault(i, []).append((n, form.of((at, min(reach, end), of))))
            at = reach
    return list(taken.items())


def fill(
    header: Header,
    spans: Iterable[np.ndarray],
    takes: Takes,
    into: Sequence[Section],
    arrived: Callable[[int, int], None],
) -> None:
    """Fill sections, or heads of them, from a part's payload.

    Args:
        spans: of `header.bands()`, uint8, in their order: the last ones while the first are used.
        arrived: called with the index of a section and how many of its layers are there.

    Raises:
        ValueError: it is not what was put; some may be written. And what `spans` raises.
    """
    served: set[int] = set()
    told = zip(header.bands(), header.sections, spans, strict=True)
    for (i, first, last, *_), span, data in told:
        if data.nbytes != span.length or digest_of(data) != span.digest:
            raise ValueError("the payload does not match its digests")
        form = header.stored[i].form
        takers = [(n, of) for n, of in takes if of.kin == form.kin and covered_by(of, form)]
        if not takers:
            continue
        if header.stored[i].codec == "none":
            rows = data.reshape(last - first, *form.shape[1:])
        else:
            rows = np.empty((last - first, *form.shape[1:]), np.uint8)
            decode_span(header.stored[i], data, rows)
        for n, of in takers:
            _copy_heads(rows, form, of, into[n], first, last)
            arrived(n, last)
            served.add(n)
    if lacking := {n for n, _ in takes} - served:
        raise ValueError(f"the part does not have {len(lacking)} of the sections that it should")


def decode(header: Header, payload: np.ndarray, into: Sequence[Section]) -> None:
    """Verify a payload, uint8 `[payload_bytes]`, and write the sections that are asked for.

    Args:
        into: of forms that the header has, each of some or all of its heads; none to verify alone.

    Raises:
        ValueError: another payload, or what is asked for is not in it; some may be written.
    """
    if payload.nbytes != header.payload_bytes:
        raise ValueError(f"got {payload.nbytes} bytes, want {header.payload_bytes}")
    taken = plan([header.forms], [form for form, _ in into])
    if taken is None:
        raise ValueError("the record does not have what is asked for")
    takes = [take for _, some in taken for take in some]
    fill(header, spans_of(header, payload), takes, into, lambda n, layers: None)


def spans_of(header: Header, payload: np.ndarray) -> list[np.ndarray]:
    """A payload that is here, uint8, as `fill` takes it."""
    return [payload[start:end] for *_, start, end in header.bands()]


class Progress:
    """How many layers are there of sections that come from several parts.

    Args:
        takes: of each part, what is taken of it.
        arrived: called with the number of layers that are there of all sections, one after the
            other in the order of `wire.order`, up to the first that is not.
    """

    def __init__(
        self, into: Sequence[Section], takes: Sequence[Takes], arrived: Callable[[int], None]
    ) -> None:
        self._order = sorted(range(len(into)), key=lambda n: order(into[n].form))
        self._layers = [section.form.L for section in into]
        self._have: list[dict[int, int]] = [{} for _ in into]
        for i, some in enumerate(takes):
            for n, _ in some:
                self._have[n][i] = 0
        self._arrived, self._told = arrived, 0

    def have(self, source: int, n: int, layers: int) -> None:
        """Of section `n` the first layers have come from a source."""
        self._have[n][source] = layers
        total = 0
        for i in self._order:
            there = min(self._have[i].values())
            total += there
            if there < self._layers[i]:
                break
        if total > self._told:
            self._told = total
            self._arrived(total)


def _copy_heads(rows: Rows, form: Form, of: Form, into: Section, first: int, last: int) -> None:
    """Copy heads of layers `[first, last)`, rows of `form`, to their place in a section.

    of: `form` with the heads to copy.
    """
    start, end = head_bytes(form, of)
    to, to_end = head_bytes(into.form, of)
    copy_rows([rows[..., start:end]], [part[first:last, :, :, to:to_end] for part in into.parts])
