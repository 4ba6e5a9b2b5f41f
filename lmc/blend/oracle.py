"""The upper bound of choosing rows by deviation: it knows the truth, at the price of a prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lmc.blend.cacheblend import checked_ratio
from lmc.blend.dense import Dense, Pages
from lmc.blend.evidence import Outline, Seen, positions, share, top
from lmc.blend.plan import Plan
from lmc.blend.strategy import NOTHING


@dataclass(frozen=True)
class OracleDeviation(Dense):
    """In every layer, the rows that are farthest from full prefill get full prefill's K and V.

    What CacheBlend (arXiv 2405.16444) would do if its check layer told it about every layer,
    and recomputed rows came out right. It costs a full prefill, and is reported so.

    Attributes:
        ratio: share of the moved rows, in each layer.
        tensor: whose distance counts, by squares.

    Raises:
        ValueError: a ratio outside [0, 1].
    """

    ratio: float = 0.15
    tensor: Literal["k", "v", "both"] = "both"

    needs_truth: ClassVar[bool] = True
    knob: ClassVar[str | None] = "ratio"

    def __post_init__(self) -> None:
        checked_ratio("ratio", self.ratio)

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        return positions([])

    def loaded(self, plan: Plan, pages: Pages, truth: Pages | None) -> None:
        import torch

        from lmc.kernels.deviation import deviation
        from lmc.kernels.scatter import scatter

        assert truth is not None
        rows = plan.outline.candidates
        right = truth.rows(0, plan.T)
        slots = torch.from_numpy(rows).to(right.device)
        for layer, paged in enumerate(pages.layers):
            k, v = right[layer, 0, slots], right[layer, -1, slots]
            scores = np.zeros(plan.T, np.float32)
            scores[rows] = deviation(k, v, paged, slots, tensor=self.tensor).cpu().numpy()
            worst = torch.from_numpy(top(scores, rows, share(self.ratio, len(rows))))
            worst = worst.to(slots.device)
            kv = paged.fresh(right[layer, 0, worst], right[layer, -1, worst])
            scatter(kv, paged, worst)
