"""A record as bytes: what any place that holds chunks stores, and passes on without decoding it.

What one rank has of a record, its *part*, is a header and a payload. The header says all that must
be known to use, check and index the payload: of each section its form, its codec, and the lengths
and digests of bands of its layers, so that the first layers can be used while the last ones are on
their way. A place puts around it what it needs itself (`lmc.store.disk.header`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, get_args

import numpy as np
import xxhash
from blake3 import blake3

from lmc.model.layout import KVLayout
from lmc.store import compress
from lmc.store.compress import CODECS
from lmc.store.once import once
from lmc.store.record import Origin, Record
from lmc.store.sections import Form, Kind

FORMAT = 2
MAGIC = b"LMCW"
BAND_BYTES = 1 << 20  # at least, of layers that are not compressed

# What a reader takes before it believes a word of it.
MOST_TOKENS = 1 << 20
MOST_LAYERS = 1 << 12
MOST_HEADS = MOST_DIM = MOST_GROUPS = (1 << 16) - 1
MOST_FORMS = 64
MOST_HEADER = 16 << 20
MOST_PAYLOAD = 1 << 34
MOST_START = 1 << 62
LATEST = 1e11  # seconds since 1970: no clock says more

_DTYPES = ("float32", "float16", "bfloat16")  # by code: append only
_ORIGINS = get_args(Origin)
_KINDS = get_args(Kind)
# magic, format, forms, bytes of header and payload, digest of the header
_PROLOGUE = struct.Struct("<4sHHIQ16s")
# created, error, T, start; origin, tail, bytes of label; namespace, key, context, context_after
_FIXED = struct.Struct("<ddIQBBBx32s32s32s32s")
# group, kind, dtype, codec; heads; tokens, L, D, band
_FORM = struct.Struct("<HBBBxHHHIIHHH")
_SPAN = struct.Struct("<Q16s")
_TOKENS = struct.Struct("<I")
DIGEST_AT = 20
_FORMS_AT = _PROLOGUE.size + _FIXED.size

Bytes = bytes | bytearray | memoryview


class HeaderError(ValueError):
    """Bytes that are no header of this format."""


class Span(NamedTuple):
    """The bytes of some layers as stored: how many, and their XXH3-128."""

    length: int
    digest: bytes


class Stored(NamedTuple):
    """A section as it is stored.

    Attributes:
        codec: one of `CODECS`.
        band: layers of a span; the last has what is left. 1 where layers are compressed.
        spans: in the order of the layers.
    """

    form: Form
    codec: str
    band: int
    spans: tuple[Span, ...]


@dataclass
class Header:
    """What precedes a payload.

    Attributes:
        record: as in memory, but for the namespace, which is a digest here, and the slot.
        stored: the sections, in the order of `order`.
        created: seconds since 1970.
        error: relative RMS error of what is not lossless.
        label: the model's name, for people.
    """

    record: Record
    stored: tuple[Stored, ...]
    created: float
    error: float
    label: str

    @once
    def forms(self) -> tuple[Form, ...]:
        """Of the sections."""
        return tuple(stored.form for stored in self.stored)

    @once
    def id(self) -> bytes:
        """Names the part wherever parts are kept, 40 bytes; those of a record begin alike."""
        return part_id(self.record.id, self.forms)

    @property
    def sections(self) -> tuple[Span, ...]:
        """What the payload consists of."""
        return tuple(span for stored in self.stored for span in stored.spans)

    @once
    def payload_bytes(self) -> int:
        """Of all sections, as stored."""
        return sum(span.length for stored in self.stored for span in stored.spans)

    @once
    def size(self) -> int:
        """Bytes of the header itself."""
        fixed = _PROLOGUE.size + _FIXED.size + len(self.label.encode()) + 4 * self.record.T
        spans = sum(len(stored.spans) for stored in self.stored)
        return fixed + _FORM.size * len(self.stored) + _SPAN.size * spans

    def bands(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Of each span: which section, its layers [first, last), its bytes [start, end)."""
        at = 0
        for i, (form, _, band, spans) in enumerate(self.stored):
            for first, span in zip(range(0, form.L, band), spans, strict=True):
                yield i, first, min(form.L, first + band), at, at + span.length
                at += span.length


