"""CacheBlend: recompute the rows whose fresh KV is farthest from the reused one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lmc.blend.evidence import Deviation, Need, Outline, Seen, share, top
from lmc.blend.strategy import NOTHING, Strategy


def checked_ratio(name: str, ratio: float) -> None:
    """Raise ValueError unless a ratio lies in [0, 1]."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {ratio}")


@dataclass(frozen=True)
class CacheBlend(Strategy):
    """All moved rows up to a check layer; from there on those that deviate most.

    Yao et al. 2024, arXiv 2405.16444. The released code has one check layer, layer 1, and takes
    16% by squares of V. The paper describes a gradual filter instead: give a list of ratios,
    one for the check layer and for each layer behind it.

    Attributes:
        ratio: share of the moved rows that go on, or a list that does not grow.
        tensor: whose deviation counts. norm: how it is measured.
        check_layer: the layer behind which rows are first dropped.
        write: whether dropped rows keep their fresh K and V in the layers that dropped them
            (`all`, as CacheBlend does) or get the reused ones back (`selected`, as LMCache does).
        causal: `bottom_right` is the mask of both published implementations, which lets rows see
            the future; an ablation, for the Hugging Face connector only.

    Raises:
        ValueError: a ratio outside [0, 1] or growing, or a negative layer.
    """

    ratio: float | list[float] = 0.15
    tensor: Literal["k", "v", "both"] = "v"
    norm: Literal["l1", "squared", "cosine"] = "squared"
    check_layer: int = 1
    write: Literal["all", "selected"] = "all"
    causal: Literal["position", "bottom_right"] = "position"

    knob: ClassVar[str | None] = "ratio"

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            checked_ratio("ratio", ratio)
        if not self.ratios or any(
            b > a for a, b in zip(self.ratios, self.ratios[1:], strict=False)
        ):
            raise ValueError(f"ratio must be one number or a list that falls, got {self.ratio}")
        if self.check_layer < 0:
            raise ValueError(f"check_layer must be at least 0, got {self.check_layer}")

    @property
    def ratios(self) -> list[float]:
        """By check layer, what goes on."""
        return self.ratio if isinstance(self.ratio, list) else [self.ratio]

    @property
    def written(self) -> Literal["all", "selected"]:
        return self.write

    @property
    def mask(self) -> Literal["position", "bottom_right"]:
        return self.causal

    def needs(self, outline: Outline) -> tuple[Need, ...]:
        return tuple(
            Deviation(self.check_layer + i, self.tensor, self.norm)
            for i in range(len(self.ratios))
            if self.check_layer + i < outline.L
        )

    def counts(self, outline: Outline) -> list[int]:
        n = outline.n
        kept = [share(ratio, n) for ratio in self.ratios]
        before = [n] * min(self.check_layer + 1, outline.L)
        after = [kept[min(i, len(kept) - 1)] for i in range(outline.L - len(before))]
        return before + after

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        rows = outline.candidates
        n = len(rows)
        for need, ratio in zip(self.needs(outline), self.ratios, strict=False):
            assert isinstance(need, Deviation)
            if need.layer >= layer:
                break
            rows = top(seen[need], rows, share(ratio, n))
        return rows
