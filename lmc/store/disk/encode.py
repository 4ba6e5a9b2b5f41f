"""Into a segment file: a chunk as the pages of a record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

from lmc.model.layout import KVLayout
from lmc.store import compress
from lmc.store.disk import header as fmt
from lmc.store.disk.header import PAGE, Header, Section, padded
from lmc.store.disk.segments import aligned
from lmc.store.record import Record
from lmc.store.rows import copy_rows
from lmc.store.tier import Rows


@dataclass(frozen=True, eq=False)
class Encoded:
    """A header without its number and digests, and a payload, uint8 `[payload_bytes]`."""

    header: Header
    payload: np.ndarray

    def pages(self, seq: int) -> tuple[Header, bytes, list[np.ndarray]]:
        """The header with its number and digests, its bytes, and the record in whole pages."""
        ends = [0, *accumulate(section.length for section in self.header.sections)]
        parts = [self.payload[start:end] for start, end in pairwise(ends)]
        header = replace(self.header, seq=seq, sections=fmt.sections_of(parts))
        data = fmt.pack(header)
        front = aligned(header.payload_at)
        front[: len(data)] = np.frombuffer(data, np.uint8)
        front[len(data) :] = 0
        whole = self.payload.nbytes // PAGE * PAGE
        rest = aligned(padded(self.payload.nbytes - whole)) if whole < self.payload.nbytes else None
        pages = [front, self.payload[:whole]]
        if rest is not None:
            rest[: self.payload.nbytes - whole] = self.payload[whole:]
            rest[self.payload.nbytes - whole :] = 0
            pages.append(rest)
        return header, data, pages


@dataclass(frozen=True)
class Encoder:
    """Chunks of one rank of one engine.

    Attributes:
        compression: one of `CODECS`.
        label: the model's name.
        counts: where sizes and what cannot be compressed are counted.
    """

    layout: KVLayout
    shard: int
    shards: int
    compression: str
    label: str
    counts: Counter[str]

    def __call__(self, record: Record, parts: Sequence[Rows]) -> Encoded:
        """A chunk's header and payload; the latter is the chunk's own memory where that will do.

        Raises:
            ValueError: rows that are not of this layout, or token ids above 32 bits.
        """
        L, S, _, R = parts[0].shape
        want = (self.layout.L, self.layout.bytes_per_token // (2 * self.layout.L))
        T = sum(part.shape[2] for part in parts)
        if want != (L, R) or T != record.T:
            raise ValueError(
                f"got rows [L={L}, S={S}, T={T}, R={R}], want L={want[0]}, T={record.T}, "
                f"R={want[1]} of {self.layout}"
            )
        if self.compression != "none":
            encoded = self._compressed(record, parts, S)
            if encoded is not None:
                return encoded
        if len(parts) == 1 and parts[0].flags.c_contiguous and parts[0].ctypes.data % 512 == 0:
            payload = parts[0].reshape(-1)
        else:
            payload = aligned(L * S * T * R)
            copy_rows(parts, [payload.reshape(L, S, T, R)])
        layer = payload.nbytes // L
        band = fmt.band_of(L, layer)
        sections = tuple(Section(layer * min(band, L - i), b"") for i in range(0, L, band))
        return self._encoded(record, S, "none", 0.0, sections, payload, band)

    def _compressed(self, record: Record, parts: Sequence[Rows], S: int) -> Encoded | None:
        """None for values that the codec cannot take: those that are not finite."""
        codec, layers, squares = self.compression, [], 0.0
        for layer in range(self.layout.L):
            rows = np.concatenate([part[layer] for part in parts], axis=1)
            try:
                section = compress.encode(codec, rows, self.layout)
            except ValueError:
                self.counts["not_compressed"] += 1
                return None
            squares += compress.error(codec, rows, section, self.layout) ** 2
            layers.append(np.frombuffer(section, np.uint8))
        total = sum(layer.nbytes for layer in layers)
        payload = aligned(total)
        np.concatenate(layers, out=payload)
        self.counts["bytes_before_compression"] += record.nbytes
        self.counts["bytes_compressed"] += total
        error = (squares / self.layout.L) ** 0.5
        sections = tuple(Section(layer.nbytes, b"") for layer in layers)
        return self._encoded(record, S, codec, error, sections, payload)

    def _encoded(
        self,
        record: Record,
        S: int,
        codec: str,
        error: float,
        sections: tuple[Section, ...],
        payload: np.ndarray,
        band: int = 1,
    ) -> Encoded:
        stored = replace(record, slot=-1, namespace=fmt.namespace_digest(record.namespace))
        header = Header(
            stored, self.layout, S, self.shard, self.shards, codec, 0, time.time(), error,
            self.label, sections, band,
        )  # fmt: skip
        return Encoded(header, payload)
