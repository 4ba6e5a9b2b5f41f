"""Pieces, keys, digests."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from lmc.chunking import CHUNKERS
from lmc.chunking.cdc import Cdc
from lmc.chunking.pieces import Piece, chunk_key, context_digests, split

CONFIGS = [
    {"name": "cdc", "n": 7, "hash_tokens": 2, "max_tokens": 12},
    {"name": "cdc"},
    {"name": "explicit", "n": 5},
    {"name": "fixed", "n": 7},
    {"name": "separator", "ids": [1, 2]},
]
IDS = st.one_of(
    st.lists(st.integers(0, 3), max_size=200),  # repeats and ties
    st.lists(st.integers(0, 2**31), max_size=200),
).map(lambda ids: np.array(ids, dtype=np.int64))


@st.composite
def tokens_and_spans(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[int, int]]]:
    tokens = draw(IDS)
    borders = sorted(draw(st.sets(st.integers(0, len(tokens)), max_size=8)))
    pairs = list(pairwise(borders))
    return tokens, [p for p in pairs if draw(st.booleans())]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@given(case=tokens_and_spans())
def test_pieces_partition_the_prompt(
    config: dict[str, object], case: tuple[np.ndarray, list[tuple[int, int]]]
) -> None:
    tokens, spans = case
    pieces = split(tokens, CHUNKERS.build(config), spans)
    ends = [0] + [p.end for p in pieces]
    assert [p.start for p in pieces] == ends[:-1]
    assert ends[-1] == len(tokens)
    assert all(p.start < p.end for p in pieces)
    assert all(p.closed for p in pieces[:-1])
    assert {p for span in spans for p in span} <= {0, *ends}
    whole = split(tokens, CHUNKERS.build(config), spans, whole=True)
    assert {Piece(a, b) for a, b in spans} <= set(whole)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@given(case=tokens_and_spans(), more=IDS)
def test_appending_never_changes_closed_pieces(
    config: dict[str, object], case: tuple[np.ndarray, list[tuple[int, int]]], more: np.ndarray
) -> None:
    tokens, spans = case
    chunker = CHUNKERS.build(config)
    closed = [p for p in split(tokens, chunker, spans) if p.closed]
    longer = split(np.concatenate([tokens, more]), chunker, spans)
    assert longer[: len(closed)] == closed


def test_regions_between_spans_stand_alone() -> None:
    tokens = np.arange(40)
    chunker = CHUNKERS.build({"name": "fixed", "n": 8})
    assert split(tokens, chunker, [(10, 15), (15, 16), (30, 31)]) == [
        Piece(0, 8),
        Piece(8, 10),  # its last run is closed by the span
        Piece(10, 15),
        Piece(15, 16),
        Piece(16, 24),
        Piece(24, 30),
        Piece(30, 31),
        Piece(31, 39),
        Piece(39, 40, closed=False),
    ]


def test_no_tail_behind_a_last_span_or_cut() -> None:
    chunker = CHUNKERS.build({"name": "fixed", "n": 4})
    assert split(np.arange(8), chunker)[-1] == Piece(4, 8)
    assert split(np.arange(9), chunker, [(3, 9)])[-1] == Piece(7, 9)
    assert split(np.arange(0), chunker) == []
    assert split(np.arange(3), chunker) == [Piece(0, 3, closed=False)]


@given(
    T=st.integers(0, 300),
    longest=st.integers(1, 80),
    name=st.sampled_from(["explicit", "cdc:8", "fixed:50", "separator:[7]"]),
    data=st.data(),
)
def test_no_piece_is_longer_than_allowed(
    T: int, longest: int, name: str, data: st.DataObject
) -> None:
    tokens = np.random.default_rng(T).integers(0, 60, T)
    cuts = sorted(data.draw(st.sets(st.integers(0, T), max_size=6)))
    spans = list(pairwise(cuts))[::2]
    chunker = CHUNKERS.build(name)
    whole, cut = split(tokens, chunker, spans), split(tokens, chunker, spans, longest)
    assert [p.start for p in cut] == [0, *(p.end for p in cut)][: len(cut)]
    assert sum(p.end - p.start for p in cut) == T
    assert all(1 <= p.end - p.start <= longest for p in cut)
    # Every border stays, and what is open is the last one at most.
    assert {p.end for p in whole} <= {p.end for p in cut}
    assert [p.closed for p in cut[:-1]] == [True] * (len(cut) - 1)
    assert [p.closed for p in cut[-1:]] == [p.closed for p in whole[-1:]]
    # A text has the same pieces wherever it stands.
    if spans:
        start, end = spans[-1]
        alone = split(tokens[start:end], chunker, [(0, end - start)], longest)
        moved = [(p.start - start, p.end - start) for p in cut if start <= p.start < end]
        assert moved == [(p.start, p.end) for p in alone]


def test_texts_are_cut_alike_with_spans_and_without() -> None:
    """But for what reaches from the last cut before a span's border to the first one behind it."""
    chunker = CHUNKERS.build("cdc")
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 500, n) for n in (300, 700, 20, 450, 1)]
    ends = np.cumsum([len(text) for text in texts]).tolist()
    tokens = np.concatenate(texts)
    plain = split(tokens, chunker)
    spans = list(pairwise([0, *ends]))
    marked = split(tokens, chunker, spans)
    near = 2 * chunker.window + chunker.hash_tokens
    far = {p.end for p in plain if all(abs(p.end - border) > near for border in ends)}
    assert far <= {p.end for p in marked}
    assert {p.end for p in marked} <= {p.end for p in plain} | set(ends)
    # A text among others is cut as it is alone: its pieces are found again wherever it stands.
    for (start, end), text in zip(spans, texts, strict=True):
        alone = [(a + start, b + start) for a, b, _ in split(text, chunker, [(0, len(text))])]
        assert [(a, b) for a, b, _ in marked if start <= a < end] == alone


