"""The parser of headers, given what no writer wrote."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmc.model.layout import KVLayout
from lmc.store.compress import CODECS, bound
from lmc.store.disk import header as fmt
from lmc.store.disk.header import Header, HeaderError, Section, pack, sizes, unpack
from lmc.store.record import Record

B32 = st.binary(min_size=32, max_size=32)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    T, L = draw(st.integers(1, 70)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    layout = KVLayout(L, draw(st.integers(1, 4)), 2 * draw(st.integers(1, 40)), dtype)
    S = draw(st.sampled_from([1, 2]))
    codec = draw(st.sampled_from(CODECS))
    tokens = draw(st.lists(st.integers(0, 2**32 - 1), min_size=T, max_size=T))
    record = Record(
        -1, draw(B32), draw(B32), struct.pack(f"<{T}q", *tokens), draw(st.integers(0, 2**40)),
        draw(B32), draw(B32), draw(st.sampled_from(["exact", "isolated", "anchored", "blended"])),
        layout.bytes_per_token * T * S // 2, draw(st.booleans()),
    )  # fmt: skip
    band = draw(st.integers(1, L)) if codec == "none" else 1
    layer = bound(codec, T, layout) * S // 2
    most = [layer * min(band, L - i) for i in range(0, L, band)]
    length = [n if codec == "none" else draw(st.integers(0, n)) for n in most]
    sections = tuple(Section(n, draw(st.binary(min_size=16, max_size=16))) for n in length)
    shards = draw(st.integers(1, 8))
    return Header(
        record, layout, S, draw(st.integers(0, shards - 1)), shards, codec,
        draw(st.integers(0, 2**60)), draw(st.floats(0, 4e9)), 0.0, draw(st.text(max_size=20)),
        sections, band,
    )  # fmt: skip


def redigested(data: bytes) -> bytes:
    """The same bytes with the digest that they should have: a writer with a defect, or malice."""
    digest = xxhash.xxh3_128(data[:4])
    digest.update(data[5:24])
    digest.update(data[40:])
    return data[:24] + digest.digest() + data[40:]


def parsed(data: bytes) -> Header | None:
    try:
        return unpack(data)
    except HeaderError:
        return None


@given(headers())
def test_what_is_packed_is_unpacked(header: Header) -> None:
    data = pack(header)
    assert unpack(data) == header
    assert sizes(data) == (len(data), header.record_bytes)
    # A file's bytes go on behind it, and its state may be another.
    dead = bytearray(data + b"payload")
    dead[fmt.STATE_AT] = fmt.DEAD
    assert unpack(dead) == header and fmt.same(dead[: len(data)], data)


@given(st.binary(max_size=600))
@example(b"")
@example(b"LMCR")
def test_any_bytes_are_refused_and_nothing_else_happens(data: bytes) -> None:
    assert parsed(data) is None
    assert parsed(b"LMCR\x00\x00\x01\x00" + data) is None


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
        at = data.draw(st.integers(5, min(len(packed) - 1, 130)))
        packed[at] = data.draw(st.integers(0, 255))
    tracemalloc.start()
    got = parsed(redigested(bytes(packed)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * len(packed) + (1 << 16)  # of the bytes that are there, whatever they claim
    if got is not None:
        # What is believed adds up: lengths are those of the sections, and no layer is too long.
        assert got.record_bytes == sizes(packed)[1]
        assert got.payload_bytes <= got.layout.L * bound(got.codec, got.record.T, got.layout)


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        (8, "<I", 2**31),  # bytes of the header
        (16, "<Q", 2**50),  # bytes of the record
        (60, "<I", 2**30),  # L
        (68, "<I", 2**30),  # T
    ],
)
def test_sizes_are_bounded_before_anything_is_allocated(at: int, form: str, value: int) -> None:
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
    ],
)
def test_what_could_not_be_read_is_not_written(changes: dict[str, Any], message: str) -> None:
    header = _example()
    with pytest.raises(ValueError, match=message):
        pack(replace(header, record=replace(header.record, **changes)))


def test_another_format_is_named() -> None:
    packed = bytearray(pack(_example()))
    packed[6] = 2
    with pytest.raises(HeaderError, match="record of format 2, this is format 1"):
        unpack(redigested(bytes(packed)))


def _example() -> Header:
    layout = KVLayout(2, 1, 8, "float32")
    k = b"k" * 32
    record = Record(-1, k, k, struct.pack("<2q", 5, 6), 0, k, k, "exact", 256)
    section = Section(128, b"d" * 16)
    return Header(record, layout, 2, 0, 1, "none", 3, 1e9, 0.0, "toy", (section, section))
