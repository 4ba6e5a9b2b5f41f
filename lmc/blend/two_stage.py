"""lmc's own strategy: boundary rows, then what the question looks at, then what is wrong of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmc.blend.evidence import (
    Deviation,
    Importance,
    Need,
    Outline,
    Seen,
    positions,
    probe_row_layers,
    top,
)
from lmc.blend.query import Layers, layers_of
from lmc.blend.strategy import NOTHING, Strategy

# What was tried, and what it gave, is in docs/strategies.md.
CHECK = 2  # the layer behind which the second stage chooses


@dataclass(frozen=True)
class TwoStage(Strategy):
    """Rows chosen in two stages within a budget that everything counts towards.

    1. The first rows of every moved run, in all layers: encoded alone they are attention sinks,
       and behind real text they are not (EPIC, arXiv 2410.15332).
    2. A probe tells which rows the question's attention falls on (InfoFlow, arXiv 2603.05353).
       `wide` times as many as there will be room for run through layers 0 to 2.
    3. Of these go on the ones with the largest attention times deviation of V (CacheBlend, arXiv
       2405.16444): a row that is looked at and still right need not be computed, and one that is
       wrong and not looked at does no harm.

    Attributes:
        compute: row-layers of the whole prompt, over T * L: new rows, probe and both stages
            included. Where new rows and boundaries take more, they are all there is.
        link_tokens: boundary rows per run.
        layers: of the probe: `all`, the `middle` third, the last n, or a list.
        wide: how many rows the second stage chooses from for each one it takes.

    Raises:
        ValueError: `compute` outside (0, 1], a negative `link_tokens`, `wide` outside [1, 1e6].
    """

    compute: float = 0.1
    link_tokens: int = 4
    layers: Layers = "middle"
    wide: float = 3.0

    knob: ClassVar[str | None] = "compute"

    def __post_init__(self) -> None:
        if not 0 < self.compute <= 1:
            raise ValueError(f"compute must be above 0 and at most 1, got {self.compute}")
        if self.link_tokens < 0:
            raise ValueError(f"link_tokens must be at least 0, got {self.link_tokens}")
        if not 1 <= self.wide <= 1e6:
            raise ValueError(f"wide must be from 1 to 1,000,000, got {self.wide}")

    def needs(self, outline: Outline) -> tuple[Need, ...]:
        if self._taken(outline)[1] == 0:
            return ()  # without room for a row there is nothing to ask
        return (self._importance(outline), self._deviation(outline))

    def counts(self, outline: Outline) -> list[int]:
        first, second = self._taken(outline)
        boundary = len(self._boundary(outline))
        check = self._deviation(outline).layer
        return [boundary + (first if layer <= check else second) for layer in range(outline.L)]

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        boundary = self._boundary(outline)
        first, second = self._taken(outline)
        if second == 0:
            return boundary
        looked_at = seen[self._importance(outline)]
        rows = np.setdiff1d(outline.candidates, boundary)
        rows = top(looked_at, rows, first)
        deviation = self._deviation(outline)
        if layer > deviation.layer:
            rows = top(looked_at * seen[deviation], rows, second)
        return np.union1d(boundary, rows)

    def _boundary(self, outline: Outline) -> np.ndarray:
        return positions([(a, min(a + self.link_tokens, b)) for a, b in outline.moved])

    def _taken(self, outline: Outline) -> tuple[int, int]:
        """How many rows the first and the second stage take."""
        L, check = outline.L, self._deviation(outline).layer
        boundary = len(self._boundary(outline))
        probe = probe_row_layers((self._importance(outline),), outline)
        spent = (outline.new + boundary) * L + probe
        left = self.compute * outline.T * L - spent
        most = outline.n - boundary
        second = int(left / (L + (self.wide - 1) * (check + 1)))
        first = int(self.wide * second)
        if first > most:  # all of them run to the check, and more go on
            first = most
            second = min(most, int((left - most * (check + 1)) / max(1, L - check - 1)))
        return (first, second) if second > 0 else (0, 0)

    def _importance(self, outline: Outline) -> Importance:
        return Importance(layers_of(self.layers, outline.L))

    def _deviation(self, outline: Outline) -> Deviation:
        return Deviation(max(0, min(CHECK, outline.L - 2)))
