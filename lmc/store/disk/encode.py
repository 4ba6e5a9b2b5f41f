"""A record's part as the pages of a segment file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmc.store import payload
from lmc.store.disk import header as fmt
from lmc.store.disk.header import PAGE, Header, padded
from lmc.store.disk.segments import aligned
from lmc.store.record import Record
from lmc.store.sections import Section


@dataclass(frozen=True, eq=False)
class Encoded:
    """What is to be written: a header without number and digests, and a payload."""

    header: Header
    part: payload.Encoded

    def pages(self, seq: int) -> tuple[Header, bytes, list[np.ndarray]]:
        """The header with its number, its bytes with digests, and the record in whole pages."""
        header = Header(self.header.part, seq, self.header.folder)
        part, rows = self.part.packed()
        data = fmt.front_of(header, part)
        front = aligned(header.payload_at)
        front[: len(data)] = np.frombuffer(data, np.uint8)
        front[len(data) :] = 0
        whole = rows.nbytes // PAGE * PAGE
        pages = [front, rows[:whole]]
        if whole < rows.nbytes:
            rest = aligned(padded(rows.nbytes - whole))
            rest[: rows.nbytes - whole] = rows[whole:]
            rest[rows.nbytes - whole :] = 0
            pages.append(rest)
        return header, data, pages


@dataclass(frozen=True)
class Encoder:
    """Chunks on their way into one folder.

    Attributes:
        folder: its identity, 16 bytes.
        compression: one of `CODECS`.
        label: the model's name.
        counts: where sizes and what cannot be compressed are counted.
    """

    folder: bytes
    compression: str
    label: str
    counts: Counter[str]

    def __call__(self, record: Record, sections: Sequence[Section]) -> Encoded:
        """A chunk's header and payload; the latter is the chunk's own memory where that will do.

        Raises:
            ValueError: as `lmc.store.payload.encode`.
        """
        part = payload.encode(record, sections, self.compression, self.label, self.counts, aligned)
        return Encoded(Header(part.header, 0, self.folder), part)
