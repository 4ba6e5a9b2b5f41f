"""The selective forward: chosen rows through all layers, against the KV of all rows."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

State = tuple[torch.Tensor, ...]  # per-row tensors [M, ...] that one layer hands to the next


class Adapter(Protocol):
    """What a model must offer for its rows to be recomputed.

    Attributes:
        num_layers: L.
        max_rows: rows that one call may carry, so that activations stay within what the
            engine profiled.
    """

    num_layers: int
    max_rows: int

    def embed(self, rows: np.ndarray) -> State:
        """State of rows `[M]` (ascending positions) before layer 0."""
        ...

    def layer(self, index: int, rows: np.ndarray, state: State) -> State:
        """One layer on rows `[M]`: write their fresh K and V, attend, return their new state.

        Row i attends to every key at a position <= rows[i], and to no other: the mask is by
        absolute position. (The published implementations align it bottom-right, which lets
        selected rows see the future: CacheBlend issue 21, LMCache issue 1152.)
        """
        ...


def selective_forward(adapter: Adapter, rows: np.ndarray) -> State:
    """Compute `rows` `[M]` in every layer and leave their K and V in the engine's cache.

    Layer by layer, and within a layer in slices of at most `max_rows` rows, in order of
    position: a later slice then finds the fresh keys of an earlier one, which never needs
    those of a later one. Between layers the state of all rows stays, whatever the slices.
    """
    slices = [rows[i : i + adapter.max_rows] for i in range(0, len(rows), adapter.max_rows)]
    states = [adapter.embed(part) for part in slices]
    for index in range(adapter.num_layers):
        states = [
            adapter.layer(index, part, state) for part, state in zip(slices, states, strict=True)
        ]
    return tuple(torch.cat(parts) for parts in zip(*states, strict=True))