@given(case=tokens_and_spans(), n=st.integers(1, 12), most=st.integers(1, 60))
def test_regions_are_cut_together_as_each_of_them_is(
    case: tuple[np.ndarray, list[tuple[int, int]]], n: int, most: int
) -> None:
    tokens, regions = case
    chunker = Cdc(n, max_tokens=max(n // 2, 1) + most)
    together = chunker.cuts_within(tokens, regions)
    for (start, end), cuts in zip(regions, together, strict=True):
        assert cuts.tolist() == (chunker.cuts(tokens[start:end]) + start).tolist()


def test_spans_as_json_gives_them() -> None:
    pieces = split(np.arange(5), CHUNKERS.build("cdc"), [[0, 2], [np.int64(2), 4]])
    assert pieces == [Piece(0, 2), Piece(2, 4), Piece(4, 5, closed=False)]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(2, 2)], r"got span \(2, 2\), want 0 <= start < end <= 10"),
        ([(3, 1)], r"got span \(3, 1\)"),
        ([(-1, 4)], r"got span \(-1, 4\)"),
        ([(4, 11)], r"got span \(4, 11\)"),
        ([(0, 5), (4, 6)], r"got span \(4, 6\), want 5 <= start"),
        ([(5, 6), (0, 1)], r"got span \(0, 1\), want 6 <= start"),
        ([(0, 1.5)], r"got span \(0, 1.5\), want two integers"),
        ([(0, 1, 2)], r"want two integers"),
        ([7], r"got span 7, want two integers"),
        ([(True, 5)], r"got span \(True, 5\), want two integers"),
        (["ab"], r"got span 'ab', want two integers"),
    ],
)
def test_bad_spans(spans: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(np.arange(10), CHUNKERS.build("cdc"), spans)


def test_key_is_of_namespace_and_ids_only() -> None:
    key = chunk_key(b"model", np.array([1, 2, 3]))
    assert len(key) == 32
    assert key == chunk_key(b"model", np.array([1, 2, 3], dtype=np.int32))
    assert key == chunk_key(b"model", np.array([9, 1, 2, 3])[1:])
    assert key == chunk_key(b"model", np.array([1, 0, 2, 0, 3])[::2])
    assert key != chunk_key(b"other", np.array([1, 2, 3]))
    assert key != chunk_key(b"model", np.array([1, 2]))
    # The border between namespace and ids is part of the key.
    one = np.array([1], dtype="<i8")
    assert chunk_key(b"m" + one.tobytes(), np.array([2])) != chunk_key(b"m", np.array([1, 2]))


def test_key_does_not_change_between_versions() -> None:
    expected = blake3((5).to_bytes(8, "little") + b"model" + np.array([1, 2], "<i8").tobytes())
    assert chunk_key(b"model", np.array([1, 2])) == expected.digest()


@given(tokens=IDS, data=st.data())
def test_context_digests_are_those_of_the_prefixes(tokens: np.ndarray, data: st.DataObject) -> None:
    positions = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    assert context_digests(tokens, positions) == [
        blake3(tokens[:p].astype("<i8").tobytes()).digest() for p in positions
    ]


@pytest.mark.parametrize("positions", [[3, 2], [-1], [6]])
def test_context_digests_of_bad_positions(positions: list[int]) -> None:
    with pytest.raises(ValueError, match=r"got position .* in \[0, 5\]"):
        context_digests(np.arange(5), positions)
