"""Records as any place may hold them: header bytes and a payload."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.store import wire
from lmc.store.assembly import decode
from lmc.store.compress import CODECS
from lmc.store.payload import encode
from lmc.store.record import Record
from lmc.store.sections import Form, Kind, Section, complete, covered, whole
from tests.store.disk.chunks import KINDS, Spec, empty, heads_of

QUANTISED = ("int8", "int4", "fp8")


@st.composite
def chunks(draw: st.DrawFn) -> tuple[Record, list[Section]]:
    """A record of one to three sections of finite values, whose rows are in parts."""
    T = draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sections = []
    for group in range(draw(st.integers(1, 3))):
        of = draw(st.integers(1, 4))
        start = draw(st.integers(0, of - 1))
        first = draw(st.integers(0, T - 1))
        dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
        form = Form(
            group, draw(st.sampled_from(get_args(Kind))), (start, of, of), (first, T),
            draw(st.integers(1, 3)), 2 * draw(st.integers(1, 6)), dtype,
        )  # fmt: skip
        L, S, t, R = form.shape
        kind = np.float32 if dtype == "float32" else np.float16  # of bfloat16 any bits will do
        values = rng.standard_normal((L, S, t, R // kind().itemsize))
        rows = values.astype(kind).view(np.uint8).reshape(form.shape)
        cut = draw(st.integers(0, t))
        parts = [rows] if cut in (0, t) else [rows[:, :, :cut], rows[:, :, cut:]]
        sections.append(Section(form, parts))
    record = Spec(draw(st.integers(0, 9)), 0, T).record()
    return record, draw(st.permutations(sections))


def rows_of(section: Section) -> np.ndarray:
    return np.concatenate(list(section.parts), axis=2)


@settings(max_examples=60)
@given(chunks(), st.sampled_from(["none", "zstd", "shuffle_zstd"]))
def test_what_is_encoded_is_decoded(chunk: tuple[Record, list[Section]], codec: str) -> None:
    record, sections = chunk
    encoded = encode(record, sections, codec, "a model")
    data, payload = encoded.packed()
    header = wire.unpack(data)  # as whoever holds them gives them back
    payload = np.frombuffer(payload.tobytes(), np.uint8)
    assert wire.pack(header) == data
    assert wire.sizes(data) == (len(data), payload.nbytes)
    assert header.record.namespace == wire.namespace_digest(record.namespace)
    assert replace(header.record, namespace=record.namespace, nbytes=record.nbytes) == record
    assert sorted(form for form in map(repr, header.forms)) == sorted(
        repr(section.form) for section in sections
    )
    into = empty([section.form for section in sections])
    decode(header, payload, into)
    for got, want in zip(into, sections, strict=True):
        assert np.array_equal(rows_of(got), rows_of(want))


@settings(max_examples=60)
@given(chunks(), st.sampled_from(CODECS), st.data())
def test_a_changed_payload_is_noticed(
    chunk: tuple[Record, list[Section]], codec: str, data: st.DataObject
) -> None:
    record, sections = chunk
    encoded, payload = encode(record, sections, codec).packed()
    header = wire.unpack(encoded)
    decode(header, payload, [])
    bad = payload.copy()
    bad[data.draw(st.integers(0, bad.nbytes - 1))] ^= data.draw(st.integers(1, 255))
    for damaged in (bad, payload[:-1], np.concatenate([payload, payload[:1]])):
        with pytest.raises(ValueError, match=r"digests|bytes, want"):
            decode(header, damaged, [])


@pytest.mark.parametrize("codec", ["none", "shuffle_zstd", *QUANTISED])
def test_some_heads_are_those_of_all(codec: str) -> None:
    record, sections = Spec(1, 0, 12).item()
    values = np.random.default_rng(0).standard_normal(sections[0].form.nbytes // 4)
    rows = values.astype(np.float32).view(np.uint8).reshape(sections[0].form.shape)
    encoded, payload = encode(record, [Section(sections[0].form, [rows])], codec).packed()
    header = wire.unpack(encoded)
    everything = empty(header.forms)
    decode(header, payload, everything)
    assert np.array_equal(everything[0].parts[0], rows) or codec in QUANTISED
    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        (want,) = heads_of(everything, rank, ranks)
        (got,) = empty([want.form])
        decode(header, payload, [got])
        assert np.array_equal(got.parts[0], want.parts[0])
    with pytest.raises(ValueError, match="does not have"):
        decode(header, payload, empty([replace(header.forms[0], group=1)]))


def test_what_a_codec_cannot_take_is_stored_as_it_is() -> None:
    """Beside what it can: latents, and values that are not finite."""
    record, _ = Spec(1, 0, 12).item()
    forms = [
        Form(0, "kv", (0, 2, 2), (0, 12), 2, 4, "float32"),
        Form(1, "kv", (0, 2, 2), (0, 12), 2, 4, "float32"),
        Form(2, "latent", (0, 1, 1), (0, 12), 2, 6, "float32"),
    ]
    sections = [Section(f, [np.ones(f.nbytes // 4, "f4").view(np.uint8).reshape(f.shape)])
                for f in forms]  # fmt: skip
    sections[1].parts[0].reshape(-1).view("f4")[5] = np.nan
    counts: Counter[str] = Counter()
    encoded = encode(record, sections, "int8", counts=counts)
    assert [stored.codec for stored in encoded.header.stored] == ["int8", "none", "none"]
    assert counts["not_compressed"] == 2
    assert counts["bytes_before_compression"] == forms[0].nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_ranks_have_names_of_their_own(kind: Any) -> None:
    spec = Spec(1, 0, 12, kind=kind)
    ids = [encode(*item).header.id for item in spec.items()]
    assert len(set(ids)) == len(ids)
    assert {id[:32] for id in ids} == {spec.record().id}
    assert encode(*spec.items()[0]).header.id == ids[0]


@given(st.integers(1, 12), st.data())
def test_heads_are_all_there_or_not(of: int, data: st.DataObject) -> None:
    ranges = [
        sorted(data.draw(st.lists(st.integers(0, of), min_size=2, max_size=2, unique=True)))
        for _ in range(data.draw(st.integers(0, 5)))
    ]
    form = Form(0, "kv", (0, of, of), (0, 4), 1, 2, "float32")
    held = [form.of((start, end, of)) for start, end in ranges]
    held.append(replace(form, group=1))  # is none of it
    there = {head for start, end in ranges for head in range(start, end)}
    start, end = sorted(
        data.draw(st.lists(st.integers(0, of), min_size=2, max_size=2, unique=True))
    )
    assert covered(form.of((start, end, of)), held) == (set(range(start, end)) <= there)
    assert complete(held) == (not ranges or len(there) == of)
    assert whole(form.of((start, end, of))) == form
