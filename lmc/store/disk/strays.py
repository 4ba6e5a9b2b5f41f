"""What a segment file has that the index does not know of: nothing is removed on its word alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lmc.store.disk import header as fmt
from lmc.store.disk.catalog import Catalog
from lmc.store.disk.header import HeaderError
from lmc.store.disk.rebuild import Found, Rebuild
from lmc.store.disk.segments import Located, Segments


def adopt(
    segments: Segments, catalog: Catalog, identity: bytes, number: int, start: int, end: int
) -> int:
    """Index the living records that a file has from `start` on and the index does not know.

    They are what a killed writer left and was not torn, or was about to mark as dead; or the index
    is older than the folder. As a rule there are none: what was evicted, or put again, is marked,
    what was moved is in the index elsewhere, and what a killed writer left is torn.

    Args:
        end: of the file, as far as the index knows; 0 where it knows of no record in it.

    Returns:
        Where the last of them ends, or `start`.

    Raises:
        HeaderError: it has a record behind that end, and is not to be believed.
        OSError: the file cannot be read.
    """
    strays = list(_strays(segments, catalog, identity, number, start, end))
    if not strays:
        return start
    dead: list[Located] = []
    last = start
    with catalog.change() as change:
        for at, data, header in strays:
            dead += change.add(header, (number, at), data)
            last = at + header.record_bytes
    segments.mark_all(dead, fmt.DEAD)
    return last


def _strays(
    segments: Segments, catalog: Catalog, identity: bytes, number: int, start: int, end: int
) -> Iterator[Found]:
    """Living records of a file that are nowhere in the index as they are there."""
    for at, data, header in Rebuild(segments, Counter(), lambda: False, True, identity).records(
        number, start
    ):
        if data[fmt.STATE_AT] != fmt.LIVE or header.folder != identity:
            continue
        known = catalog.locate(header.id)
        if known is None or fmt.seq_of(known.header) < header.seq or not _there(segments, known):
            yield at, data, header
        elif (known.segment, known.at) == (number, at) and at >= end:
            raise HeaderError(f"the index is wrong about where segment {number} ends")


def _there(segments: Segments, known: Located) -> bool:
    """Whether a record is where the index has it, which may be older than the folder."""
    try:
        data = segments.pread(known.segment, known.at, len(known.header))
    except FileNotFoundError:
        return False
    return fmt.same(data, known.header)
