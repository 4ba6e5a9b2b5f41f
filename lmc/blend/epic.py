"""EPIC's LegoLink: recompute the first rows of every moved chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmc.blend.strategy import Run, Strategy, positions


@dataclass(frozen=True)
class Epic(Strategy):
    """First `link_tokens` rows of every moved run, in all layers (LegoLink-k).

    The first rows of a chunk that was encoded alone act as attention sinks; computed again
    behind their real context they stop doing so. Hu et al. 2024, arXiv 2410.15332; 32 or
    fewer there. A run of chunks that keep their neighbours has one boundary, not several.

    Attributes:
        link_tokens: rows per run, at least 0.

    Raises:
        ValueError: a negative `link_tokens`.
    """

    link_tokens: int = 16

    def __post_init__(self) -> None:
        if self.link_tokens < 0:
            raise ValueError(f"link_tokens must be at least 0, got {self.link_tokens}")

    def rows(self, moved: Sequence[Run]) -> np.ndarray:
        return positions([(start, min(start + self.link_tokens, end)) for start, end in moved])
