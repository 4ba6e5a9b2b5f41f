"""Strategies that look at nothing: what a clever one must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmc.blend.cacheblend import checked_ratio
from lmc.blend.evidence import Outline, Seen, positions, share
from lmc.blend.strategy import NOTHING, Strategy


@dataclass(frozen=True)
class Random(Strategy):
    """A share of the moved rows by lot; the same ones for the same request and seed.

    Raises:
        ValueError: a ratio outside [0, 1], or a negative seed.
    """

    ratio: float = 0.15
    seed: int = 0

    knob: ClassVar[str | None] = "ratio"

    def __post_init__(self) -> None:
        checked_ratio("ratio", self.ratio)
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        rows = outline.candidates
        rng = np.random.default_rng([self.seed, *(x for run in outline.moved for x in run)])
        return np.sort(rng.choice(rows, share(self.ratio, len(rows)), replace=False))


@dataclass(frozen=True)
class Uniform(Strategy):
    """A share of the moved rows, evenly spaced."""

    ratio: float = 0.15

    knob: ClassVar[str | None] = "ratio"

    def __post_init__(self) -> None:
        checked_ratio("ratio", self.ratio)

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        rows = outline.candidates
        k = share(self.ratio, len(rows))
        return rows[np.arange(k) * len(rows) // max(k, 1)]


@dataclass(frozen=True)
class Tail(Strategy):
    """The last rows of every moved run: as many as EPIC takes, at the other end."""

    rows_per_run: int = 16

    knob: ClassVar[str | None] = "rows_per_run"

    def __post_init__(self) -> None:
        if self.rows_per_run < 0:
            raise ValueError(f"rows_per_run must be at least 0, got {self.rows_per_run}")

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        return positions(
            [(max(start, end - self.rows_per_run), end) for start, end in outline.moved]
        )
