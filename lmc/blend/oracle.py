"""The upper bound of choosing rows by deviation: it knows the truth, at the price of a prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lmc.blend.cacheblend import checked_ratio
from lmc.blend.evidence import Run, positions
from lmc.blend.strategy import Strategy


@dataclass(frozen=True)
class OracleDeviation(Strategy):
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

    dense: ClassVar[bool] = True
    knob: ClassVar[str | None] = "ratio"

    def __post_init__(self) -> None:
        checked_ratio("ratio", self.ratio)

    def rows(self, moved: Sequence[Run]) -> np.ndarray:
        return positions([])
