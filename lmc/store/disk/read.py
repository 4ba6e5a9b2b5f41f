"""Out of a segment file: one record's rows, verified."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from lmc.store import compress
from lmc.store.disk import header as fmt
from lmc.store.disk.catalog import Located
from lmc.store.disk.header import Header
from lmc.store.disk.segments import Segments, aligned
from lmc.store.rows import copy_rows
from lmc.store.tier import Rows


class Damaged(Exception):
    """A record that is not what was put; the message is what of it: index, header or payload."""


class _Verify:
    """Checks the layers of a payload as its bytes arrive."""

    def __init__(
        self,
        header: Header,
        payload: np.ndarray,
        deadline: float | None,
        arrived: Callable[[int], None],
    ) -> None:
        self._header, self._payload = header, payload
        self._deadline, self._arrived = deadline, arrived
        self._layer = self._at = 0

    def __call__(self, n: int) -> None:
        """The first `n` bytes are there.

        Raises:
            Damaged: a layer is not what was put.
            TimeoutError: it is later than the deadline.
        """
        sections = self._header.sections
        while self._layer < len(sections):
            section = sections[self._layer]
            end = self._at + section.length
            if end > n:
                break
            if fmt.digest_of(self._payload[self._at : end]) != section.digest:
                raise Damaged("payload")
            self._layer, self._at = self._layer + 1, end
            self._arrived(self._layer)
        check_deadline(self._deadline)


def check_deadline(deadline: float | None) -> None:
    """Raise TimeoutError when it is later than `deadline`, of `time.monotonic()`."""
    if deadline is not None and time.monotonic() > deadline:
        raise TimeoutError("the deadline has passed")


def read_rows(
    segments: Segments,
    located: Located,
    header: Header,
    into: Sequence[Rows] | None,
    deadline: float | None,
    arrived: Callable[[int], None],
) -> Sequence[Rows]:
    """The rows of a record: a view of the page cache where that has them, else read.

    Args:
        header: what the index says of it.
        into: where they go, of the record's shape; None to get them where they are.
        deadline, arrived: as `Disk.get`.

    Raises:
        Damaged, EOFError, FileNotFoundError: it is not what was put.
        TimeoutError: it is later than the deadline.
        OSError: the disk fails.
    """
    check_deadline(deadline)
    L, S, T, R = header.shape
    plain = header.codec == "none"
    front, end = header.payload_at, header.payload_at + header.payload_bytes
    view = segments.view(located.segment, located.at, end)
    cached = view is not None
    if view is not None and (into is None or not plain):
        _check_header(view[: len(located.header)].data, located)
        payload = view[front:]
    else:
        data = segments.pread(located.segment, located.at, len(located.header))
        _check_header(memoryview(data), located)
        whole = into is not None and len(into) == 1 and into[0].flags.c_contiguous
        if plain and whole:
            assert into is not None
            payload = into[0].reshape(-1)
        else:
            payload = aligned(end - front)
        # Of a compressed record, or one in parts, layers arrive as they are put in place below.
        follow = _Verify(header, payload, deadline, arrived) if plain and whole else None
        segments.read(located.segment, located.at + front, payload, cached, follow)
        if follow is not None:
            assert into is not None
            return into
    if plain and into is None:
        _Verify(header, payload, deadline, arrived)(payload.nbytes)
        return [payload.reshape(L, S, T, R)]
    out = into if into is not None else [np.empty((L, S, T, R), np.uint8)]
    _unpack(header, payload, out, deadline, arrived)
    return out


def verify(segments: Segments, located: Located, header: Header) -> None:
    """Read a record, past the page cache where it can be, and compare all of it.

    Raises:
        As `read_rows`.
    """
    record = aligned(header.record_bytes)
    segments.read(located.segment, located.at, record)
    _check_header(record[: len(located.header)].data, located)
    payload = record[header.payload_at :][: header.payload_bytes]
    _Verify(header, payload, None, lambda layers: None)(payload.nbytes)


def _unpack(
    header: Header,
    payload: np.ndarray,
    out: Sequence[Rows],
    deadline: float | None,
    arrived: Callable[[int], None],
) -> None:
    """Every layer of a payload to its place in `out`."""
    _, S, T, R = header.shape
    at = 0
    for layer, section in enumerate(header.sections):
        check_deadline(deadline)
        data = payload[at : at + section.length]
        if fmt.digest_of(data) != section.digest:
            raise Damaged("payload")
        if header.codec == "none":
            rows = data.reshape(1, S, T, R)
        else:
            rows = out[0][layer : layer + 1] if len(out) == 1 else np.empty((1, S, T, R), np.uint8)
            try:
                compress.decode(header.codec, data.data, rows[0], header.layout)
            except ValueError as e:
                raise Damaged("payload") from e
        if len(out) > 1 or header.codec == "none":
            copy_rows([rows], [part[layer : layer + 1] for part in out])
        at += section.length
        arrived(layer + 1)


def _check_header(data: memoryview, located: Located) -> None:
    """Raise Damaged unless the file's header is the index's."""
    if not fmt.same(data, located.header):
        raise Damaged("header")
