"""What a folder puts around a record: its place's own words before the header, and whole pages.

Before the header there are the state, the only byte that may change, the number of the put and the
folder's identity, under a digest that takes in the header's own. Header and payload are padded to
pages.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from lmc.store import wire
from lmc.store.once import once
from lmc.store.record import Record
from lmc.store.sections import Form
from lmc.store.wire import Bytes, HeaderError, Span
from lmc.store.wire import digest_of as digest_of

FORMAT = wire.FORMAT
PAGE = 4096  # of O_DIRECT; also what is lost between records
MAGIC = b"LMCR"
LIVE, DEAD, QUARANTINED = 0, 1, 2
STATE_AT = 4  # the one byte that may change, and that no digest covers
MOST_SEQ = 1 << 62

# magic, state, format, bytes of all that is before the payload and of the record, seq, folder,
# digest
_FRONT = struct.Struct("<4sBxHIxxxxQQ16s16s")
_DIGEST_AT = 48
FRONT = _FRONT.size
_WIRE_DIGEST = FRONT + wire.DIGEST_AT


@dataclass
class Header:
    """What precedes a payload in a folder.

    Attributes:
        part: what it says in any place.
        seq: counts the puts of a folder.
        folder: identity of the folder, 16 bytes.
    """

    part: wire.Header
    seq: int
    folder: bytes

    @property
    def record(self) -> Record:
        """As in memory, but for the namespace, which is a digest here, and the slot."""
        return self.part.record

    @property
    def forms(self) -> tuple[Form, ...]:
        """Of the sections."""
        return self.part.forms

    @property
    def created(self) -> float:
        """Seconds since 1970."""
        return self.part.created

    @property
    def id(self) -> bytes:
        """Names the part in its folder, 40 bytes; the parts of a record are neighbours."""
        return self.part.id

    @property
    def sections(self) -> tuple[Span, ...]:
        """Lengths and digests of what the payload consists of."""
        return self.part.sections

    @property
    def payload_bytes(self) -> int:
        """Of all sections, as stored."""
        return self.part.payload_bytes

    @property
    def payload_at(self) -> int:
        """Where in the record the payload begins."""
        return padded(FRONT + self.part.size)

    @once
    def record_bytes(self) -> int:
        """Of header and payload with their padding."""
        return self.payload_at + padded(self.payload_bytes)


def padded(n: int) -> int:
    """`n` bytes in whole pages."""
    return -(-n // PAGE) * PAGE


def pack(header: Header) -> bytes:
    """The bytes before a payload, without padding.

    Raises:
        ValueError: what no reader would take.
    """
    return front_of(header, wire.pack(header.part))


def front_of(header: Header, part: bytes) -> bytes:
    """The same, of a part that is packed already."""
    if not 0 <= header.seq <= MOST_SEQ or len(header.folder) != 16:
        raise ValueError(f"got seq={header.seq} in folder {header.folder.hex()}")
    size, total = FRONT + len(part), header.record_bytes
    out = bytearray(size)
    _FRONT.pack_into(out, 0, MAGIC, LIVE, FORMAT, size, total, header.seq, header.folder, bytes(16))
    out[FRONT:] = part
    out[_DIGEST_AT:FRONT] = _digest(out)
    return bytes(out)


def sizes(data: Bytes) -> tuple[int, int]:
    """Bytes before a payload without padding, and of the record, out of its first bytes.

    Raises:
        HeaderError: no record, one of another format, or of a size that none has.
    """
    if len(data) < FRONT + wire.DIGEST_AT + 16:
        raise HeaderError(f"got {len(data)} bytes, a record has more")
    magic, state, version, size, total, seq, _, _ = _FRONT.unpack_from(data)
    if magic != MAGIC:
        raise HeaderError(f"got {magic!r} where a record begins with {MAGIC!r}")
    if version != FORMAT:
        raise HeaderError(f"got a record of format {version}, this is format {FORMAT}")
    inner, payload = wire.sizes(memoryview(data)[FRONT:])
    if state > QUARANTINED or seq > MOST_SEQ or size != FRONT + inner:
        raise HeaderError(f"got state {state}, seq {seq} and {size} bytes before a payload")
    if total != padded(size) + padded(payload):
        raise HeaderError(f"got a record of {total} bytes for a payload of {payload}")
    return size, total


def unpack(data: Bytes) -> Header:
    """What `data` begins with.

    Raises:
        HeaderError: anything that `pack` does not write.
    """
    view = memoryview(data).cast("B")
    size, _ = sizes(view)
    if len(view) < size:
        raise HeaderError(f"got {len(view)} bytes of {size} before a payload")
    if bytes(view[_DIGEST_AT:FRONT]) != _digest(view):
        raise HeaderError("the record does not match its digest")
    *_, seq, folder, _ = _FRONT.unpack_from(view)
    return Header(wire.unpack(view[FRONT:size]), seq, folder)


def part_of(data: Bytes) -> memoryview:
    """What is the same in any place: the header for `lmc.store.wire`."""
    return memoryview(data)[FRONT:]


def record_of(data: Bytes) -> Record:
    """The record, of bytes that were checked before; raises HeaderError where it can be none."""
    return wire.record_of(part_of(data))


def forms_of(data: Bytes) -> tuple[Form, ...]:
    """The forms of the sections, of bytes that were checked before; raises HeaderError too."""
    return wire.forms_of(wire.shape_of(part_of(data))[1])


def seq_of(data: Bytes) -> int:
    """The number of the put, of bytes that were checked before."""
    return int(_FRONT.unpack_from(data)[5])


def same(a: Bytes, b: Bytes) -> bool:
    """Whether two headers are equal, whatever their states."""
    x, y = memoryview(a), memoryview(b)
    return x[:STATE_AT] == y[:STATE_AT] and x[STATE_AT + 1 :] == y[STATE_AT + 1 :]


def _digest(data: Bytes) -> bytes:
    view = memoryview(data)
    digest = xxhash.xxh3_128(view[:STATE_AT])
    digest.update(view[STATE_AT + 1 : _DIGEST_AT])
    digest.update(view[_WIRE_DIGEST : _WIRE_DIGEST + 16])
    return digest.digest()
