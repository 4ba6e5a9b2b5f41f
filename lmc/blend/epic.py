"""Recompute the beginning of every moved chunk: its first rows, or its first page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmc.blend.evidence import Outline, Seen, positions
from lmc.blend.strategy import NOTHING, Strategy


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

    knob: ClassVar[str | None] = "link_tokens"

    def __post_init__(self) -> None:
        if self.link_tokens < 0:
            raise ValueError(f"link_tokens must be at least 0, got {self.link_tokens}")

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        return positions(
            [(start, min(start + self.link_tokens, end)) for start, end in outline.moved]
        )


@dataclass(frozen=True)
class Block(Strategy):
    """The page in which every moved run begins, so that all its other pages stay as they were.

    MEPIC, arXiv 2512.16822, where chunks begin with a page: then it is the first `page` rows.

    Attributes:
        page: P, tokens of a page.

    Raises:
        ValueError: a page of less than one token.
    """

    page: int = 16

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ValueError(f"page must be at least 1, got {self.page}")

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        return positions(
            [
                (start, min((start // self.page + 1) * self.page, end))
                for start, end in outline.moved
            ]
        )
