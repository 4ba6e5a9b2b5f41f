"""What a record's payload is made of, and what comes out of it: sections of rows, verified."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from xxhash import xxh3_128_digest

from lmc.store import compress, wire
from lmc.store.record import Record
from lmc.store.rows import copy_rows
from lmc.store.sections import Form, Section
from lmc.store.wire import Header, Span, Stored, layout_of

BAND_BYTES = 1 << 20  # at least, of layers that are not compressed


@dataclass(eq=False)
class Encoded:
    """A header without digests, the payload, uint8 `[payload_bytes]`, and the header's bytes."""

    header: Header
    payload: np.ndarray
    data: bytearray

    def packed(self) -> tuple[bytes, np.ndarray]:
        """The bytes of the header, with digests, and the payload: what a place has to hold."""
        payload = self.payload.data
        digests = [xxh3_128_digest(payload[start:end]) for *_, start, end in self.header.bands()]
        return wire.sealed(self.data, digests), self.payload


def encode(
    record: Record,
    sections: Sequence[Section],
    codec: str = "none",
    label: str = "",
    counts: Counter[str] | None = None,
    memory: Callable[[int], np.ndarray] = lambda n: np.empty(n, np.uint8),
) -> Encoded:
    """A rank's part of a record.

    Args:
        record: with its namespace, of which a digest is stored.
        codec: one of `CODECS`. What it cannot take, such as values that are not finite or
            latents where it quantises, is stored as it is.
        counts: where sizes and what cannot be compressed are counted.
        memory: gives uint8 `[n]` for a payload; one section's own memory is used where it is
            contiguous and such memory would be aligned no better.

    Raises:
        ValueError: sections that are none of this record, rows of another shape than their forms,
            or what no reader would take.
    """
    if len(sections) > 1:
        sections = sorted(sections, key=lambda section: wire.order(section.form))
    for form, parts in sections:
        wire.check_form(form, record.T)
        shape = form.shape
        if len(parts) == 1 and parts[0].shape == shape and parts[0].dtype == np.uint8:
            continue
        L, S, T, R = shape
        fits = all(
            p.ndim == 4 and p.dtype == np.uint8 and p.shape == (L, S, p.shape[2], R) for p in parts
        )
        if not fits or sum(part.shape[2] for part in parts) != T:
            raise ValueError(f"got rows {[p.shape for p in parts]} for {form.shape} of {form}")
    stored: list[Stored] = []
    data: list[Sequence[np.ndarray]] = []
    squares, layers = 0.0, 0
    for section in sections:
        packed = _compressed(codec, section, counts) if codec != "none" else None
        form, parts = section
        if packed is not None:
            spans, square = packed
            squares, layers = squares + square, layers + form.L
            stored.append(Stored(form, codec, 1, tuple(Span(s.nbytes, b"") for s in spans)))
            data.append(spans)
            continue
        stored.append(_plain(form))
        data.append(parts)
    named = record.at(-1, wire.namespace_digest(record.namespace))
    error = (squares / layers) ** 0.5 if layers else 0.0
    header = Header(named, tuple(stored), time.time(), error, label)
    if len(stored) == 1 and stored[0].codec == "none" and len(data[0]) == 1:
        (rows,) = data[0]
        if rows.flags.c_contiguous and rows.ctypes.data % 512 == 0:
            return Encoded(header, rows.reshape(-1), wire.unsealed(header))
    payload = memory(header.payload_bytes)
    at = 0
    for (form, kind, *_), some in zip(stored, data, strict=True):
        n = form.nbytes if kind == "none" else sum(span.nbytes for span in some)
        if kind == "none":
            copy_rows(some, [payload[at : at + n].reshape(form.shape)])
        else:
            np.concatenate(some, out=payload[at : at + n])
        at += n
    return Encoded(header, payload, wire.unsealed(header))


@lru_cache(maxsize=1024)
def _plain(form: Form) -> Stored:
    """A section that is not compressed, without digests."""
    layer = form.nbytes // form.L
    band = band_of(form.L, layer)
    lengths = [layer * min(band, form.L - i) for i in range(0, form.L, band)]
    return Stored(form, "none", band, tuple(Span(n, b"") for n in lengths))


def _compressed(
    codec: str, section: Section, counts: Counter[str] | None
) -> tuple[list[np.ndarray], float] | None:
    """Spans, and the sum of squares of their errors; None for what the codec cannot take."""
    form, parts = section
    layout, spans, squares = layout_of(form), [], 0.0
    try:
        for layer in range(form.L):
            rows = np.concatenate([part[layer] for part in parts], axis=1)
            span = compress.encode(codec, rows, layout)
            squares += compress.error(codec, rows, span, layout) ** 2
            spans.append(np.frombuffer(span, np.uint8))
    except ValueError:
        if counts is not None:
            counts["not_compressed"] += 1
        return None
    if counts is not None:
        counts["bytes_before_compression"] += form.nbytes
        counts["bytes_compressed"] += sum(span.nbytes for span in spans)
    return spans, squares


def band_of(L: int, layer_bytes: int) -> int:
    """Layers of a span that is not compressed: what a digest takes a while for."""
    return min(L, -(-BAND_BYTES // max(1, layer_bytes)))


def decode_span(stored: Stored, data: np.ndarray, out: np.ndarray) -> None:
    """Write a span's bytes, verified before, into rows `[layers, S, T, R]` of its form.

    Raises:
        ValueError: the codec cannot read it.
    """
    if stored.codec == "none":
        out[...] = data.reshape(out.shape)
    else:
        compress.decode(stored.codec, data.data, out[0], layout_of(stored.form))


def covered_by(form: Form, other: Form) -> bool:
    """Whether the heads of a form are among another's."""
    return other.heads[0] <= form.heads[0] and form.heads[1] <= other.heads[1]


def head_bytes(form: Form, part: Form) -> tuple[int, int]:
    """Where in a row of `form` the heads of `part` are, which are among them."""
    each = form.R // (form.heads[1] - form.heads[0])
    return each * (part.heads[0] - form.heads[0]), each * (part.heads[1] - form.heads[0])
