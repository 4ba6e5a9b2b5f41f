"""Cache-Craft: each chunk gets as many rows again as its old context and its new one differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from lmc.blend.dense import Attended, Chunks, Dense, alone
from lmc.blend.evidence import Outline, Seen, positions, share, top
from lmc.blend.plan import Plan
from lmc.blend.strategy import NOTHING


@dataclass(frozen=True)
class CacheCraft(Dense):
    """The rows of a chunk that looked most at other chunks, as many as those are missing now.

    Agarwal et al. 2025, arXiv 2502.15734. Of a stored chunk C, `a` is the attention a token pair
    of C and of each chunk before it shares on average, summed over those chunks, and `b` the
    same within C. `impact = sigmoid(a / b)` says how much C depends on its context. `beta` is the
    share of the attention C paid to chunks that stand before it now too, `gamma` the share of
    pairs of these whose order is reversed, `overlap = beta (1 - gamma)`. Of its tokens
    `overhead = alpha * impact * (1 - overlap)` are computed again, at most all. Of several
    stored variants the one with the least overhead is taken.

    Meant for `context: first_seen`. The system prompt, which stands before every chunk alike, is
    no chunk: its first token takes most of the attention and would hide the rest. A chunk that
    had no other in front (isolated, anchored, or the first) thus paid no attention, so `a` is 0
    and nothing overlaps: half of it times `alpha` is computed again, from its beginning.

    Attributes:
        alpha: rows for each unit of overhead; trades quality for compute.

    Raises:
        ValueError: a negative `alpha`.
    """

    alpha: float = 1.0

    knob: ClassVar[str | None] = "alpha"

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha}")

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        """Rows of chunks that all had no other in front."""
        runs = ((start, self.rows_of(alone(end - start), ())) for start, end in outline.moved)
        return np.concatenate([positions([]), *(start + offsets for start, offsets in runs)])

    def replan(self, plan: Plan, chunks: Chunks) -> Plan:
        """With the variant of each moved chunk that needs the fewest rows, and those rows."""
        found, again = [], [positions([])]
        for part in plan.found:
            if part.kind == "moved":
                before = chunks.before(part.at)
                known = [(r, chunks.attended(r)) for r in chunks.variants(part)]
                record, attended = min(known, key=lambda x: self.overhead(x[1], before))
                part = part._replace(record=record)
                rows = part.at + self.rows_of(attended, before)
                again.append(rows[(rows >= part.start) & (rows < part.end)])
            found.append(part)
        chosen = np.concatenate(again)
        rows = np.union1d(np.setdiff1d(plan.rows, plan.chosen), chosen)
        return replace(plan, found=tuple(found), rows=rows, chosen=chosen)

    def overhead(self, chunk: Attended, before: Sequence[bytes]) -> float:
        """Share of a stored chunk that must be computed again behind the chunks `before`."""
        T = len(chunk.tokens)
        a = sum(x / (T * n) for x, n in zip(chunk.inter, chunk.lengths, strict=True))
        b = max(chunk.intra / T**2, 1e-30)  # the attention of a chunk to itself may underflow
        impact = 1 / (1 + math.exp(-a / b))
        return min(1.0, self.alpha * impact * (1 - overlap(chunk, before)))

    def rows_of(self, chunk: Attended, before: Sequence[bytes]) -> np.ndarray:
        """Ascending offsets in a chunk, int64, of the rows to compute again."""
        T = len(chunk.tokens)
        return top(chunk.tokens, np.arange(T), share(self.overhead(chunk, before), T))


def overlap(chunk: Attended, before: Sequence[bytes]) -> float:
    """How much of a stored chunk's context stands before it again, 0 to 1.

    The attention-weighted share of its chunks that do, less a penalty for their order: the share
    of pairs that are reversed (Kendall's tau distance).
    """
    total = sum(chunk.inter)
    if not total:
        return 0.0
    place = {key: i for i, key in reversed(list(enumerate(before)))}
    known = [(place[key], x) for key, x in zip(chunk.before, chunk.inter, strict=True)
             if key in place]  # fmt: skip
    order = list(dict.fromkeys(i for i, _ in known))
    pairs = len(order) * (len(order) - 1) // 2
    reversed_pairs = sum(x > y for i, x in enumerate(order) for y in order[i + 1 :])
    beta = sum(x for _, x in known) / total
    return beta * (1 - (reversed_pairs / pairs if pairs else 0.0))
