"""What a trace can have of each kind of reuse, at every capacity, in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmc.chunking import Chunker
from lmc.chunking.pieces import chunk_key, context_digests, split
from lmc.sim.stack import NEVER, Curve, hit_curve, prefix_distances, stack_distances
from lmc.sim.sweep import curve_rows
from lmc.sim.trace import Accesses, Request


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of R requests, A in all, as a store without contexts looks them up.

    keys: [A] int64, one for each content, numbered by first appearance; a tail, which no cut has
        ended, is found behind the same tokens alone, and its key is of all of them.
    tokens: [A] int64 of each piece.
    repeats: [A] bool, whether an earlier piece of the same request has the key.
    context: [A] int64, one number for each text from the prompt's start to the piece's end.
    offsets: [R + 1], as in `Accesses`.
    """

    keys: np.ndarray
    tokens: np.ndarray
    repeats: np.ndarray
    context: np.ndarray
    offsets: np.ndarray


def pieces_of(requests: Iterable[Request], chunker: Chunker, *, spans: bool = False) -> Pieces:
    """Cut requests, in order of arrival; spans: their segments are chunks.

    Raises ValueError for a request without token ids.
    """
    names: dict[bytes, int] = {}
    places: dict[bytes, int] = {}
    keys: list[int] = []
    tokens: list[int] = []
    repeats: list[bool] = []
    context: list[int] = []
    offsets = [0]
    for r in requests:
        if r.tokens is None:
            raise ValueError("reuse at other positions shows in text or token ids alone")
        cut = split(r.tokens, chunker, [(a, b) for _, a, b in r.segments] if spans else None)
        here: set[int] = set()
        for piece, before in zip(cut, context_digests(r.tokens, [p.end for p in cut]), strict=True):
            # In a namespace, or a chunk's key could be the digest of a text that begins with id 0.
            content = chunk_key(b"content", r.tokens[piece.start : piece.end])
            name = content if piece.closed else before
            key = names.setdefault(name, len(names))
            keys.append(key)
            tokens.append(piece.end - piece.start)
            repeats.append(key in here)
            context.append(places.setdefault(before, len(places)))
            here.add(key)
        offsets.append(len(keys))
    return Pieces(
        np.array(keys, np.int64), np.array(tokens, np.int64), np.array(repeats, bool),
        np.array(context, np.int64), np.array(offsets, np.int64),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Reach:
    """Tokens that are found, as shares of all prompt tokens, at every capacity in bytes.

    Where there is a cache of the engine's own in front, these are what is found beyond it.

    engine: found in the engine's own cache; 0 where none is in front.
    prefix: of a cache that finds blocks behind the very same tokens alone, as vLLM's.
    anywhere: of a store that finds chunks at any position, each content kept once; exact: the part
        of it that is found behind the same tokens. None where the trace has no token ids.
    """

    prefix: Curve
    anywhere: Curve | None
    exact: Curve | None
    tokens: int
    engine: float = 0.0

    @property
    def moved(self) -> float:
        """What such a store of any size finds behind other text alone."""
        if self.anywhere is None or self.exact is None:
            return 0.0
        return self.anywhere.infinite - self.exact.infinite

    @property
    def more(self) -> float:
        """What it finds beyond the prefix cache of any size: moved text, and ends of blocks."""
        return 0.0 if self.anywhere is None else self.anywhere.infinite - self.prefix.infinite


def _owners(offsets: np.ndarray) -> np.ndarray:
    """[A] of what `offsets` [R + 1] divide: the request of each."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def moved_distances(pieces: Pieces, bytes_per_token: int) -> tuple[np.ndarray, np.ndarray]:
    """([A], [A]) int64: the smallest capacity in bytes at which each piece is found, and at which
    it is found behind the same tokens, with all before it; `NEVER` where it is at none.

    LRU of contents, each kept once, whatever it stood behind. A request is looked up as a whole
    before any of it is put in. So a piece that its own prompt repeats is found as the first one is.
    """
    first = ~pieces.repeats
    owner = _owners(pieces.offsets)
    counts = np.bincount(owner[first], minlength=len(pieces.offsets) - 1)
    offsets = np.concatenate(([0], np.cumsum(counts)))
    sizes = pieces.tokens * bytes_per_token
    alone = stack_distances(pieces.keys[first], sizes[first], offsets)
    # Each repeat takes what the first piece of its key in the request has.
    pair = owner * (int(pieces.keys.max(initial=0)) + 1) + pieces.keys
    order = np.argsort(pair[first], kind="stable")
    found = alone[order[np.searchsorted(pair[first], pair, sorter=order)]]
    _, at, back = np.unique(pieces.context, return_index=True, return_inverse=True)
    seen = owner > owner[at[back]]  # an earlier request had the same text up to here
    exact = prefix_distances(np.where(seen, found, NEVER), pieces.offsets)
    return found, exact


def reach(
    requests: Sequence[Request], accesses: Accesses, bytes_per_token: int,
    chunker: Chunker | None = None, *, spans: bool = False, engine_bytes: int = 0,
) -> Reach:  # fmt: skip
    """The curves of a trace.

    Args:
        requests: in order of arrival.
        accesses: to the blocks of a prefix cache.
        bytes_per_token: of KV.
        chunker: cuts token ids for the store; None where there are none.
        engine_bytes: of the engine's own cache, which finds prefixes and is asked first. What is
            computed or found goes into both.

    Raises ValueError for a chunker and requests without token ids.
    """
    full = accesses.full_blocks() if accesses.block_tokens else accesses
    sizes = full.tokens * bytes_per_token
    behind = prefix_distances(stack_distances(full.keys, sizes), full.offsets)
    total = int(accesses.input_tokens.sum())
    held = behind <= engine_bytes
    owner = _owners(full.offsets)
    # Tokens from each prompt's start that the engine has itself.
    front = np.bincount(owner[held], full.tokens[held], len(full.offsets) - 1).astype(np.int64)
    engine = float(front.sum()) / max(total, 1)
    beyond = np.where(held, 0, full.tokens).astype(float)
    prefix = hit_curve(behind, beyond, float(total))
    if chunker is None:
        return Reach(prefix, None, None, total, engine)
    pieces = pieces_of(requests, chunker, spans=spans)
    ends = np.cumsum(pieces.tokens)
    of = _owners(pieces.offsets)
    first = np.concatenate(([0], ends))[pieces.offsets[:-1]][of]  # of the request, in all tokens
    weights = np.minimum(pieces.tokens, np.maximum(0, ends - first - front[of])).astype(float)
    found, exact = moved_distances(pieces, bytes_per_token)
    anywhere = hit_curve(found, weights, float(total))
    return Reach(prefix, anywhere, hit_curve(exact, weights, float(total)), total, engine)


def store_rows(
    requests: Sequence[Request], chunker: Chunker, bytes_per_token: int, *, spans: bool = False
) -> tuple[Curve, list[dict[str, Any]]]:
    """A store of contents under LRU at all capacities, in one pass: its curve, and rows.

    As `lmc.sim.sweep.lru_rows`, in bytes; a row has the shares `exact` and `moved`, too. It counts
    what is held, while the metric store of `store_sweep` has the planner decide whether it pays to
    use it, and keeps a content in several contexts.

    Raises ValueError for a request without token ids.
    """
    pieces = pieces_of(requests, chunker, spans=spans)
    total = int(pieces.tokens.sum())
    if not total:
        raise ValueError("the trace has no tokens")
    weights = pieces.tokens.astype(float)
    found, exact = (
        hit_curve(distances, weights, float(total))
        for distances in moved_distances(pieces, bytes_per_token)
    )
    smallest = int(pieces.tokens.min()) * bytes_per_token
    rows = curve_rows(found, total, smallest, unit="bytes", metric="store")
    for row in rows:
        at = math.inf if row["capacity"] == "inf" else row["capacity"]
        row["exact"] = exact.infinite if math.isinf(at) else float(exact.at([int(at)])[0])
        row["moved"] = row["hit_rate"] - row["exact"]
    return found, rows
