"""What of a trace's text could be reused by a cache that forgets nothing, and by which means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lmc.chunking import CHUNKERS, Chunker
from lmc.chunking.pieces import chunk_key, split
from lmc.registry import Registry
from lmc.sim.kinds import KINDS, MOVED, NEW, PREFIX, REPEATED_WITHIN
from lmc.sim.trace import Request
from lmc.sim.windows import WindowSet, covered, greedy, window_hashes

Scope = Literal["session", "trace"]


@dataclass(frozen=True)
class Sliding:
    """Chunks of n tokens on a grid from the start of each prompt, looked up at every offset.

    What a rolling hash over the prompt would find, taken greedily from the end of the prefix on:
    a yardstick for chunkers, for the store has no such lookup.

    Raises ValueError for n below 1.
    """

    n: int = 256

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"got n {self.n}, want at least 1")


# What `lmc reuse` cuts by: chunkers, and the yardstick for them.
CUTS = Registry("chunker", {**CHUNKERS.entries, "sliding": "lmc.sim.reuse:Sliding"})


@dataclass(frozen=True, eq=False)
class RequestReuse:
    """The tokens of one request by kind.

    kinds: [T] uint8, places in `KINDS`. `prefix`: inside the longest common prefix with any
        earlier request in scope. `moved`: behind it, in a chunk that an earlier request in scope
        had anywhere. `repeated_within`: in a chunk that only this prompt had, further in front.
        `new`: the rest. The last run of a prompt, which no cut has ended, is never moved, since
        a store serves it in its exact context only.
    upper_bound: tokens behind the prefix that lie in any window of w tokens which an earlier
        request in scope had at any offset: what no chunks of w tokens or more can pass. (Shorter
        chunks can, by what they find in pieces shorter than w.)
    chunks: number of chunks the prompt was cut into.
    cut_elsewhere: of the new tokens, those in such a window: seen before, and in no chunk that was.
    """

    session: str
    timestamp: float
    kinds: np.ndarray
    upper_bound: int
    chunks: int
    cut_elsewhere: int

    def causes(self) -> dict[str, int]:
        """Why tokens could not be reused, by `lmc.store.causes.CAUSES`: cause -> tokens."""
        found = self.tokens()
        return {
            "repeated_within": found["repeated_within"],
            "cut_elsewhere": self.cut_elsewhere,
            "never_seen": found["new"] - self.cut_elsewhere,
        }

    def tokens(self) -> dict[str, int]:
        """Tokens of each kind; they add up to T."""
        return dict(zip(KINDS, np.bincount(self.kinds, minlength=4).tolist(), strict=True))


def analyse(
    requests: Iterable[Request],
    chunker: Chunker | Sliding,
    *,
    scope: Scope = "session",
    window: int = 64,
    spans: bool = False,
) -> Iterator[RequestReuse]:
    """What each request shares with the ones before it in its session, or in the whole trace.

    Args:
        requests: with token ids, in order of arrival.
        chunker: cuts prompts.
        window: w, tokens, of the upper bound.
        spans: the segments of a request are chunks, as of a client that says where its documents
            are, and `chunker` cuts what lies between.

    Raises:
        ValueError: a request without token ids, or a window below 1.
    """
    if window < 1:
        raise ValueError(f"got window {window}, want at least 1 token")
    if scope not in ("session", "trace"):
        raise ValueError(f"got scope {scope!r}, want session or trace")
    seen: dict[str, _Seen] = {}
    for r in requests:
        if r.tokens is None:
            raise ValueError(
                "the trace has no token ids: reuse at other positions shows in text "
                "(chat, sharegpt) or token ids (tokens) alone"
            )
        earlier = seen.setdefault(r.session if scope == "session" else "", _Seen())
        marked = [(start, end) for _, start, end in r.segments] if spans else None
        yield _analyse_one(r, chunker, marked, window, earlier)


@dataclass
class _Seen:
    """All that earlier requests in scope had."""

    prefixes: PrefixTree = field(default_factory=lambda: PrefixTree())
    chunks: set[bytes] = field(default_factory=set)
    grid: WindowSet = field(default_factory=WindowSet)
    windows: WindowSet = field(default_factory=WindowSet)


def _analyse_one(
    r: Request,
    chunker: Chunker | Sliding,
    spans: Sequence[tuple[int, int]] | None,
    window: int,
    seen: _Seen,
) -> RequestReuse:
    tokens = r.tokens
    assert tokens is not None
    prefix = seen.prefixes.add(tokens)
    if isinstance(chunker, Sliding):
        kinds, chunks = _by_grid(tokens, chunker.n, prefix, seen.grid)
    else:
        kinds, chunks = _by_chunk(tokens, chunker, spans, seen.chunks)
    kinds[:prefix] = PREFIX
    hashes = window_hashes(tokens, window)
    reachable = covered(seen.windows.known(hashes), window, len(tokens))
    seen.windows.add(hashes)
    return RequestReuse(
        session=r.session,
        timestamp=r.timestamp,
        kinds=kinds,
        upper_bound=int(reachable[prefix:].sum()),
        chunks=chunks,
        cut_elsewhere=int((reachable & (kinds == NEW)).sum()),
    )


def _by_chunk(
    tokens: np.ndarray,
    chunker: Chunker,
    spans: Sequence[tuple[int, int]] | None,
    earlier: set[bytes],
) -> tuple[np.ndarray, int]:
    """Kinds [T] as if there were no prefix, and the number of chunks; adds to `earlier`."""
    kinds = np.full(len(tokens), NEW, dtype=np.uint8)
    here: set[bytes] = set()
    pieces = split(tokens, chunker, spans)
    for piece in pieces:
        if not piece.closed:
            continue
        key = chunk_key(b"", tokens[piece.start : piece.end])
        if key in earlier:
            kinds[piece.start : piece.end] = MOVED
        elif key in here:
            kinds[piece.start : piece.end] = REPEATED_WITHIN
        here.add(key)
    earlier |= here
    return kinds, len(pieces)


def _by_grid(tokens: np.ndarray, n: int, prefix: int, earlier: WindowSet) -> tuple[np.ndarray, int]:
    """The same for `Sliding`."""
    hashes = window_hashes(tokens, n)
    grid = hashes[::n]
    known = earlier.known(hashes)
    # A window repeats one of this prompt's own grid when that one ends before it starts.
    own, first = np.unique(grid, return_index=True)
    place = np.searchsorted(own, hashes).clip(max=max(len(own) - 1, 0))
    repeats = own[place] == hashes if len(own) else np.zeros(0, dtype=bool)
    repeats[repeats] = (first[place[repeats]] + 1) * n <= np.flatnonzero(repeats)
    kinds = np.full(len(tokens), NEW, dtype=np.uint8)
    kinds[covered(repeats, n, len(tokens))] = REPEATED_WITHIN
    for start in greedy(known, prefix, n):
        kinds[start : start + n] = MOVED
    earlier.add(grid)
    return kinds, -(-len(tokens) // n)


class PrefixTree:
    """Prompts as a radix tree, so that what they share in front is kept, and compared, once."""

    def __init__(self) -> None:
        self._root: dict[int, _Edge] = {}

    def add(self, tokens: np.ndarray) -> int:
        """Put a prompt [T] in; its longest common prefix with any prompt put in before."""
        children, at = self._root, 0
        while at < len(tokens):
            edge = children.get(int(tokens[at]))
            if edge is None:
                children[int(tokens[at])] = _Edge(tokens[at:].copy(), {})
                return at
            n = _common(edge.tokens, tokens[at:])
            at += n
            if n < len(edge.tokens):
                rest = _Edge(edge.tokens[n:], edge.children)
                edge.tokens, edge.children = edge.tokens[:n], {int(rest.tokens[0]): rest}
                if at < len(tokens):
                    edge.children[int(tokens[at])] = _Edge(tokens[at:].copy(), {})
                return at
            children = edge.children
        return at


@dataclass(eq=False)
class _Edge:
    tokens: np.ndarray
    children: dict[int, _Edge]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    first = int(different.argmax()) if n else 0
    return first if n and different[first] else n
