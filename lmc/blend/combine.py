"""Strategies made of others, and one that repeats a selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from lmc.blend.evidence import Need, Outline, Seen
from lmc.blend.strategy import NOTHING, Strategy


@dataclass(frozen=True)
class Union(Strategy):
    """The rows of either of two strategies, in every layer.

    Attributes:
        first, second: their names, or names and fields, as `blend` itself takes them.

    Raises:
        ValueError: a strategy that does not exist, or that cannot be joined (a control, an
            ablation, one that moves nothing).
    """

    first: str | dict[str, Any] = "epic"
    second: str | dict[str, Any] = "query"

    def __post_init__(self) -> None:
        from lmc.blend import STRATEGIES

        parts = tuple(STRATEGIES.build(getattr(self, name)) for name in ("first", "second"))
        object.__setattr__(self, "_parts", parts)  # frozen, and no field of the config
        for name, part in zip(("first", "second"), parts, strict=True):
            if part.control or part.dense or not part.moves or not part.rotate:
                raise ValueError(f"{name}: {getattr(self, name)!r} cannot be joined with another")
            if part.mask != "position":
                raise ValueError(f"{name}: {getattr(self, name)!r} is an ablation of the mask")

    @property
    def parts(self) -> tuple[Strategy, Strategy]:
        """Both strategies."""
        parts: tuple[Strategy, Strategy] = self._parts  # type: ignore[attr-defined]
        return parts

    @property
    def written(self) -> Literal["all", "selected"]:
        careful = any(p.written == "selected" for p in self.parts)
        return "selected" if careful else "all"

    def needs(self, outline: Outline) -> tuple[Need, ...]:
        first, second = (part.needs(outline) for part in self.parts)
        return (*first, *(need for need in second if need not in first))

    def counts(self, outline: Outline) -> list[int]:
        """At most: rows that both choose are counted twice here, and computed once."""
        first, second = (part.counts(outline) for part in self.parts)
        n = outline.n
        return [min(n, a + b) for a, b in zip(first, second, strict=True)]

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        first, second = (part.rows(outline, layer, seen) for part in self.parts)
        return np.union1d(first, second)


@dataclass(frozen=True)
class Replay(Strategy):
    """Rows that were chosen before: engines are compared on one selection, since near-ties flip.

    Attributes:
        by_layer: positions, ascending, of each layer; the last entry holds for all layers behind.

    Raises:
        ValueError: no entry, a layer with rows that the one before it left out, or what is no
            position.
    """

    by_layer: list[list[int]]

    control: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.by_layer:
            raise ValueError("by_layer: got no layer, want at least one list of positions")
        if not all(0 <= row < 2**63 for rows in self.by_layer for row in rows):
            raise ValueError("by_layer: got a position below 0 or beyond 64 bits")
        for i, (before, after) in enumerate(zip(self.by_layer, self.by_layer[1:], strict=False)):
            if not set(after) <= set(before):
                raise ValueError(f"by_layer: layer {i + 1} has rows that layer {i} left out")

    def counts(self, outline: Outline) -> list[int]:
        return [len(self.rows(outline, layer)) for layer in range(outline.L)]

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        rows = np.array(self.by_layer[min(layer, len(self.by_layer) - 1)], np.int64)
        return np.intersect1d(rows, outline.candidates)
