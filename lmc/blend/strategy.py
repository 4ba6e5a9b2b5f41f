"""What a blending strategy is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lmc.blend.evidence import Need, Outline, Run, Seen


@dataclass(frozen=True)
class Strategy:
    """Answers which rows of the moved runs are recomputed, from layer 0 through the last.

    Cache misses, the suffix after the last reused token and the last token are computed
    whatever it says. Fields of a subclass are its config keys; `name` is its registry name.

    Class attributes:
        moves: false when chunks are used in their exact context only.
        control: true when it runs even though it saves nothing, because it exists to check
            the machinery against full prefill.
        dense: true when it needs more than a paged engine offers, so that only the
            Hugging Face connector runs it.
        knob: the field that trades quality for compute, if there is one.
    """

    moves: ClassVar[bool] = True
    control: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    knob: ClassVar[str | None] = None

    @property
    def rotate(self) -> bool:
        """Whether keys are rotated to their new position; false is an ablation."""
        return True

    @property
    def mask(self) -> Literal["position", "bottom_right"]:
        """How rows are kept from the future; `bottom_right` is an ablation and lets them see it."""
        return "position"

    def rows(self, moved: Sequence[Run]) -> np.ndarray:
        """Rows to recompute.

        Args:
            moved: ascending runs `[start, end)` of moved tokens; chunks that followed each
                other when they were stored, and do again, are one run.

        Returns:
            Ascending positions, int64, each inside one of the runs.
        """
        raise NotImplementedError

    def needs(self, outline: Outline) -> tuple[Need, ...]:
        """What must be measured for `rows_at`; nothing, unless the strategy is `Selective`."""
        return ()

    def counts(self, outline: Outline) -> list[int]:
        """How many rows `rows_at` gives in each of the L layers, before anything is measured."""
        return [len(self.rows(outline.moved))] * outline.L

    def rows_at(self, layer: int, outline: Outline, seen: Seen) -> np.ndarray:
        """Rows of the moved runs that `layer` computes; a subset of those of the layer before.

        A pure function: the same evidence gives the same rows, so every layer's rows can be
        asked for again.

        Args:
            layer: 0 to L - 1.
            outline: the request.
            seen: what has been measured: importance from layer 0 on, a layer's deviation
                behind it.

        Returns:
            Ascending positions, int64.
        """
        return self.rows(outline.moved)


@dataclass(frozen=True)
class Selective(Strategy):
    """A strategy that chooses rows by what it sees while the request runs.

    A subclass defines `needs`, `counts` and `rows_at`; how many rows it takes must not depend
    on what it sees, so that a scheduler can weigh the request before.
    """

    @property
    def written(self) -> Literal["all", "selected"]:
        """Whose fresh K and V stay in a layer whose deviation was measured: those of all rows
        computed there, or only of those that go on."""
        return "all"

    def rows(self, moved: Sequence[Run]) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} chooses rows layer by layer: see rows_at")