def order(form: Form) -> tuple[object, ...]:
    """What sections are sorted by, in a payload and where their layers are counted."""
    return (form.group, _KINDS.index(form.kind), form.tokens, form.heads)


def part_id(record_id: bytes, forms: Sequence[Form]) -> bytes:
    """Names what one rank has of a record, 40 bytes: the record's id, and which part it is."""
    return record_id + _forms_digest(tuple(forms))


@lru_cache(maxsize=1024)
def _forms_digest(forms: tuple[Form, ...]) -> bytes:
    return xxhash.xxh3_64_digest(b"".join(_packed(form) for form in forms))


@lru_cache(maxsize=1024)
def namespace_digest(namespace: bytes) -> bytes:
    """What stands for a namespace in files, which must not show a tenant's salt; 32 bytes."""
    return blake3(b"lmc-namespace" + namespace).digest()


def digest_of(data: Bytes | np.ndarray) -> bytes:
    """XXH3-128 of a span, 16 bytes."""
    return xxhash.xxh3_128_digest(data.data if isinstance(data, np.ndarray) else data)


def layout_of(form: Form) -> KVLayout:
    """The layout that codecs are told."""
    return KVLayout(form.L, form.heads[1] - form.heads[0], form.D, form.dtype)


def pack(header: Header) -> bytes:
    """The header's bytes; raises as `unsealed`."""
    return sealed(unsealed(header))


def unsealed(header: Header) -> bytearray:
    """The header's bytes but for its digest.

    Raises:
        ValueError: what no reader would take, such as token ids of more than 32 bits.
    """
    record, label = header.record, header.label.encode()
    check(record, header.forms)
    size, payload = header.size, header.payload_bytes
    if size > MOST_HEADER or payload > MOST_PAYLOAD or len(label) > 255:
        raise ValueError(f"got a header of {size} bytes for {payload}")
    fixed = _FIXED.pack(
        header.created, header.error, record.T, record.start, _ORIGINS.index(record.origin),
        record.tail, len(label), record.namespace, record.key, record.context, record.context_after,
    )  # fmt: skip
    return bytearray().join((
        _PROLOGUE.pack(MAGIC, FORMAT, len(header.stored), size, payload, bytes(16)),
        fixed,
        *[_packed(form, codec, band) for form, codec, band, _ in header.stored],
        label,
        np.frombuffer(record.tokens, "<i8").astype("<u4").tobytes(),
        *[_SPAN.pack(*span) for span in header.sections],
    ))  # fmt: skip


def sealed(header: bytearray, digests: Sequence[bytes] = ()) -> bytes:
    """A header that was packed, with other digests of its spans, if they are told."""
    at = len(header) - _SPAN.size * len(digests) + 8
    for digest in digests:
        header[at : at + 16] = digest
        at += _SPAN.size
    header[DIGEST_AT : DIGEST_AT + 16] = _digest(header)
    return bytes(header)


def sizes(data: Bytes) -> tuple[int, int]:
    """Bytes of a header and of its payload, out of its first bytes.

    Raises:
        HeaderError: no header, one of another format, or of a size that none has.
    """
    view = memoryview(data)
    if len(view) < _PROLOGUE.size:
        raise HeaderError(f"got {len(view)} bytes, a header has at least {_PROLOGUE.size}")
    magic, version, forms, size, payload, _ = _PROLOGUE.unpack_from(view)
    if magic != MAGIC:
        raise HeaderError(f"got {magic!r} where a header begins with {MAGIC!r}")
    if version != FORMAT:
        raise HeaderError(f"got a record of format {version}, this is format {FORMAT}")
    if not _PROLOGUE.size + _FIXED.size <= size <= MOST_HEADER or payload > MOST_PAYLOAD:
        raise HeaderError(f"got a header of {size} bytes for {payload}")
    if not 0 < forms <= MOST_FORMS:
        raise HeaderError(f"got {forms} sections, allowed: 1 to {MOST_FORMS}")
    return size, payload


