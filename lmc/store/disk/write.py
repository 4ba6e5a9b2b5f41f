"""Records into segment files, in long writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from queue import SimpleQueue

from lmc.store.disk.encode import Encoded
from lmc.store.disk.header import Header
from lmc.store.disk.segments import Segments

# What is written together, at most: the disk is idle between two writes.
WRITE_BYTES = 32 << 20
FIRST_BYTES = 2 << 20  # what is written first, so that the disk is soon at work
Place = tuple[int, int]  # segment, offset
Call = Callable[[], None]
Jobs = SimpleQueue[tuple[Call, SimpleQueue[BaseException | None]] | None]


class _Hand:
    """A second thread of the one that owns it: to start one takes longer than to write a chunk.

    It ends with its owner, and keeps no process from ending.
    """

    def __init__(self) -> None:
        self._jobs: Jobs = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), daemon=True)
        self._thread.start()

    def __del__(self) -> None:
        self._jobs.put(None)

    @property
    def alive(self) -> bool:
        """Not so behind a fork."""
        return self._thread.is_alive()

    def begin(self, call: Call) -> SimpleQueue[BaseException | None]:
        """Have it make a call, which it has begun when this returns; where its end is told."""
        begun, over = threading.Event(), SimpleQueue[BaseException | None]()

        def begin() -> None:
            begun.set()
            call()

        self._jobs.put((begin, over))
        # Without the wait the other thread may not get the interpreter for milliseconds: a
        # checksum lets go of it for less time than it takes to wake up.
        begun.wait()
        return over


def _work(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        call, over = job
        try:
            call()
            over.put(None)
        except BaseException as e:
            over.put(e)
        del job, call, over


_mine = threading.local()


def _hand() -> _Hand:
    hand: _Hand | None = getattr(_mine, "hand", None)
    if hand is None or not hand.alive:
        hand = _mine.hand = _Hand()
    return hand


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
    runs = _runs(places, [e.header.record_bytes for e in encoded])
    writing: SimpleQueue[BaseException | None] | None = None
    try:
        for run in runs:
            records = [encoded[i].pages(seq + i) for i in run]
            pages = [page for _, _, some in records for page in some]
            if len(runs) == 1:
                segments.append(*places[run.start], pages)
            else:
                writing, before = None, writing
                _over(before)
                writing = _hand().begin(partial(segments.append, *places[run.start], pages))
            for i, (header, data, _) in zip(run, records, strict=True):
                told(header, places[i], data)
    finally:
        _over(writing)  # whatever happened, nothing is written any more behind this
    for segment in sorted({segment for segment, _ in places}):
        segments.sync(segment)


def _over(writing: SimpleQueue[BaseException | None] | None) -> None:
    """Wait for a call to end; raise what it raised."""
    fault = None if writing is None else writing.get()
    try:
        if fault is not None:
            raise fault
    finally:
        del fault  # or it would keep this frame, and this frame the fault and files that it saw


def _runs(places: Sequence[Place], sizes: Sequence[int]) -> list[range]:
    """Records that follow each other in a file, in runs of about `WRITE_BYTES`."""
    starts: list[int] = []
    length, most = 0, FIRST_BYTES
    for i, (segment, at) in enumerate(places):
        follows = i > 0 and (segment, at) == (places[i - 1][0], places[i - 1][1] + sizes[i - 1])
        if not follows or length >= most:
            most = min(WRITE_BYTES, 4 * most) if starts else most
            starts.append(i)
            length = 0
        length += sizes[i]
    return [range(start, end) for start, end in pairwise([*starts, len(places)])]
