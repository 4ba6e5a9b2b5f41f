"""What computing costs: FLOPs of prefill, by row and by key attended to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lmc.model.layers import Layer


@dataclass(frozen=True)
class PrefillCost:
    """FLOPs of one row through all layers: `linear + attention · keys`.

    Attributes:
        linear: FLOPs of the projections and the MLP, per row.
        attention: FLOPs of QK and PV, per row and key attended to in all layers.
        layers: which say how many keys a row attends to; none: all up to itself.
    """

    linear: float
    attention: float
    layers: tuple[Layer, ...] = ()

    def fraction(self, computed: Sequence[tuple[int, int, float]], T: int) -> float:
        """Share of the FLOPs of a full prefill of T tokens that runs of rows cost.

        computed: `(start, end, share)`: rows `[start, end)`, of whose layers a share is computed.
        """
        start, end, share = np.array(computed, np.float64).reshape(-1, 3).T
        return float((share * self.flops(start, end)).sum() / self.flops(0, T))

    def flops(self, start: Any, end: Any) -> Any:
        """FLOPs of rows `[start, end)`, ints or arrays of them; each attends to itself too."""
        return self.linear * (end - start) + self.attention * (self._keys(end) - self._keys(start))

    def of_layer(self, index: int, rows: np.ndarray, L: int) -> float:
        """FLOPs of rows at positions `[M]` in one of L layers, alike but for keys."""
        first = self.layers[index].first_key(rows) if self.layers else 0
        keys = int((rows + 1 - first).sum())
        return (self.linear * len(rows) + self.attention * keys) / L

    @cached_property
    def _kinds(self) -> list[tuple[Layer, float]]:
        """What layers let rows see, and the share of layers that do: this is asked per request."""
        kinds = Counter((layer.kind, layer.window) for layer in self.layers or (Layer("full"),))
        return [(Layer(*kind), n / kinds.total()) for kind, n in kinds.items()]

    def _keys(self, n: Any) -> Any:
        """Keys that rows 0..n - 1 attend to, all together, in a layer: the mean over layers."""
        return sum(layer.keys_seen(n) * share for layer, share in self._kinds)
