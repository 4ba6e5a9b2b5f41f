"""The header of a stored record: all that must be known to use, check and index its payload.

A record is a header, padded to a page, and a payload in sections of some layers each, padded too.
Sections have digests of their own, so that the first layers can be used while the last ones are
read.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import xxhash
from blake3 import blake3

from lmc.model.layout import KVLayout
from lmc.store.compress import CODECS, bound
from lmc.store.record import Origin, Record

FORMAT = 1
PAGE = 4096  # of O_DIRECT; also what is lost between records
SECTION_BYTES = 1 << 20  # at least, of layers that are not compressed
MAGIC = b"LMCR"
LIVE, DEAD, QUARANTINED = 0, 1, 2
STATE_AT = 4  # the one byte that may change, and that no digest covers

# What a reader takes from a file before it believes a word of it.
MOST_TOKENS = 1 << 20
MOST_LAYERS = 1 << 12
MOST_HEADS = MOST_DIM = 1 << 16
MOST_HEADER = 16 << 20

_DTYPES = ("float32", "float16", "bfloat16")  # by code: append only
_ORIGINS = get_args(Origin)
# magic, state, codec, format, bytes of header and record, digest of the header
_PROLOGUE = struct.Struct("<4sBBHIxxxxQ16s")
# seq, created, error, L, S, T, G, D, start; origin, tail, dtype, bytes of label; shard, shards,
# band; namespace, key, context, context_after
_FIXED = struct.Struct("<QdfIIIIIQBBBBHHH32s32s32s32s")
_SECTION = struct.Struct("<Q16s")
_DIGEST_AT = 24

Bytes = bytes | bytearray | memoryview


class HeaderError(ValueError):
    """Bytes that are no header of this format."""


@dataclass(frozen=True)
class Section:
    """The bytes of some layers as stored: how many, and their XXH3-128."""

    length: int
    digest: bytes


@dataclass(frozen=True)
class Header:
    """What precedes a payload.

    Attributes:
        record: as in memory, but for the namespace, which is a digest here, and the slot.
        layout: of one rank.
        S: arrays a layer: 2 for K and V, 1 for latents.
        shard, shards: which of how many ranks' heads these are.
        codec: one of `CODECS`.
        seq: counts the puts of a folder.
        created: seconds since 1970.
        error: relative RMS error of a payload that is not lossless.
        label: the model's name, for people.
        sections: of `band` layers each, the last of what is left.
        band: layers of a section; 1 where layers are compressed, each on its own.
    """

    record: Record
    layout: KVLayout
    S: int
    shard: int
    shards: int
    codec: str
    seq: int
    created: float
    error: float
    label: str
    sections: tuple[Section, ...]
    band: int = 1

    @property
    def id(self) -> bytes:
        """Names the record in its folder, 32 bytes."""
        return shard_id(self.record, self.shard, self.shards)

    @property
    def payload_bytes(self) -> int:
        """Of all sections, as stored."""
        return sum(section.length for section in self.sections)

    @property
    def payload_at(self) -> int:
        """Where in the record the payload begins."""
        return padded(header_bytes(self.record.T, len(self.sections), self.label))

    @property
    def record_bytes(self) -> int:
        """Of header and payload with their padding."""
        return self.payload_at + padded(self.payload_bytes)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[L, S, T, R] of the payload, R bytes a token and layer."""
        R = self.layout.bytes_per_token // (2 * self.layout.L)
        return (self.layout.L, self.S, self.record.T, R)


def shard_id(record: Record, shard: int, shards: int) -> bytes:
    """Names one rank's part of a record in a folder, 32 bytes."""
    return blake3(record.id + struct.pack("<HH", shard, shards)).digest()


def namespace_digest(namespace: bytes) -> bytes:
    """What stands for a namespace in files, which must not show a tenant's salt; 32 bytes."""
    return blake3(b"lmc-namespace" + namespace).digest()


