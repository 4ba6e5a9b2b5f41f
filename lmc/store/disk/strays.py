"""What a segment file has that the index does not know of: nothing is removed on its word alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lmc.store.disk import header as fmt
from lmc.store.disk.catalog import Catalog
from lmc.store.disk.header import Header, HeaderError
from lmc.store.disk.rebuild import Rebuild
from lmc.store.disk.segments import Segments


def check(segments: Segments, catalog: Catalog, identity: bytes, number: int) -> None:
    """Before a file is removed whose records are all dead, or have been moved.

    What was evicted, or put again, is marked as dead, and what was moved is in the index elsewhere.

    Raises:
        HeaderError: there is another one: the index is not to be believed.
        OSError: the file cannot be read.
    """
    for at, _, _ in _strays(segments, catalog, identity, number, 0):
        raise HeaderError(f"the index is wrong about a record in segment {number} at {at}")


def adopt(segments: Segments, catalog: Catalog, identity: bytes, number: int, end: int) -> int:
    """Index the records that a file has from `end` on, where it ends as far as the index knows.

    They are what a killed writer left and was not torn, or the index is older than the folder.

    Returns:
        Where the last of them ends.

    Raises:
        HeaderError: it has one of them there already, and is not to be believed.
        OSError: the file cannot be read.
    """
    strays = list(_strays(segments, catalog, identity, number, end))
    if not strays:  # as a rule: what a killed writer left is torn
        return end
    with catalog.change() as change:
        for at, data, header in strays:
            change.add(header, (number, at), data)
            end = at + header.record_bytes
    return end


def _strays(
    segments: Segments, catalog: Catalog, identity: bytes, number: int, start: int
) -> Iterator[tuple[int, bytes, Header]]:
    """Living records of a file that are nowhere in the index as they are there."""
    records = Rebuild(segments, Counter(), lambda: False, True, identity).records(number, start)
    for at, data, header in records:
        if data[fmt.STATE_AT] != fmt.LIVE or header.folder != identity:
            continue
        known = catalog.locate(header.id)
        if known is not None and (known.segment, known.at) == (number, at):
            raise HeaderError(f"the index is wrong about where segment {number} ends")
        if known is None or fmt.seq_of(known.header) < header.seq:
            yield at, data, header
