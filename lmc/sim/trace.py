"""A trace: what is known of each request, and its accesses to blocks as arrays."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmc.chunking import Chunker
from lmc.chunking.fixed import Fixed
from lmc.chunking.pieces import chunk_key, context_digests, split


@dataclass(frozen=True, eq=False)
class Request:
    """One request, as far as its trace says.

    timestamp: arrival, in seconds from any origin.
    session: the conversation it belongs to; "" where the trace does not say.
    input_tokens, output_tokens: lengths.
    blocks: ids of the prompt's blocks of `block_tokens` tokens, the last of them partial perhaps.
        An id stands for a block *behind all blocks before it* (prefix-chained), so such a trace
        can show prefix reuse only. None where the trace has no ids.
    tokens: token ids [T] int32 of the prompt, T = input_tokens, or None.
    segments: `(name, start, end)` of the parts of `tokens` that are known (messages, documents),
        for people to look at.
    """

    timestamp: float
    session: str
    input_tokens: int
    output_tokens: int
    blocks: Sequence[Hashable] | None = None
    block_tokens: int = 0
    tokens: np.ndarray | None = None
    segments: Sequence[tuple[str, int, int]] = ()


@dataclass(frozen=True, eq=False)
class Accesses:
    """The blocks (or chunks) that R requests look up, A accesses to U keys in all, in order.

    keys: [A] int64 in `[0, U)`, numbered by first appearance.
    tokens: [A] int64, tokens of the block; the last one of a prompt may be partial.
    offsets: [R + 1] int64; request i makes accesses `[offsets[i], offsets[i + 1])`.
    timestamps: [R] float64 seconds, ascending.
    input_tokens, output_tokens: [R] int64.
    block_tokens: tokens of a full block; 0 where blocks are chunks of any length.
    """

    keys: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    timestamps: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    block_tokens: int

    @property
    def unique(self) -> int:
        """U, the number of different keys."""
        return int(self.keys.max()) + 1 if len(self.keys) else 0

    @property
    def requests(self) -> int:
        """R."""
        return len(self.offsets) - 1

    def full_blocks(self) -> Accesses:
        """The same without blocks of fewer than `block_tokens` tokens, which engines do not keep.

        Raises ValueError where blocks have no one length.
        """
        if not self.block_tokens:
            raise ValueError("the trace is cut into chunks of any length, so no block is partial")
        full = self.tokens == self.block_tokens
        before = np.concatenate([[0], np.cumsum(full)])
        _, keys = np.unique(self.keys[full], return_inverse=True)
        return replace(self, keys=keys, tokens=self.tokens[full], offsets=before[self.offsets])

    def next_use(self) -> np.ndarray:
        """[A] float64: the index of the next access to the same key, `inf` for none."""
        order = np.argsort(self.keys, kind="stable")
        following = np.full(len(order), np.inf)
        same = self.keys[order[:-1]] == self.keys[order[1:]]
        following[order[:-1][same]] = order[1:][same]
        return following

    def starts(self) -> np.ndarray:
        """[A] int64: the position in its prompt at which each block starts."""
        before = np.cumsum(self.tokens) - self.tokens
        # A request's first access has position 0; one without accesses has none to correct.
        first = np.repeat(self.offsets[:-1], np.diff(self.offsets))
        return before - before[first] if len(before) else before


def accesses(
    requests: Iterable[Request], chunker: Chunker | None = None, *, context: bool = True
) -> Accesses:
    """Number the blocks of requests; those that give token ids are cut by `chunker`.

    Args:
        requests: in any order; they are replayed in order of arrival.
        chunker: for requests with `tokens`. Their last run, which no cut has ended, is a block
            of its own.
        context: a chunk's key covers all tokens before it, as in prefix caching. False: its own
            tokens alone, so that it is found at any position.

    Raises:
        ValueError: no requests; requests that give lengths only, or token ids where no chunker
            is given; block lengths that differ.
    """
    rows = sorted(requests, key=lambda r: r.timestamp)
    if not rows:
        raise ValueError("the trace has no requests")
    numbers: dict[Hashable, int] = {}
    keys: list[int] = []
    tokens: list[int] = []
    offsets = [0]
    for r in rows:
        for name, length in _blocks(r, chunker, context):
            keys.append(numbers.setdefault(name, len(numbers)))
            tokens.append(length)
        offsets.append(len(keys))
    sizes = {r.block_tokens for r in rows if r.blocks is not None}
    if len(sizes) > 1:
        raise ValueError(f"got blocks of {sorted(sizes)} tokens in one trace, want one length")
    return Accesses(
        keys=np.array(keys, dtype=np.int64),
        tokens=np.array(tokens, dtype=np.int64),
        offsets=np.array(offsets, dtype=np.int64),
        timestamps=np.array([r.timestamp for r in rows]),
        input_tokens=np.array([r.input_tokens for r in rows], dtype=np.int64),
        output_tokens=np.array([r.output_tokens for r in rows], dtype=np.int64),
        block_tokens=sizes.pop() if sizes else (chunker.n if isinstance(chunker, Fixed) else 0),
    )


def _blocks(r: Request, chunker: Chunker | None, context: bool) -> Iterator[tuple[Hashable, int]]:
    """(what names it, tokens) of each block of one request."""
    if r.blocks is not None:
        for i, block in enumerate(r.blocks):
            yield block, min(r.block_tokens, r.input_tokens - i * r.block_tokens)
    elif r.tokens is None:
        raise ValueError(
            "the trace gives lengths only, so nothing in it can be found again; "
            "hit rates need block ids (hash_ids), token ids or text"
        )
    elif chunker is None:
        raise ValueError("the trace gives token ids: say how to cut them (chunker)")
    else:
        pieces = split(r.tokens, chunker)
        digests = context_digests(r.tokens, [p.end for p in pieces]) if context else []
        for i, p in enumerate(pieces):
            name = digests[i] if context else chunk_key(b"", r.tokens[p.start : p.end])
            yield name, p.end - p.start
