"""What a strategy can be told about a request: before it runs, and while it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Run = tuple[int, int]  # token positions [start, end)


@dataclass(frozen=True)
class Outline:
    """A request as a strategy sees it before anything is computed.

    Attributes:
        L: layers. T: tokens of the prompt.
        end: the first token behind the last reused one; `[end, T)` is the suffix, which asks.
        moved: ascending runs `[start, end)` of moved tokens; chunks that followed each other
            when they were stored, and do again, are one run.
        new: rows that are computed whatever the strategy says: cache misses and the suffix.
    """

    L: int
    T: int
    end: int
    moved: tuple[Run, ...]
    new: int

    @property
    def candidates(self) -> np.ndarray:
        """Positions of all moved tokens, ascending, int64."""
        return positions(self.moved)

    @property
    def n(self) -> int:
        """How many moved tokens there are."""
        return sum(end - start for start, end in self.moved)


@dataclass(frozen=True)
class Deviation:
    """How far fresh K, V or both are from the reused ones, in one layer, of rows computed there.

    CacheBlend, arXiv 2405.16444; its code takes squares of V, LMCache's squares of K behind
    RoPE, and UCM's absolute differences of K.
    """

    layer: int
    tensor: Literal["k", "v", "both"] = "v"
    norm: Literal["l1", "squared", "cosine"] = "squared"


@dataclass(frozen=True)
class Importance:
    """Attention that the question pays each token over reused KV, mean over layers.

    A probe finds it out: the suffix and the cache misses run through the layers up to the last
    one named, before the rows do. InfoFlow, arXiv 2603.05353; ProphetKV, 2602.02579; QCFuse,
    2606.05875; A3, 2511.17560.

    Attributes:
        layers: whose attention counts, ascending.
        heads: how heads are reduced. queries: how the asking rows are, after the heads.
        asking: how many of the last rows of the suffix ask; 0 means all of them.
    """

    layers: tuple[int, ...]
    heads: Literal["mean", "max"] = "mean"
    queries: Literal["sum", "max", "l2"] = "l2"
    asking: int = 0

    def first_asking(self, outline: Outline) -> int:
        """The first row that asks; all behind it do."""
        return max(outline.end, outline.T - self.asking) if self.asking else outline.end


Need = Deviation | Importance
# Scores [T] fp32 by need; of rows that were not looked at they are 0.
Seen = Mapping[Need, np.ndarray]


def positions(runs: Sequence[Run] | np.ndarray) -> np.ndarray:
    """The positions of ascending runs, int64; of an empty one none."""
    starts, ends = bounds(runs)
    lengths = np.maximum(ends - starts, 0)
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(starts - before, lengths)


def bounds(runs: Sequence[Run] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs start and where they end, int64 each."""
    both = np.array(runs, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def runs_of(rows: np.ndarray, borders: np.ndarray | None = None) -> list[Run]:
    """The maximal runs of ascending positions `[M]`; the inverse of `positions`.

    borders: ascending positions at which a new run begins in any case.
    """
    if len(rows) == 0:
        return []
    new = np.diff(rows) != 1
    if borders is not None:
        new |= np.isin(rows[1:], borders)
    breaks = np.flatnonzero(new)
    starts = rows[np.concatenate([[0], breaks + 1])]
    ends = rows[np.concatenate([breaks, [len(rows) - 1]])] + 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def inside(rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many of ascending rows `[M]` lie in each of the runs `[starts, ends)`."""
    return np.searchsorted(rows, ends) - np.searchsorted(rows, starts)


def without(runs: tuple[Run, ...], rows: np.ndarray) -> tuple[Run, ...]:
    """The runs less some rows, each rest of a run a run of its own."""
    if not len(rows):
        return runs
    kept = np.setdiff1d(positions(runs), rows, assume_unique=True)
    return tuple(runs_of(kept, bounds(runs)[0]))


def probe_row_layers(needs: tuple[Need, ...], outline: Outline) -> int:
    """Row-layers that a probe for these needs computes: the new rows, up to the last layer."""
    layers = [layer for need in needs if isinstance(need, Importance) for layer in need.layers]
    return outline.new * (max(layers) + 1) if layers else 0


def share(ratio: float, n: int) -> int:
    """How many of n rows a ratio stands for: rounded up, so that a ratio above 0 keeps one."""
    # A ratio such as 0.15 is a little more or less than that in binary.
    return min(n, int(np.ceil(ratio * n - 1e-9)))


def top(scores: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The k of `rows` with the greatest `scores[row]`, ascending; of equals the earlier ones."""
    order = np.argsort(-scores[rows], kind="stable")
    return np.sort(rows[order[:k]])
