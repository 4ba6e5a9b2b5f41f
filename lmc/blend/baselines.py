"""The bounds that every strategy lies between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmc.blend.evidence import Outline, Seen, positions
from lmc.blend.strategy import NOTHING, Strategy


@dataclass(frozen=True)
class Prefix(Strategy):
    """Exact reuse only: prefix caching, out of the same store. Never blends."""

    moves: ClassVar[bool] = False

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        return positions([])


@dataclass(frozen=True)
class FullRecompute(Strategy):
    """Every moved row again: must equal full prefill; it saves nothing and checks everything."""

    control: ClassVar[bool] = True

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        return positions(outline.moved)


@dataclass(frozen=True)
class FullReuse(Strategy):
    """No row again: Block-Attention without its fine-tuning (arXiv 2409.15355).

    Attributes:
        rotate: re-rotate keys to their new position. False leaves them where they were, which
            shows what re-rotation is worth.
    """

    rotate: bool = True

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        return positions([])
