"""What computing costs: FLOPs of prefill, by row and by key attended to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PrefillCost:
    """FLOPs of one row through all layers: `linear + attention · keys`.

    Attributes:
        linear: FLOPs of the projections and the MLP, per row.
        attention: FLOPs of QK and PV, per row and key attended to.
    """

    linear: float
    attention: float

    def fraction(self, computed: Sequence[tuple[int, int, float]], T: int) -> float:
        """Share of the FLOPs of a full prefill of T tokens that runs of rows cost.

        computed: `(start, end, share)`: rows `[start, end)`, of whose layers a share is computed.
        """
        start, end, share = np.array(computed, np.float64).reshape(-1, 3).T
        keys = (end * (end + 1) - start * (start + 1)) / 2
        flops = self.linear * (end - start) + self.attention * keys
        return float((share * flops).sum()) / self.flops(0, T)

    def flops(self, start: int, end: int) -> float:
        """FLOPs of rows `[start, end)`, each of which attends to itself and all before it."""
        # A row at position p attends to p + 1 keys; the sum over rows is closed form.
        keys = (end * (end + 1) - start * (start + 1)) / 2
        return self.linear * (end - start) + self.attention * keys
