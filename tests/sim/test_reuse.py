"""Reuse of text against brute force, and the figures of a public trace where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.chunking import CHUNKERS, Chunker
from lmc.chunking.cdc import Cdc
from lmc.chunking.fixed import Fixed
from lmc.chunking.pieces import split
from lmc.sim.kinds import KINDS, MOVED, NEW, PREFIX, REPEATED_WITHIN
from lmc.sim.reuse import PrefixTree, RequestReuse, Sliding, analyse
from lmc.sim.trace import Request
from lmc.sim.windows import WindowSet, covered, greedy, window_hashes

PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=24), max_size=6).map(
    lambda lists: [np.array(ids, dtype=np.int32) for ids in lists]
)


def request(tokens: np.ndarray, session: str = "s", segments: tuple = ()) -> Request:
    return Request(0.0, session, len(tokens), 0, tokens=tokens, segments=segments)


def common(a: np.ndarray, b: np.ndarray) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def brute_force(prompts: list[np.ndarray], chunker: Chunker, w: int) -> list[tuple[list, int]]:
    out = []
    for i, tokens in enumerate(prompts):
        earlier = prompts[:i]
        chunks = {
            p[c.start : c.end].tobytes() for p in earlier for c in split(p, chunker) if c.closed
        }
        prefix = max((common(p, tokens) for p in earlier), default=0)
        kinds, here = [NEW] * len(tokens), set()
        for c in split(tokens, chunker):
            content = tokens[c.start : c.end].tobytes()
            if c.closed and content in chunks:
                kinds[c.start : c.end] = [MOVED] * (c.end - c.start)
            elif c.closed and content in here:
                kinds[c.start : c.end] = [REPEATED_WITHIN] * (c.end - c.start)
            here.add(content)
        kinds[:prefix] = [PREFIX] * prefix
        windows = {p[j : j + w].tobytes() for p in earlier for j in range(len(p) - w + 1)}
        reach = set()
        for j in range(len(tokens) - w + 1):
            if tokens[j : j + w].tobytes() in windows:
                reach |= set(range(j, j + w))
        out.append((kinds, sum(t >= prefix for t in reach)))
    return out


@given(PROMPTS, st.sampled_from([Fixed(3), Cdc(5, hash_tokens=1, max_tokens=6)]))
def test_every_token_is_of_the_kind_that_brute_force_finds(
    prompts: list[np.ndarray], chunker: Chunker
) -> None:
    done = list(analyse([request(p) for p in prompts], chunker, window=4))
    assert [(r.kinds.tolist(), r.upper_bound) for r in done] == brute_force(prompts, chunker, 4)
    for r, p in zip(done, prompts, strict=True):
        assert list(r.tokens()) == list(KINDS)
        assert sum(r.tokens().values()) == len(p)


@given(PROMPTS)
def test_prefix_tree_finds_the_longest_common_prefix(prompts: list[np.ndarray]) -> None:
    tree = PrefixTree()
    for i, p in enumerate(prompts):
        assert tree.add(p) == max((common(q, p) for q in prompts[:i]), default=0)


@given(PROMPTS, st.integers(1, 5))
def test_windows_are_equal_iff_their_hashes_are(prompts: list[np.ndarray], w: int) -> None:
    by_content: dict[bytes, int] = {}
    for p in prompts:
        hashes = window_hashes(p, w)
        assert len(hashes) == max(len(p) - w + 1, 0)
        for j, h in enumerate(hashes.tolist()):
            assert h
            assert by_content.setdefault(p[j : j + w].tobytes(), h) == h
    assert len(set(by_content.values())) == len(by_content)


def test_the_set_grows_and_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    members = rng.integers(1, 2**63, 50_000).astype(np.uint64)
    others = rng.integers(1, 2**63, 50_000).astype(np.uint64)
    held = WindowSet()
    assert not held.known(members).any()
    for part in (members[:10], members[10:40_000], members):
        held.add(part)
        assert held.known(part).all()
    assert held.known(others).tolist() == np.isin(others, members).tolist()
    held.add(members[:0])
    assert held.known(members).all()


def test_what_windows_cover() -> None:
    hits = np.array([0, 1, 1, 0, 0, 0, 1], dtype=bool)
    assert covered(hits, 2, 8).tolist() == [False, True, True, True, False, False, True, True]
    assert greedy(hits, 0, 2).tolist() == [1, 6]
    assert greedy(hits, 2, 2).tolist() == [2, 6]


def test_a_session_sees_itself_alone_and_the_trace_sees_all() -> None:
    text = np.arange(40, dtype=np.int32)
    both = [request(text, "a"), request(text, "b")]
    assert [int((r.kinds == PREFIX).sum()) for r in analyse(both, Fixed(8))] == [0, 0]
    whole = list(analyse(both, Fixed(8), scope="trace"))
    assert [int((r.kinds == PREFIX).sum()) for r in whole] == [0, 40]


def test_spans_are_chunks() -> None:
    document, rng = np.arange(100, 130, dtype=np.int32), np.random.default_rng(0)
    prompts = []
    for n in (7, 12):
        start = rng.integers(0, 50, n).astype(np.int32)
        segments = (("system", 0, n), ("document", n, n + 30))
        prompts.append(request(np.concatenate([start, document, [n]]), segments=segments))
    cut = list(analyse(prompts, CHUNKERS.build("cdc:64"), spans=True))
    assert (cut[1].kinds[12:42] == MOVED).all()
    assert not (list(analyse(prompts, CHUNKERS.build("cdc:64")))[1].kinds == MOVED).any()


def test_sliding_finds_grid_chunks_at_any_offset() -> None:
    rng = np.random.default_rng(1)
    document = rng.integers(0, 1000, 64).astype(np.int32)
    shifted = np.concatenate([rng.integers(0, 1000, 5), document, document]).astype(np.int32)
    first, second = analyse([request(document), request(shifted)], Sliding(16))
    assert first.tokens()["new"] == 64
    assert second.tokens() == {"prefix": 0, "moved": 128, "repeated_within": 0, "new": 5}
    alone = np.concatenate([document, rng.integers(0, 1000, 3), document]).astype(np.int32)
    (only,) = analyse([request(alone)], Sliding(16))
    assert only.tokens() == {"prefix": 0, "moved": 0, "repeated_within": 64, "new": 67}


def test_bad_input_is_refused() -> None:
    lengths_only = Request(0.0, "s", 5, 0)
    with pytest.raises(ValueError, match="no token ids"):
        list(analyse([lengths_only], Fixed(4)))
    with pytest.raises(ValueError, match="window 0"):
        list(analyse([], Fixed(4), window=0))
    with pytest.raises(ValueError, match="'all'"):
        list(analyse([], Fixed(4), scope="all"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n 0"):
        Sliding(0)


@pytest.fixture(scope="module")
def mtrag() -> list[Request]:
    """The public conversations, tokenised, if they are at hand."""
    from lmc.model.weights import cache_dir
    from lmc.sim.readers import read

    if not (folder := os.environ.get("LMC_DATA")):
        pytest.skip("LMC_DATA does not name the folder with mtrag_shared.jsonl.xz")
    file = Path(folder) / "mtrag_shared.jsonl.xz"
    return list(read(file, tokenizer=cache_dir() / "models" / "SmolLM2-135M-Instruct-float32"))


def shares(done: list[RequestReuse]) -> dict[str, float]:
    total = sum(len(r.kinds) for r in done)
    found = {kind: sum(r.tokens()[kind] for r in done) / total for kind in KINDS}
    return found | {"upper_bound": sum(r.upper_bound for r in done) / total}


def test_the_public_conversations(mtrag: list[Request]) -> None:
    assert sum(r.input_tokens for r in mtrag) == 6_158_155
    cdc = shares(list(analyse(mtrag, CHUNKERS.build("cdc:64"))))
    assert round(cdc["prefix"], 4) == 0.4273
    assert round(cdc["upper_bound"], 4) == 0.3996
    assert 0.392 <= cdc["moved"] <= cdc["upper_bound"]
    assert round(shares(list(analyse(mtrag, Sliding(256))))["moved"], 3) == 0.387
    assert shares(list(analyse(mtrag, Fixed(256))))["moved"] < 0.01
