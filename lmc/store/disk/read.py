"""Out of a segment file: one record's rows, verified."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from lmc.store import compress
from lmc.store.disk import header as fmt
from lmc.store.disk.catalog import Located
from lmc.store.disk.header import Header, digest_of
from lmc.store.disk.segments import Segments, aligned
from lmc.store.rows import copy_rows
from lmc.store.tier import Rows


class Damaged(Exception):  # noqa: N818 a word for the record, as `Located`
    """A record that is not what was put; the message is what of it: index, header or payload."""


@dataclass(frozen=True, eq=False)
class Known:
    """A header, and what follows from it.

    Attributes:
        id: the record's in its folder.
        ends: where in the payload each section ends.
        digests: of each section.
        layers: how many layers there are with each section.
        payload_at, payload_bytes, shape: as `Header`.
    """

    header: Header
    id: bytes
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
    ends = tuple(accumulate(section.length for section in header.sections))
    digests = tuple(section.digest for section in header.sections)
    L, band = header.layout.L, header.band
    layers = tuple(min(L, i + band) for i in range(0, L, band))
    return Known(
        header, header.id, ends, digests, layers, header.payload_at, ends[-1], header.shape
    )


class _Verify:
    """Checks a record as its bytes arrive.

    Args:
        head, payload: where they arrive.
    """

    def __init__(
        self,
        record: Known,
        located: Located,
        head: np.ndarray,
        payload: np.ndarray,
        deadline: float | None,
        arrived: Callable[[int], None],
    ) -> None:
        self._record, self._located = record, located
        self._head, self._payload = head, payload.data
        self._deadline, self._arrived = deadline, arrived
        self._section = self._at = 0
        self._begun = False

    def __call__(self, n: int) -> None:
        """The first `n` bytes are there.

        Raises:
            Damaged: they are not what was put.
            TimeoutError: it is later than the deadline.
        """
        if not self._begun and n >= len(self._located.header):
            _check_header(self._head, self._located)
            self._begun = True
        n -= self._record.payload_at
        record = self._record
        for end in record.ends[self._section :]:
            if end > n:
                break
            if digest_of(self._payload[self._at : end]) != record.digests[self._section]:
                raise Damaged("payload")
            self._arrived(record.layers[self._section])
            self._section, self._at = self._section + 1, end
        check_deadline(self._deadline)


def check_deadline(deadline: float | None) -> None:
    """Raise TimeoutError when it is later than `deadline`, of `time.monotonic()`."""
    if deadline is not None and time.monotonic() > deadline:
        raise TimeoutError("the deadline has passed")


def read_rows(
    segments: Segments,
    located: Located,
    record: Known,
    into: Sequence[Rows] | None,
    deadline: float | None,
    arrived: Callable[[int], None],
) -> Sequence[Rows]:
    """The rows of a record: a view of the page cache where that has them, else read.

    Args:
        record: what the index says of it.
        into: where they go, of the record's shape; None to get them where they are.
        deadline, arrived: as `Disk.get`.

    Raises:
        Damaged, EOFError, FileNotFoundError: it is not what was put.
        TimeoutError: it is later than the deadline.
        OSError: the disk fails.
    """
    check_deadline(deadline)
    plain = record.header.codec == "none"
    front, nbytes = record.payload_at, record.payload_bytes
    view = segments.view(located.segment, located.at, front + nbytes)
    if view is not None and (into is None or not plain):
        head, payload = view[:front], view[front:]
    else:
        head = aligned(front)
        # Of a compressed record, or one in parts, layers arrive as they are put in place below.
        follow = None
        if plain and into is not None and len(into) == 1 and into[0].flags.c_contiguous:
            payload = into[0].reshape(-1)
            follow = _Verify(record, located, head, payload, deadline, arrived)
        else:
            payload = aligned(nbytes)
        segments.read(located.segment, located.at, [head, payload], view is not None, follow)
        if follow is not None:
            assert into is not None
            return into
    if plain and into is None:
        _Verify(record, located, head, payload, deadline, arrived)(front + nbytes)
        return [payload.reshape(record.shape)]
    _check_header(head, located)
    out = into if into is not None else [np.empty(record.shape, np.uint8)]
    _unpack(record.header, payload, out, deadline, arrived)
    return out


def verify(segments: Segments, located: Located, header: Header) -> None:
    """Read a record, past the page cache where it can be, and compare all of it.

    Raises:
        As `read_rows`.
    """
    record = known(located.header)
    data = aligned(header.record_bytes)
    segments.read(located.segment, located.at, [data])
    head, payload = data[: record.payload_at], data[record.payload_at :][: record.payload_bytes]
    follow = _Verify(record, located, head, payload, None, lambda layers: None)
    follow(record.payload_at + record.payload_bytes)


def _unpack(
    header: Header,
    payload: np.ndarray,
    out: Sequence[Rows],
    deadline: float | None,
    arrived: Callable[[int], None],
) -> None:
    """Every section of a payload to its place in `out`."""
    L, S, T, R = header.shape
    at = 0
    for layer, section in zip(range(0, L, header.band), header.sections, strict=True):
        check_deadline(deadline)
        data = payload[at : at + section.length]
        if digest_of(data) != section.digest:
            raise Damaged("payload")
        if header.codec == "none":
            rows = data.reshape(-1, S, T, R)
        else:
            rows = out[0][layer : layer + 1] if len(out) == 1 else np.empty((1, S, T, R), np.uint8)
            try:
                compress.decode(header.codec, data.data, rows[0], header.layout)
            except ValueError as e:
                raise Damaged("payload") from e
        if len(out) > 1 or header.codec == "none":
            copy_rows([rows], [part[layer : layer + header.band] for part in out])
        at += section.length
        arrived(min(L, layer + header.band))


def _check_header(head: np.ndarray, located: Located) -> None:
    """Raise Damaged unless the file's header is the index's."""
    if not fmt.same(head[: len(located.header)].data, located.header):
        raise Damaged("header")
