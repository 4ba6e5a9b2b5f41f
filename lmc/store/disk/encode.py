"""A record's part as the pages of a segment file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmc.store import payload
from lmc.store.disk import header as fmt
from lmc.store.disk.header import PAGE, Header
from lmc.store.disk.segments import aligned
from lmc.store.record import Record
from lmc.store.sections import Section


@dataclass(eq=False)
class Encoded:
    """What is to be written: a header without number and digests, and a payload."""

    header: Header
    part: payload.Encoded

    def numbered(self, seq: int) -> tuple[Header, bytes, np.ndarray]:
        """The header with its number, its bytes with digests, and the payload."""
        header = Header(self.header.part, seq, self.header.folder)
        part, payload = self.part.packed()
        return header, fmt.front_of(header, part), payload


def pages(records: Sequence[tuple[Header, bytes, np.ndarray]]) -> list[np.ndarray]:
    """Records, one behind the other, in whole pages: payloads stay where they are.

    Args:
        records: headers, their bytes, payloads.
    """
    wholes = [rows.nbytes // PAGE * PAGE for _, _, rows in records]
    # Headers, and the ends of payloads.
    ours = aligned(sum(header.record_bytes for header, _, _ in records) - sum(wholes))
    ours[...] = 0
    view = ours.data
    out: list[np.ndarray] = []
    start = at = 0
    for (header, data, rows), whole in zip(records, wholes, strict=True):
        view[at : at + len(data)] = data
        at += header.payload_at
        if whole:
            out += (ours[start:at], rows[:whole])
            start = at
        if rest := rows.nbytes - whole:
            view[at : at + rest] = rows[whole:].data
            at += PAGE
    if start < at:
        out.append(ours[start:at])
    return out


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
