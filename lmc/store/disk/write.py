"""Records into segment files, in long writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from lmc.store.disk.encode import Encoded
from lmc.store.disk.header import Header
from lmc.store.disk.segments import Segments

# What is written together, at most: the disk is idle between two writes.
WRITE_BYTES = 32 << 20
Place = tuple[int, int]  # segment, offset


def write_records(
    segments: Segments,
    encoded: Sequence[Encoded],
    places: Sequence[Place],
    seq: int,
    told: Callable[[Header, Place, bytes], None],
) -> None:
    """Write records, numbered from `seq` on, and sync them.

    Of several runs, the digests of one are computed, and its headers told, while another is
    written: what is told is on the disk when this returns, not before.

    Raises:
        OSError: with some of them written.
    """
    begun = threading.Event()

    def write(at: Place, pages: Sequence[np.ndarray]) -> None:
        begun.set()
        segments.append(*at, pages)

    runs = _runs(places, [e.header.record_bytes for e in encoded])
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as pool:  # no thread before something is submitted
        for run in runs:
            records = [encoded[i].pages(seq + i) for i in run]
            pages = [page for _, _, some in records for page in some]
            if len(runs) == 1:
                write(places[run.start], pages)
            else:
                if writing is not None:
                    writing.result()
                # Without the wait the other thread may not get the interpreter for milliseconds:
                # a checksum lets go of it for less time than it takes to wake up.
                begun.clear()
                writing = pool.submit(write, places[run.start], pages)
                begun.wait()
            for i, (header, data, _) in zip(run, records, strict=True):
                told(header, places[i], data)
        if writing is not None:
            writing.result()
    for segment in sorted({segment for segment, _ in places}):
        segments.sync(segment)


def _runs(places: Sequence[Place], sizes: Sequence[int]) -> list[range]:
    """Records that follow each other in a file, in runs of about `WRITE_BYTES`."""
    starts: list[int] = []
    length, most = 0, WRITE_BYTES // 16  # the first is soon on its way
    for i, (segment, at) in enumerate(places):
        follows = i > 0 and (segment, at) == (places[i - 1][0], places[i - 1][1] + sizes[i - 1])
        if not follows or length >= most:
            most = min(WRITE_BYTES, 4 * most) if starts else most
            starts.append(i)
            length = 0
        length += sizes[i]
    return [range(start, end) for start, end in pairwise([*starts, len(places)])]