def unpack(data: Bytes) -> Header:
    """The header that `data` begins with.

    Raises:
        HeaderError: anything that `pack` does not write.
    """
    view = memoryview(data).cast("B")
    size, payload = sizes(view)
    if len(view) < size:
        raise HeaderError(f"got {len(view)} bytes of a header of {size}")
    view = view[:size]
    if bytes(view[DIGEST_AT : DIGEST_AT + 16]) != _digest(view):
        raise HeaderError("the header does not match its digest")
    try:
        record, described, created, error, label, at = _fields(view)
        forms = [form for form, _, _ in described]
        for form in forms:
            check_form(form, record.T)
        check(record, forms)
    except (ValueError, IndexError, struct.error) as e:
        raise HeaderError(f"got what no header says: {e}") from e
    if not (0 <= created <= LATEST and 0 <= error <= 1e30):
        raise HeaderError(f"got created={created} and error={error}")
    if forms != sorted(forms, key=order):
        raise HeaderError("the sections are out of order")
    stored, total = [], 0
    for form, codec, band in described:
        if not 1 <= band <= form.L or (band > 1 and codec != "none"):
            raise HeaderError(f"got spans of {band} layers of {form.L} as {codec}")
        if at + _SPAN.size * -(-form.L // band) > size:
            raise HeaderError(f"got a header of {size} bytes for {form}")
        layer = compress.bound(codec, form.tokens[1] - form.tokens[0], layout_of(form))
        spans = []
        for first in range(0, form.L, band):
            length, digest = _SPAN.unpack_from(view, at)
            most = layer * form.S // 2 * min(band, form.L - first)
            if length > most or (codec == "none" and length != most):
                raise HeaderError(f"got a span of {length} bytes, at most {most} as {codec}")
            spans.append(Span(length, digest))
            at += _SPAN.size
            total += length
        stored.append(Stored(form, codec, band, tuple(spans)))
    if at != size or total != payload:
        raise HeaderError(f"got a header of {size} bytes for a payload of {payload}")
    return Header(record, tuple(stored), created, error, label)


# What an index needs of headers that were checked before, in a fraction of the time.


def shape_of(data: Bytes) -> tuple[int, bytes]:
    """T, and what describes the sections, for `forms_of`."""
    count = _PROLOGUE.unpack_from(data)[2]
    T = _TOKENS.unpack_from(data, _PROLOGUE.size + 16)[0]
    return T, bytes(data[_FORMS_AT : _FORMS_AT + count * _FORM.size])


@lru_cache(maxsize=1024)
def forms_of(described: bytes) -> tuple[Form, ...]:
    """Forms; raises HeaderError for what describes none."""
    try:
        return tuple(
            _described(described[at : at + _FORM.size])[0]
            for at in range(0, len(described), _FORM.size)
        )
    except (ValueError, IndexError, struct.error) as e:
        raise HeaderError(f"got what no header says: {e}") from e


def record_of(data: Bytes, namespace: bytes | None = None, nbytes: int = 0) -> Record:
    """The record that a header is of; raises HeaderError where it can be of none.

    Args:
        namespace: that it gets; by default the digest.
        nbytes: of what it is told to.
    """
    try:
        count = _PROLOGUE.unpack_from(data)[2]
        _, _, T, start, origin, tail, label_bytes, digest, key, context, context_after = (
            _FIXED.unpack_from(data, _PROLOGUE.size)
        )
        ids = np.frombuffer(data, "<u4", T, _FORMS_AT + count * _FORM.size + label_bytes)
        return Record(
            -1, digest if namespace is None else namespace, key, ids.astype("<i8").tobytes(),
            start, context, context_after, _ORIGINS[origin], nbytes, bool(tail),
        )  # fmt: skip
    except (ValueError, IndexError, struct.error) as e:
        raise HeaderError(f"got what no header says: {e}") from e


def _fields(view: memoryview) -> tuple[Any, ...]:
    """Record, (form, codec, band) of each section, created, error, label, where spans begin."""
    count = _PROLOGUE.unpack_from(view)[2]
    created, error, T, _, _, tail, label_bytes, *_ = _FIXED.unpack_from(view, _PROLOGUE.size)
    at = _FORMS_AT
    described, nbytes = [], 0
    for _ in range(count):
        *section, n = _described(bytes(view[at : at + _FORM.size]))
        described.append(section)
        nbytes += n
        at += _FORM.size
    label = str(view[at : at + label_bytes], "utf-8")
    if tail > 1:
        raise ValueError(f"tail {tail}")
    record = record_of(view, nbytes=nbytes)
    return record, described, created, error, label, at + label_bytes + 4 * T


@lru_cache(maxsize=1024)
def _described(data: bytes) -> tuple[Form, str, int, int]:
    """Form, codec, band and bytes of a section."""
    group, kind, dtype, codec, h0, h1, of, t0, t1, L, D, band = _FORM.unpack(data)
    form = Form(group, _KINDS[kind], (h0, h1, of), (t0, t1), L, D, _DTYPES[dtype])
    return form, CODECS[codec], band, form.nbytes


@lru_cache(maxsize=1024)
def _packed(form: Form, codec: str = "none", band: int = 0) -> bytes:
    kind, dtype = _KINDS.index(form.kind), _DTYPES.index(form.dtype)
    return _FORM.pack(
        form.group, kind, dtype, CODECS.index(codec), *form.heads, *form.tokens, form.L, form.D,
        band,
    )  # fmt: skip


@lru_cache(maxsize=1024)  # chunks have few forms
def check_form(form: Form, T: int) -> None:
    """Raise ValueError for a form that no reader would take."""
    start, end, of = form.heads
    first, last = form.tokens
    fits = 0 < form.L <= MOST_LAYERS and 0 < form.D <= MOST_DIM and 0 <= form.group <= MOST_GROUPS
    if not (fits and 0 <= start < end <= of <= MOST_HEADS and 0 <= first < last <= T):
        raise ValueError(f"got {form} of T={T}")
    if form.dtype not in _DTYPES or form.kind not in _KINDS:
        raise ValueError(f"got {form}")


def check(record: Record, forms: Sequence[Form]) -> None:
    """Raise ValueError for a record that no reader would take: what is not read is not written."""
    if not 0 < len(forms) <= MOST_FORMS:
        raise ValueError(f"got {len(forms)} sections, allowed: 1 to {MOST_FORMS}")
    if not (0 < record.T <= MOST_TOKENS and 0 <= record.start <= MOST_START):
        raise ValueError(f"got T={record.T} and start={record.start}")
    if record.origin not in _ORIGINS:
        raise ValueError(f"got origin {record.origin!r}, allowed: {', '.join(_ORIGINS)}")
    if sum(form.nbytes for form in forms) > MOST_PAYLOAD:
        raise ValueError(f"got a payload of more than {MOST_PAYLOAD} bytes")
    for digest in (record.key, record.context, record.context_after):
        if len(digest) != 32:
            raise ValueError(f"got a digest of {len(digest)} bytes, want 32")
    ids = np.frombuffer(record.tokens, "<i8")
    if np.bitwise_or.reduce(ids) >> 32:
        raise ValueError(f"got token ids {ids.min()} to {ids.max()}, allowed: 0 to 2**32 - 1")


def _digest(header: Bytes) -> bytes:
    view = memoryview(header)
    digest = xxhash.xxh3_128(view[:DIGEST_AT])
    digest.update(view[DIGEST_AT + 16 :])
    return digest.digest()