def padded(n: int) -> int:
    """`n` bytes in whole pages."""
    return -(-n // PAGE) * PAGE


def header_bytes(T: int, sections: int, label: str) -> int:
    """Bytes of a header, without padding."""
    return _PROLOGUE.size + _FIXED.size + len(label.encode()) + 4 * T + _SECTION.size * sections


def band_of(L: int, layer_bytes: int) -> int:
    """Layers of a section that is not compressed: what a digest takes a while for."""
    return min(L, -(-SECTION_BYTES // layer_bytes))


def pack(header: Header) -> bytes:
    """The header's bytes, without padding.

    Raises:
        ValueError: token ids of more than 32 bits, or sizes that no reader would take.
    """
    record, layout, label = header.record, header.layout, header.label.encode()
    size = header_bytes(record.T, len(header.sections), header.label)
    ids = np.frombuffer(record.tokens, "<i8")
    # What could not be read must not be written.
    if not (0 < record.T <= MOST_TOKENS and layout.L <= MOST_LAYERS and size <= MOST_HEADER):
        raise ValueError(f"got T={record.T} and L={layout.L}, too large for a header")
    if not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 32:
        raise ValueError(f"got token ids {ids.min()} to {ids.max()}, allowed: 0 to 2**32 - 1")
    out = bytearray(size)
    codec = CODECS.index(header.codec)
    payload = sum(section.length for section in header.sections)
    total = padded(size) + padded(payload)
    _PROLOGUE.pack_into(out, 0, MAGIC, LIVE, codec, FORMAT, size, total, bytes(16))
    _FIXED.pack_into(
        out, _PROLOGUE.size,
        header.seq, header.created, header.error,
        layout.L, header.S, record.T, layout.G, layout.D, record.start,
        _ORIGINS.index(record.origin), record.tail, _DTYPES.index(layout.dtype), len(label),
        header.shard, header.shards, header.band,
        record.namespace, record.key, record.context, record.context_after,
    )  # fmt: skip
    at = _PROLOGUE.size + _FIXED.size
    out[at : at + len(label)] = label
    at += len(label)
    out[at : at + 4 * record.T] = ids.astype("<u4").tobytes()
    at += 4 * record.T
    for section in header.sections:
        _SECTION.pack_into(out, at, section.length, section.digest)
        at += _SECTION.size
    out[_DIGEST_AT : _DIGEST_AT + 16] = _digest(out)
    return bytes(out)


def sizes(data: Bytes) -> tuple[int, int]:
    """Bytes of a header without padding and of its record, out of its first bytes.

    Raises:
        HeaderError: no header, one of another format, or of a size that none has.
    """
    view = memoryview(data)
    if len(view) < _PROLOGUE.size:
        raise HeaderError(f"got {len(view)} bytes, a header has at least {_PROLOGUE.size}")
    magic, state, codec, version, size, total, _ = _PROLOGUE.unpack_from(view)
    if magic != MAGIC:
        raise HeaderError(f"got {magic!r} where a header begins with {MAGIC!r}")
    if version != FORMAT:
        raise HeaderError(f"got a record of format {version}, this is format {FORMAT}")
    if codec >= len(CODECS) or state > QUARANTINED:
        raise HeaderError(f"got codec {codec} and state {state}")
    if not _PROLOGUE.size + _FIXED.size <= size <= MOST_HEADER or total % PAGE or total < size:
        raise HeaderError(f"got a header of {size} bytes in a record of {total}")
    return size, total


def unpack(data: Bytes) -> Header:
    """The header that `data` begins with.

    Raises:
        HeaderError: anything that `pack` does not write.
    """
    view = memoryview(data).cast("B")
    size, total = sizes(view)
    if len(view) < size:
        raise HeaderError(f"got {len(view)} bytes of a header of {size}")
    view = view[:size]
    if bytes(view[_DIGEST_AT : _DIGEST_AT + 16]) != _digest(view):
        raise HeaderError("the header does not match its digest")
    fields = _FIXED.unpack_from(view, _PROLOGUE.size)
    seq, created, error, L, S, T, G, D, start, origin, tail, dtype, label_bytes = fields[:13]
    shard, shards, band, namespace, key, context, context_after = fields[13:]
    if not (0 < L <= MOST_LAYERS and 0 < T <= MOST_TOKENS and 0 < G <= MOST_HEADS):
        raise HeaderError(f"got L={L}, T={T}, G={G}")
    if not (0 < D <= MOST_DIM and S in (1, 2) and shard < shards and tail < 2):
        raise HeaderError(f"got D={D}, S={S}, shard {shard} of {shards}, tail {tail}")
    if origin >= len(_ORIGINS) or dtype >= len(_DTYPES):
        raise HeaderError(f"got origin {origin} and dtype {dtype}")
    at = _PROLOGUE.size + _FIXED.size
    codec = CODECS[view[5]]
    if not 1 <= band <= L or (band > 1 and codec != "none"):
        raise HeaderError(f"got sections of {band} layers of {L} as {codec}")
    count = -(-L // band)
    if size != at + label_bytes + 4 * T + _SECTION.size * count:
        raise HeaderError(f"got a header of {size} bytes for T={T} and {count} sections")
    try:
        label = str(view[at : at + label_bytes], "utf-8")
    except UnicodeDecodeError as e:
        raise HeaderError(f"the label is no text: {e}") from e
    at += label_bytes
    tokens = np.frombuffer(view[at : at + 4 * T], "<u4").astype("<i8").tobytes()
    layout = KVLayout(L, G, D, _DTYPES[dtype])
    layer = bound(codec, T, layout) * S // 2
    sections = []
    for i in range(count):
        length, digest = _SECTION.unpack_from(view, at + 4 * T + i * _SECTION.size)
        most = layer * min(band, L - i * band)
        if length > most or (codec == "none" and length != most):
            raise HeaderError(f"got a section of {length} bytes, at most {most} as {codec}")
        sections.append(Section(length, digest))
    payload = sum(section.length for section in sections)
    if total != padded(size) + padded(payload):
        raise HeaderError(f"got a record of {total} bytes for a payload of {payload}")
    nbytes = layout.bytes_per_token * T * S // 2
    record = Record(
        -1, namespace, key, tokens, start, context, context_after, _ORIGINS[origin], nbytes,
        bool(tail),
    )  # fmt: skip
    return Header(
        record,
        layout,
        S,
        shard,
        shards,
        codec,
        seq,
        created,
        error,
        label,
        tuple(sections),
        band,
    )


def same(a: Bytes, b: Bytes) -> bool:
    """Whether two headers are equal, whatever their states."""
    x, y = memoryview(a), memoryview(b)
    return x[:STATE_AT] == y[:STATE_AT] and x[STATE_AT + 1 :] == y[STATE_AT + 1 :]


def digest_of(data: Bytes | np.ndarray) -> bytes:
    """XXH3-128 of a section, 16 bytes."""
    return xxhash.xxh3_128_digest(data.data if isinstance(data, np.ndarray) else data)


def sections_of(parts: Sequence[np.ndarray]) -> tuple[Section, ...]:
    """Lengths and digests of layers that are contiguous each."""
    return tuple(Section(part.nbytes, digest_of(part)) for part in parts)


def _digest(header: Bytes) -> bytes:
    view = memoryview(header)
    digest = xxhash.xxh3_128(view[:STATE_AT])
    digest.update(view[STATE_AT + 1 : _DIGEST_AT])
    digest.update(view[_DIGEST_AT + 16 :])
    return digest.digest()
