"""An index made again: what is in the segment files, record by record."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import xxhash

from lmc.store.disk import header as fmt
from lmc.store.disk.catalog import Catalog
from lmc.store.disk.env import ClosedError
from lmc.store.disk.header import PAGE, Header, HeaderError
from lmc.store.disk.segments import Located, Segments

_SCAN_BYTES = 1 << 20
# Headers of records up to this size are read together: they lie so close.
_SMALL_BYTES = 64 << 10
_AT_ONCE = 4096  # records of one transaction: those who read meanwhile find them after it

Found = tuple[int, bytes, Header]  # offset, header's bytes, header


class Rebuild:
    """Fills an empty index. Its caller is the folder's writer, or the index is its own.

    Args:
        counts: where what cannot be read is counted.
        stopped: asked now and then; then it raises ClosedError.
        read_only: what is not whole stays in the files.
        identity: of the folder; records that were put in another one are not its.
    """

    def __init__(
        self,
        segments: Segments,
        counts: Counter[str],
        stopped: Callable[[], bool],
        read_only: bool,
        identity: bytes,
    ) -> None:
        self._identity = identity
        self._segments = segments
        self._counts = counts
        self._stopped = stopped
        self._read_only = read_only

    def __call__(self, catalog: Catalog) -> None:
        """Index what is in the segment files, and cut off what is not whole.

        Raises:
            ClosedError: it was stopped.
            lmdb.Error, OSError: the index cannot be written.
        """
        found: dict[bytes, int] = {}  # by id, the latest put
        for number in self._segments.numbers():
            end, some = 0, list[Found]()
            try:
                for one in self.records(number):
                    if self._stopped():
                        raise ClosedError("the index is left as it is")
                    end = one[0] + fmt.sizes(one[1])[1]
                    some.append(one)
                    if len(some) == _AT_ONCE:
                        self._add(catalog, number, end, some, found)
                        some.clear()
            except ClosedError:
                raise
            except OSError:
                # It stays, and the index is made again whenever it can be: the disk may recover.
                self._counts["segments_unreadable"] += 1
                with catalog.change() as change:
                    change.unreadable(number)
                continue
            self._add(catalog, number, end, some, found)
            if self._read_only:
                continue
            with contextlib.suppress(OSError):  # then it is done when the index is made again
                if end == 0:
                    with catalog.change() as change:
                        change.drop_segment(number)
                    self._segments.unlink(number)
                elif self._segments.size(number) > end:
                    self._segments.truncate(number, end)

    def _add(
        self, catalog: Catalog, number: int, end: int, some: list[Found], found: dict[bytes, int]
    ) -> None:
        dead: list[Located] = []
        with catalog.change() as change:
            for at, data, header in some:
                if header.folder != self._identity:
                    self._counts["records_of_others"] += 1
                    continue
                id = header.id
                if data[fmt.STATE_AT] != fmt.LIVE:
                    continue
                if found.get(id, -1) > header.seq:
                    dead.append(Located(number, at, data))
                    continue
                found[id] = header.seq
                dead += change.add(header, (number, at), data)
            change.segment_ends(number, end)
        if not self._read_only:
            # A writer was killed before it could: they would be alive again without the others.
            self._segments.mark_all(dead, fmt.DEAD)

    def records(self, number: int, start: int = 0) -> Iterator[Found]:
        """Records of one segment, from `start` on, that are whole as far as their headers tell.

        From the last one back payloads are read too, until one is whole: a crash may have torn
        those behind it.
        """
        size = self._segments.size(number)
        found: list[Found] = []
        at, block, block_at = start, b"", start
        while at < size:
            if not block_at <= at <= block_at + len(block) - PAGE:
                small = not found or at - found[-1][0] <= _SMALL_BYTES
                block_at = at
                block = self._segments.pread(number, at, _SCAN_BYTES if small else PAGE)
            one = self._header(number, at, block[at - block_at : at - block_at + PAGE])
            if one is None:
                self._counts["headers_unreadable"] += 1
                at = self._next(number, at + PAGE, size)
                continue
            total = fmt.sizes(one[1])[1]
            if at + total > size:
                self._counts["records_torn"] += 1
                break
            found.append(one)
            at += total
            if self._stopped():
                raise ClosedError("the index is left as it is")
        whole = len(found)
        for one in reversed(found):
            if self._verifies(number, one):
                break
            self._counts["records_torn"] += 1
            whole -= 1
        yield from found[:whole]

    def _header(self, number: int, at: int, data: bytes) -> Found | None:
        try:
            size, _ = fmt.sizes(data)
            if size > len(data):
                data = self._segments.pread(number, at, size)
            header = fmt.unpack(data[:size])
            # A number that others may follow: one near the last would be the end of all puts.
            return (at, data[:size], header) if header.seq < fmt.MOST_SEQ // 2 else None
        except HeaderError:
            return None

    def _next(self, number: int, at: int, size: int) -> int:
        """The next page from `at` on that begins as a record does, or the end."""
        while at < size:
            if self._stopped():
                raise ClosedError("the index is left as it is")
            at = self._segments.data_from(number, at)
            block = self._segments.pread(number, at, _SCAN_BYTES)
            for i in range(0, len(block), PAGE):
                if block[i : i + len(fmt.MAGIC)] == fmt.MAGIC:
                    return at + i
            at += _SCAN_BYTES
        return size

    def _verifies(self, number: int, one: Found) -> bool:
        at, _, header = one
        at += header.payload_at
        for section in header.sections:
            digest, end = xxhash.xxh3_128(), at + section.length
            while at < end:
                if self._stopped():
                    raise ClosedError("the index is left as it is")
                block = self._segments.pread(number, at, min(_SCAN_BYTES, end - at))
                if not block:
                    return False
                digest.update(block)
                at += len(block)
            if digest.digest() != section.digest:
                return False
        return True


def identity_of(segments: Segments) -> bytes | None:
    """The identity that the records of a folder have, by the first that can be read."""
    for number in segments.numbers():
        with contextlib.suppress(OSError, HeaderError):
            data = segments.pread(number, 0, _SCAN_BYTES)
            return fmt.unpack(data).folder
    return None
