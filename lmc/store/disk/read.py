"""Out of a segment file: one record's sections, verified."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from xxhash import xxh3_128_digest

from lmc.store.assembly import Takes, fill, spans_of
from lmc.store.disk import header as fmt
from lmc.store.disk.header import Header, digest_of
from lmc.store.disk.segments import Located, Segments, aligned
from lmc.store.record import Record
from lmc.store.sections import Form, Section


class Damaged(Exception):  # noqa: N818 a word for the record, as `Located`
    """A part that is not what was put; the message is what of it: index, header or payload."""


@dataclass(frozen=True, eq=False)
class Known:
    """A header, and what follows from it.

    Attributes:
        id: the part's in its folder.
        record, forms: as `Header`.
        plain: whether all of it is as it was put, and of one section.
        ends: where in the payload each span ends.
        digests: of each span.
        layers: how many layers there are with each span, those of sections before it too.
        payload_at, payload_bytes: as `Header`.
        shape: of the first section.
    """

    header: Header
    record: Record
    id: bytes
    forms: tuple[Form, ...]
    plain: bool
    ends: tuple[int, ...]
    digests: tuple[bytes, ...]
    layers: tuple[int, ...]
    payload_at: int
    payload_bytes: int
    shape: tuple[int, int, int, int]


@lru_cache(maxsize=4096)  # to unpack a header takes longer than to check a small chunk
def known(data: bytes) -> Known:
    """What a header's bytes say; raises HeaderError."""
    header = fmt.unpack(data)
    stored, forms = header.part.stored, header.forms
    before = [0, *accumulate(form.L for form in forms)]
    return Known(
        header,
        header.record,
        header.id,
        forms,
        len(stored) == 1 and stored[0].codec == "none",
        tuple(end for *_, end in header.part.bands()),
        tuple(span.digest for span in header.sections),
        tuple(before[i] + last for i, _, last, _, _ in header.part.bands()),
        header.payload_at,
        header.payload_bytes,
        forms[0].shape,
    )


@dataclass(frozen=True, eq=False)
class Part:
    """Where a part is, and what its header says.

    Attributes:
        fresh: whether the index has just said so; else it may have been moved or let go of, and
            the file's own word counts.
    """

    located: Located
    known: Known
    fresh: bool = True


class _Verify:
    """Checks a part as its bytes arrive.

    Args:
        head, payload: where they arrive.
        arrived: called with the number of layers that are there.
    """

    def __init__(
        self,
        part: Part,
        head: np.ndarray,
        payload: np.ndarray,
        deadline: float | None,
        arrived: Callable[[int], None],
    ) -> None:
        self._part, self._known = part, part.known
        self._head, self._payload = head, payload.data
        self._deadline, self._arrived = deadline, arrived
        self._span = self._at = 0
        self._begun = False

    def __call__(self, n: int) -> None:
        """The first `n` bytes are there.

        Raises:
            Damaged: they are not what was put.
            TimeoutError: it is later than the deadline.
        """
        if not self._begun and n >= len(self._part.located.header):
            check_header(self._head, self._part)
            self._begun = True
        record = self._known
        n -= record.payload_at
        for end in record.ends[self._span :]:
            if end > n:
                break
            if digest_of(self._payload[self._at : end]) != record.digests[self._span]:
                raise Damaged("payload")
            self._arrived(record.layers[self._span])
            self._span, self._at = self._span + 1, end
        check_deadline(self._deadline)


def check_deadline(deadline: float | None) -> None:
    """Raise TimeoutError when it is later than `deadline`, of `time.monotonic()`."""
    if deadline is not None and time.monotonic() > deadline:
        raise TimeoutError("the deadline has passed")


def view_part(segments: Segments, part: Part, deadline: float | None) -> list[Section]:
    """All of a plain part: a view of the page cache where that has it, else read.

    Raises:
        Damaged, EOFError, FileNotFoundError: it is not what was put.
        TimeoutError: it is later than the deadline.
        OSError: the disk fails.
    """
    record, data = part.known, _fetch(segments, part, deadline)
    front = record.payload_at
    there, start = data.data, front
    for end, digest in zip(record.ends, record.digests, strict=True):
        if xxh3_128_digest(there[start : front + end]) != digest:
            raise Damaged("payload")
        start = front + end
    return [Section(record.forms[0], [data[front:].reshape(record.shape)])]


Sources = Sequence[tuple[Part, Takes]]


def straight(sources: Sources, into: Sequence[Section]) -> bool:
    """Whether a part can be read to where it is wanted, as it is."""
    if len(sources) != 1 or len(into) != 1 or len(into[0].parts) != 1:
        return False
    known, (form, (rows,)) = sources[0][0].known, into[0]
    return known.plain and known.forms[0] == form and rows.flags.c_contiguous


def read_straight(
    segments: Segments,
    part: Part,
    into: Section,
    deadline: float | None,
    arrived: Callable[[int], None],
) -> None:
    """Read a plain part to where it is wanted; it is checked as it comes.

    arrived: called with the number of layers that are there.

    Raises:
        As `view_part`.
    """
    check_deadline(deadline)
    located, payload = part.located, into.parts[0].reshape(-1)
    head = aligned(part.known.payload_at)
    cached = segments.view(located.segment, located.at, head.nbytes + payload.nbytes) is not None
    follow = _Verify(part, head, payload, deadline, arrived)
    segments.read(located.segment, located.at, [head, payload], cached, follow)


def read_part(
    segments: Segments,
    part: Part,
    wanted: Sequence[tuple[int, Form]],
    into: Sequence[Section],
    deadline: float | None,
    arrived: Callable[[int, int], None],
) -> None:
    """Fill sections, or heads of them, from a part that has them.

    Args:
        wanted: of which sections, by index, which heads.
        arrived: called with the index of a section and how many of its layers are there.

    Raises:
        As `view_part`.
    """
    payload = _fetch(segments, part, deadline)[part.known.payload_at :]

    def came(n: int, layers: int) -> None:
        arrived(n, layers)
        check_deadline(deadline)

    try:
        header = part.known.header.part
        fill(header, spans_of(header, payload), wanted, into, came)
    except ValueError as e:
        raise Damaged("payload") from e


def verify(segments: Segments, located: Located, header: Header) -> None:
    """Read a part, past the page cache where it can be, and compare all of it.

    Raises:
        As `view_part`.
    """
    part = Part(located, known(located.header))
    data = aligned(header.record_bytes)
    segments.read(located.segment, located.at, [data])
    front, nbytes = part.known.payload_at, part.known.payload_bytes
    follow = _Verify(part, data[:front], data[front:][:nbytes], None, lambda layers: None)
    follow(front + nbytes)


def _fetch(segments: Segments, part: Part, deadline: float | None) -> np.ndarray:
    """A part's header and payload in whole, of which only the header is checked."""
    if deadline is not None:
        check_deadline(deadline)
    located, record = part.located, part.known
    total = record.payload_at + record.payload_bytes
    data = segments.view(located.segment, located.at, total)
    if data is None:
        data = aligned(total)
        segments.read(
            located.segment, located.at, [data], arrived=lambda n: check_deadline(deadline)
        )
    check_header(data, part)
    return data


def check_header(head: np.ndarray, part: Part) -> None:
    """Raise Damaged unless the file's header is the index's."""
    header = part.located.header  # alive, as all that are indexed
    data = bytes(head.data[: len(header)])
    if data != header and (not part.fresh or not fmt.same(data, header)):
        raise Damaged("header")
