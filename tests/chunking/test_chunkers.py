"""Chunkers: the rule itself, and that content alone decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.chunking import CHUNKERS
from lmc.chunking.cdc import Cdc, splitmix64
from lmc.chunking.pieces import Piece, chunk_key, split

SMALL = Cdc(7, hash_tokens=2, max_tokens=12)
IDS = st.one_of(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 2**40))).map(
    lambda ids: np.array(ids, dtype=np.int64)
)


def brute_force(chunker: Cdc, tokens: np.ndarray) -> list[int]:
    """The rule of the docstring, one position at a time."""
    w, k, T = chunker.window, chunker.hash_tokens, len(tokens)

    def hash_at(p: int) -> int:
        h = np.zeros(1, dtype=np.uint64)
        for token in tokens[p - k : p]:
            h = splitmix64(h ^ np.uint64(token))
        return int(h[0])

    cuts, last = [], 0
    for p in range(1, T + 1):
        if p - 1 + w > T:
            break  # a minimum at p - 1 is undecided, so is all that follows
        minimum = (
            k + w <= p <= T - w
            and all(hash_at(p) < hash_at(q) for q in range(p - w, p))
            and all(hash_at(p) <= hash_at(q) for q in range(p + 1, p + w + 1))
        )
        if minimum or p - last == chunker.max_tokens:
            cuts.append(p)
            last = p
    return cuts


@given(tokens=IDS)
def test_cdc_is_its_rule(tokens: np.ndarray) -> None:
    assert SMALL.cuts(tokens).tolist() == brute_force(SMALL, tokens)


@given(tokens=st.lists(st.integers(0, 5), min_size=30, max_size=200), at_once=st.integers(1, 40))
def test_cdc_is_its_rule_wherever_long_prompts_are_parted(tokens: list[int], at_once: int) -> None:
    ids = np.array(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmc.chunking.cdc.AT_ONCE", at_once)
        parted = SMALL.cuts(ids).tolist()
    assert parted == SMALL.cuts(ids).tolist()


@given(before=IDS, other=IDS, tokens=IDS, after=IDS)
def test_cdc_minima_depend_on_content_alone(
    before: np.ndarray, other: np.ndarray, tokens: np.ndarray, after: np.ndarray
) -> None:
    chunker = Cdc(7, hash_tokens=2, max_tokens=10_000)  # no forced cuts

    def inside(prefix: np.ndarray) -> list[int]:
        cuts = chunker.cuts(np.concatenate([prefix, tokens, after])) - len(prefix)
        return [p for p in cuts.tolist() if 3 + 2 <= p <= len(tokens) - 3]

    assert inside(before) == inside(other) == chunker.cuts(tokens).tolist()


@given(tokens=IDS)
def test_cdc_lengths(tokens: np.ndarray) -> None:
    lengths = np.diff(SMALL.cuts(tokens), prepend=0)
    assert (lengths <= SMALL.max_tokens).all()
    assert (lengths >= 1).all()


def test_cdc_mean_length_on_random_ids() -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 100_000)
    lengths = np.diff(Cdc().cuts(tokens))
    assert 31 < lengths.mean() < 35
    assert lengths.min() == 17  # window + 1


def test_cdc_resumes_after_forced_cuts() -> None:
    text = np.random.default_rng(1).integers(0, 50_000, 500)
    one = Cdc().cuts(np.concatenate([np.zeros(1000, dtype=np.int64), text]))
    two = Cdc().cuts(np.concatenate([np.zeros(777, dtype=np.int64), text]))
    assert one[:3].tolist() == two[:3].tolist() == [256, 512, 768]
    assert (one[one > 1020] - 1000).tolist() == (two[two > 797] - 777).tolist()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "cdc", "n": 0}, "n 0.*at least 1"),
        ({"name": "cdc", "max_tokens": 16}, "max_tokens 16, want more than half of n, 16"),
        ({"name": "cdc", "width": 3}, "valid: n, hash_tokens, max_tokens"),
        ({"name": "fixed", "n": 0}, "n 0, want at least 1"),
        ({"name": "separator", "ids": []}, "got no ids"),
        ({"name": "separator"}, "ids: .*required"),
        ({"name": "rabin"}, "got 'rabin'; valid: cdc, explicit, fixed, separator"),
    ],
)
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CHUNKERS.build(config)


@pytest.mark.parametrize("name", ["cdc", "explicit", "fixed"])
def test_defaults_build(name: str) -> None:
    assert CHUNKERS.build(name).cuts(np.arange(0)).tolist() == []


def test_fixed() -> None:
    assert CHUNKERS.build({"name": "fixed", "n": 4}).cuts(np.arange(12)).tolist() == [4, 8, 12]


def test_separator_ends_its_chunk() -> None:
    chunker = CHUNKERS.build({"name": "separator", "ids": [7, 8]})
    tokens = np.array([1, 7, 8, 7, 2, 8, 7, 8])
    assert chunker.cuts(tokens).tolist() == [3, 8]
    assert chunker.cuts(tokens[:1]).tolist() == []


def test_cdc_finds_a_document_in_another_context(smollm2_dir: Path) -> None:
    """Documents of 256 tokens: the share found again behind and before other documents."""
    found = found_share(documents(smollm2_dir, n_docs=24, T=256), Cdc())
    assert found >= 0.65


def documents(model: Path, n_docs: int, T: int) -> list[list[int]]:
    """The first T tokens of the first topics of the Python manual that are long enough."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    encoded = (tokenizer.encode(topics[t], add_special_tokens=False).ids for t in sorted(topics))
    return [ids[:T] for ids in encoded if len(ids) >= T][:n_docs]


def found_share(docs: list[list[int]], chunker: Any) -> float:
    """Each document between two neighbours, then between two others: share of its tokens found."""

    def keys(ids: list[int], lo: int, hi: int) -> dict[bytes, Piece]:
        tokens = np.array(ids)
        pieces = [p for p in split(tokens, chunker) if p.closed and lo <= p.start and p.end <= hi]
        return {chunk_key(b"", tokens[p.start : p.end]): p for p in pieces}

    n, T = len(docs), len(docs[0])
    found = 0
    for i, doc in enumerate(docs):
        first = keys(docs[i - 1] + doc + docs[(i + 1) % n], T, 2 * T)
        second = keys(docs[i - 3][:99] + doc + docs[(i + 5) % n], 99, 99 + T)
        found += sum(p.end - p.start for k, p in first.items() if k in second)
    return found / (n * T)


def test_a_chunker_in_a_few_characters() -> None:
    cdc = CHUNKERS.build("cdc:64")
    assert (cdc.window, cdc.longest_chunk) == (32, 256)  # 2 * 32 + 1 tokens on average
    assert CHUNKERS.build("cdc:1000").longest_chunk == 4000
    assert CHUNKERS.build("cdc") == CHUNKERS.build({"name": "cdc", "n": 33})
    assert CHUNKERS.build("fixed:256").n == 256
    assert CHUNKERS.build("separator:[1, 2]").ids == (1, 2)
    assert CHUNKERS.build("lmc.chunking.fixed:Fixed").n == 64
    assert CHUNKERS.build("lmc.chunking.fixed:Fixed:8").n == 8
    for wrong in ("cdc:x", "cdc:8x", "cdc:-8", "fixed:1,2", "fixed:0", "nothing", "cdc:"):
        with pytest.raises(ValueError, match="chunker"):
            CHUNKERS.build(wrong)
