"""Records into segment files, in long writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from queue import SimpleQueue

import numpy as np

from lmc.store.disk.encode import Encoded, pages
from lmc.store.disk.header import Header
from lmc.store.disk.segments import Segments

# What is written together, at most: the disk is idle between two writes.
WRITE_BYTES = 32 << 20
FIRST_BYTES = 2 << 20  # what is written first, so that the disk is soon at work
Place = tuple[int, int]  # segment, offset
Told = Callable[[Header, Place, bytes], object]
Call = Callable[[], None]
Ends = SimpleQueue[BaseException | None]
Jobs = SimpleQueue[tuple[Call, Ends] | None]


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

    def begin(self, call: Call, ends: Ends) -> None:
        """Have it make a call, behind those before; `ends` is told when it is over, and how."""
        self._jobs.put((call, ends))


def _work(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        call, ends = job
        try:
            call()
            ends.put(None)
        except BaseException as e:
            ends.put(e)
        del job, call, ends


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
    told: Told,
) -> None:
    """Write records, numbered from `seq` on, and sync them.

    While some are written, the digests of those that follow are computed, and their own headers
    are told: what is told is on the disk when this returns, not before.

    Raises:
        OSError: with some of them written.
    """
    ends: Ends = SimpleQueue()
    begun = 0
    try:
        for run in _runs(places, [e.header.record_bytes for e in encoded]):
            records = [encoded[i].numbered(seq + i) for i in run]
            # What is written last is synced in the same go, and with it all before it.
            synced = {segment for segment, _ in places} if run.stop == len(places) else set()
            write = partial(_write, segments, places[run.start], pages(records), synced)
            if len(places) == 1:
                write()
            else:
                _hand().begin(write, ends)
                begun += 1
            for i, (header, data, _) in zip(run, records, strict=True):
                told(header, places[i], data)
    finally:
        # Whatever happened, nothing is written any more behind this.
        _raise_first([ends.get() for _ in range(begun)])


def _write(segments: Segments, to: Place, buffers: Sequence[np.ndarray], synced: set[int]) -> None:
    segments.append(*to, buffers)
    for segment in sorted(synced):
        segments.sync(segment)


def _raise_first(faults: Sequence[BaseException | None]) -> None:
    """Raise what went wrong first, if something did."""
    fault = next((fault for fault in faults if fault is not None), None)
    try:
        if fault is not None:
            raise fault
    finally:
        # Or they would keep this frame, and this frame the faults and files that they saw.
        del fault, faults


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
