"""What a blending strategy is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lmc.blend.evidence import Need, Outline, Seen

NOTHING: Seen = {}


@dataclass(frozen=True)
class Strategy:
    """Answers which rows of the moved runs are recomputed.

    Cache misses, the suffix after the last reused token and the last token are computed
    whatever it says. Fields of a subclass are its config keys; `name` is its registry name.

    A subclass defines `rows`. One whose choice depends on the layer defines `counts` too, and one
    whose choice depends on what is measured while the request runs both `counts` and `needs`: how
    many rows it takes must not depend on what it sees, so that a scheduler can weigh the request.

    Class attributes:
        moves: false when chunks are used in their exact context only.
        control: true when it runs even though it saves nothing, because it exists to check
            the machinery against full prefill.
        dense: true when it needs more than a paged engine offers, so that only the
            Hugging Face connector runs it (`lmc.blend.dense`).
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

    @property
    def written(self) -> Literal["all", "selected"]:
        """Whose fresh K and V stay in a layer whose deviation was measured: those of all rows
        computed there, or only of those that go on."""
        return "all"

    @property
    def selective(self) -> bool:
        """Whether rows are asked for layer by layer, while the request runs; else once, before.

        So where a subclass says that they differ by layer (`counts`) or by what is measured
        (`needs`).
        """
        cls = type(self)
        return cls.needs is not Strategy.needs or cls.counts is not Strategy.counts

    def needs(self, outline: Outline) -> tuple[Need, ...]:
        """What must be measured for `rows`."""
        return ()

    def counts(self, outline: Outline) -> list[int]:
        """How many rows `rows` gives in each of the L layers, before anything is measured."""
        return [len(self.rows(outline))] * outline.L

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        """Rows of the moved runs that `layer` computes; a subset of those of the layer before.

        A pure function: the same evidence gives the same rows, so every layer's rows can be
        asked for again, on every rank and in another engine.

        Args:
            outline: the request; `outline.moved` are the runs of moved tokens.
            layer: 0 to L - 1.
            seen: what has been measured: importance from layer 0 on, a layer's deviation
                behind it.

        Returns:
            Ascending positions, int64, each inside one of the runs.
        """
        raise NotImplementedError
