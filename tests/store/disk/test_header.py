"""The parser of headers, given what no writer wrote."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from typing import Any, get_args

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmc.store import wire
from lmc.store.compress import CODECS, bound
from lmc.store.disk import header as fmt
from lmc.store.disk.header import FRONT, Header, HeaderError, pack, sizes, unpack
from lmc.store.record import Record
from lmc.store.sections import Form, Kind
from lmc.store.wire import Span, Stored, layout_of, order

B32 = st.binary(min_size=32, max_size=32)


@st.composite
def forms(draw: st.DrawFn, T: int, group: int) -> Form:
    of = draw(st.integers(1, 8))
    start = draw(st.integers(0, of - 1))
    first = draw(st.integers(0, T - 1))
    return Form(
        group, draw(st.sampled_from(get_args(Kind))),
        (start, draw(st.integers(start + 1, of)), of), (first, draw(st.integers(first + 1, T))),
        draw(st.integers(1, 9)), 2 * draw(st.integers(1, 40)),
        draw(st.sampled_from(["float32", "float16", "bfloat16"])),
    )  # fmt: skip


@st.composite
def stored(draw: st.DrawFn, form: Form) -> Stored:
    codec = draw(st.sampled_from(CODECS))
    band = draw(st.integers(1, form.L)) if codec == "none" else 1
    layer = bound(codec, form.tokens[1] - form.tokens[0], layout_of(form)) * form.S // 2
    most = [layer * min(band, form.L - i) for i in range(0, form.L, band)]
    length = [n if codec == "none" else draw(st.integers(0, n)) for n in most]
    spans = tuple(Span(n, draw(st.binary(min_size=16, max_size=16))) for n in length)
    return Stored(form, codec, band, spans)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    T = draw(st.integers(1, 70))
    tokens = draw(st.lists(st.integers(0, 2**32 - 1), min_size=T, max_size=T))
    sections = [draw(forms(T, group)) for group in range(draw(st.integers(1, 3)))]
    sections.sort(key=order)
    record = Record(
        -1, draw(B32), draw(B32), struct.pack(f"<{T}q", *tokens), draw(st.integers(0, 2**62)),
        draw(B32), draw(B32), draw(st.sampled_from(["exact", "isolated", "anchored", "blended"])),
        sum(form.nbytes for form in sections), draw(st.booleans()),
    )  # fmt: skip
    part = wire.Header(
        record, tuple(draw(stored(form)) for form in sections), draw(st.floats(0, 4e9)), 0.0,
        draw(st.text(max_size=20)),
    )  # fmt: skip
    return Header(part, draw(st.integers(0, 2**62)), draw(st.binary(min_size=16, max_size=16)))


def redigested(data: bytes) -> bytes:
    """The same bytes with the digests that they should have: a writer with a defect, or malice."""
    part = data[FRONT:]
    at = wire.DIGEST_AT
    digest = xxhash.xxh3_128(part[:at])
    digest.update(part[at + 16 :])
    part = part[:at] + digest.digest() + part[at + 16 :]
    front = xxhash.xxh3_128(data[:4])
    front.update(data[5:48])
    front.update(digest.digest())
    return data[:48] + front.digest() + part


def parsed(data: bytes) -> Header | None:
    try:
        return unpack(data)
    except HeaderError:
        return None


@given(headers())
def test_what_is_packed_is_unpacked(header: Header) -> None:
    data = pack(header)
    assert redigested(data) == data
    assert unpack(data) == header
    assert sizes(data) == (len(data), header.record_bytes)
    assert wire.unpack(data[FRONT:]) == header.part  # any place may hold it
    assert fmt.forms_of(data) == header.forms
    assert replace(fmt.record_of(data), nbytes=header.record.nbytes) == header.record
    assert fmt.seq_of(data) == header.seq
    # A file's bytes go on behind it, and its state may be another.
    dead = bytearray(data + b"payload")
    dead[fmt.STATE_AT] = fmt.DEAD
    assert unpack(dead) == header
    assert fmt.same(dead[: len(data)], data)


@given(headers(), st.integers(0, 2**62), st.binary(min_size=16, max_size=16))
def test_a_part_is_the_same_wherever_it_is(header: Header, seq: int, folder: bytes) -> None:
    elsewhere = replace(header, seq=seq, folder=folder)
    assert elsewhere.id == header.id
    assert pack(elsewhere)[FRONT:] == pack(header)[FRONT:]


@given(st.binary(max_size=600))
@example(b"")
@example(b"LMCR")
def test_any_bytes_are_refused_and_nothing_else_happens(data: bytes) -> None:
    assert parsed(data) is None
    assert parsed(b"LMCR\x00\x00\x02\x00" + data) is None
    with pytest.raises(HeaderError):
        wire.unpack(b"LMCW\x02\x00\x01\x00" + data)


@given(headers(), st.data())
def test_a_changed_byte_is_noticed(header: Header, data: st.DataObject) -> None:
    packed = bytearray(pack(header))
    at = data.draw(st.integers(0, len(packed) - 1).filter(lambda i: i != fmt.STATE_AT))
    packed[at] ^= data.draw(st.integers(1, 255))
    assert parsed(bytes(packed)) is None


@settings(max_examples=60)
@given(headers(), st.data())
def test_fields_that_agree_with_their_digest_are_bounded_all_the_same(
    header: Header, data: st.DataObject
) -> None:
    packed = bytearray(pack(header))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(5, min(len(packed) - 1, 330)))
        packed[at] = data.draw(st.integers(0, 255))
    tracemalloc.start()
    got = parsed(redigested(bytes(packed)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * len(packed) + (1 << 16)  # of the bytes that are there, whatever they claim
    if got is not None:
        # What is believed adds up: lengths are those of the spans, and no layer is too long.
        assert got.record_bytes == sizes(packed)[1]
        most = sum(
            form.L * bound(codec, form.tokens[1] - form.tokens[0], layout_of(form))
            for form, codec, _, _ in got.part.stored
        )
        assert got.payload_bytes <= most


FIXED = FRONT + 36


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        (8, "<I", 2**31),  # bytes of the header
        (16, "<Q", 2**50),  # bytes of the record
        (24, "<Q", 2**64 - 1),  # seq
        (24, "<Q", 2**62 + 1),
        (FRONT + 6, "<H", 2**16 - 1),  # sections
        (FRONT + 8, "<I", 2**31),  # bytes of the header
        (FRONT + 12, "<Q", 2**63),  # and of the payload
        (FIXED, "<d", float("nan")),  # created
        (FIXED, "<d", 1e308),
        (FIXED + 8, "<d", float("inf")),  # error
        (FIXED + 16, "<I", 2**30),  # T
        (FIXED + 20, "<Q", 2**63),  # start
        (FIXED + 160 + 6, "<H", 2),  # heads: from beyond their end
        (FIXED + 160 + 8, "<H", 2**16 - 1),  # more than there are
        (FIXED + 160 + 16, "<I", 3),  # tokens beyond T
        (FIXED + 160 + 20, "<H", 2**16 - 1),  # L
        (FIXED + 160 + 22, "<H", 2**16 - 1),  # D
        (FIXED + 160 + 24, "<H", 0),  # layers of a span
    ],
)
def test_numbers_are_bounded_before_anything_is_allocated(at: int, form: str, value: int) -> None:
    packed = bytearray(pack(_example()))
    struct.pack_into(form, packed, at, value)
    tracemalloc.start()
    assert parsed(redigested(bytes(packed))) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": struct.pack("<2q", 1, -1)}, "token ids -1 to 1"),
        ({"tokens": struct.pack("<2q", 1, 2**32)}, "token ids 1 to 4294967296"),
        ({"tokens": b""}, "T=0"),
        ({"start": -1}, "start=-1"),
        ({"start": 2**62 + 1}, "start="),
        ({"context": b"c" * 31}, "31 bytes"),
    ],
)
def test_what_could_not_be_read_is_not_written(changes: dict[str, Any], message: str) -> None:
    header = _example()
    part = replace(header.part, record=replace(header.record, **changes))
    with pytest.raises(ValueError, match=message):
        pack(replace(header, part=part))


def test_another_format_is_named() -> None:
    packed = bytearray(pack(_example()))
    packed[6] = 1
    with pytest.raises(HeaderError, match="record of format 1, this is format 2"):
        unpack(redigested(bytes(packed)))


def _example() -> Header:
    k = b"k" * 32
    record = Record(-1, k, k, struct.pack("<2q", 5, 6), 0, k, k, "exact", 256)
    span = Span(128, b"d" * 16)
    form = Form(0, "kv", (0, 1, 1), (0, 2), 2, 8, "float32")
    part = wire.Header(record, (Stored(form, "none", 1, (span, span)),), 1e9, 0.0, "toy")
    return Header(part, 3, b"f" * 16)
