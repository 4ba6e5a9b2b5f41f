"""Rows that the question looks at: what InfoFlow, ProphetKV, QCFuse and A3 have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lmc.blend.cacheblend import checked_ratio
from lmc.blend.evidence import Importance, Need, Outline, Seen, share, top
from lmc.blend.strategy import NOTHING, Strategy

Layers = Literal["all", "middle"] | int | list[int]


def layers_of(layers: Layers, L: int) -> tuple[int, ...]:
    """The layers that a config names: `all`, the `middle` third, the last n, or a list.

    Raises:
        ValueError: none, or one that the model does not have.
    """
    match layers:
        case "all":
            named = list(range(L))
        case "middle":
            named = list(range(L // 3, max(L // 3 + 1, 2 * L // 3)))
        case int(n):
            named = list(range(max(0, L - n), L))
        case _:
            named = sorted(set(layers))
    if not named or not 0 <= named[0] <= named[-1] < L:
        raise ValueError(f"layers: got {layers!r}, want layers of 0 to {L - 1}, at least one")
    return tuple(named)


@dataclass(frozen=True)
class Query(Strategy):
    """The share of the moved rows that the question's attention over reused KV is greatest on.

    A probe, the suffix alone, runs over the reused KV first; its cost is part of the compute
    fraction. With `layers: 2, heads: mean, queries: l2` this is InfoFlow (arXiv 2603.05353),
    with `layers: all, queries: sum` stage 1 of ProphetKV (2602.02579), with a list of profiled
    layers, `heads: max, queries: max` the score of QCFuse (2606.05875), whose probe reads a
    digest of the context where this one reads all of it. A3 (2511.17560) selects like this too.

    Attributes:
        ratio: share of the moved rows.
        layers: `all`, the `middle` third, the last n, or a list.
        heads, queries: how heads, then the asking rows are reduced.
        asking: how many of the last rows of the suffix ask; 0 means all.

    Raises:
        ValueError: a ratio outside [0, 1], or a negative `asking`.
    """

    ratio: float = 0.15
    layers: Layers = "middle"
    heads: Literal["mean", "max"] = "mean"
    queries: Literal["sum", "max", "l2"] = "l2"
    asking: int = 0

    knob: ClassVar[str | None] = "ratio"

    def __post_init__(self) -> None:
        checked_ratio("ratio", self.ratio)
        if self.asking < 0:
            raise ValueError(f"asking must be at least 0, got {self.asking}")

    def needs(self, outline: Outline) -> tuple[Need, ...]:
        return (self._importance(outline),)

    def counts(self, outline: Outline) -> list[int]:
        return [share(self.ratio, outline.n)] * outline.L

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        rows = outline.candidates
        return top(seen[self._importance(outline)], rows, share(self.ratio, len(rows)))

    def _importance(self, outline: Outline) -> Importance:
        layers = layers_of(self.layers, outline.L)
        return Importance(layers, self.heads, self.queries, self.asking)
