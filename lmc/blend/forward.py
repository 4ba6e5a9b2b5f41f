"""The selective forward: chosen rows through the layers, against the KV of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from lmc.blend.evidence import Deviation, Importance, Need, Outline
from lmc.blend.strategy import Strategy

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

    def layer(
        self, index: int, rows: np.ndarray, state: State, needs: Sequence[Need] = ()
    ) -> tuple[State, list[torch.Tensor]]:
        """One layer on rows `[M]`: write their fresh K and V, attend, return their new state.

        Row i attends to every key at a position <= rows[i], and to no other: the mask is by
        absolute position. (The published implementations align it bottom-right, which lets
        selected rows see the future: CacheBlend issue 21, LMCache issue 1152.)

        Returns:
            The state, and for each of `needs` its fp32 scores: of a deviation `[M]`, taken
            before the fresh rows are written; of an importance `[T]`, by the asking rows.
        """
        ...

    def read(self, index: int, rows: np.ndarray) -> torch.Tensor:
        """K and V `[1, 2, M, G, D]` of rows in one layer, as they are now."""
        ...

    def write(self, index: int, rows: np.ndarray, kv: torch.Tensor) -> None:
        """Put K and V `[1, 2, M, G, D]` of rows into one layer."""
        ...

    def agree(self, scores: torch.Tensor) -> torch.Tensor:
        """The same scores on every rank that holds part of the heads."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a selective forward did.

    Attributes:
        state: of the rows that went through all layers.
        rows: by layer, all rows it computed there, the forced ones included.
        selected: by layer, those of them that the strategy chose.
        probe: row-layers that the probe computed.
    """

    state: State
    rows: list[np.ndarray]
    selected: list[np.ndarray]
    probe: int = 0


def selective_forward(
    adapter: Adapter,
    forced: np.ndarray,
    strategy: Strategy | None = None,
    outline: Outline | None = None,
    probe_rows: np.ndarray | None = None,
) -> Outcome:
    """Compute rows and leave their K and V in the engine's cache.

    Layer by layer, and within a layer in slices of at most `max_rows` rows, in order of
    position: a later slice then finds the fresh keys of an earlier one, which never needs
    those of a later one. Between layers the state of all rows stays, whatever the slices, so a
    strategy sees every row.

    Args:
        forced: `[M]` ascending positions that all layers compute.
        strategy: chooses further rows of `outline.moved`, layer by layer.
        outline: the request; needed with a strategy.
        probe_rows: ascending positions that a probe runs, where the suffix is not forced because
            the engine computes it; by default those of `forced` that lie in the prompt.

    Raises:
        ValueError: a strategy that takes up rows again which it had dropped.
    """
    none = np.empty(0, np.int64)
    if strategy is None or outline is None:
        rows, state = forced, _embed(adapter, forced)
        for index in range(adapter.num_layers):
            state, _ = _layer(adapter, index, rows, state, [])
        L = adapter.num_layers
        return Outcome(state, [rows] * L, [none] * L)
    needs = strategy.needs(outline)
    seen = {}
    probe = 0
    if asked := [need for need in needs if isinstance(need, Importance)]:
        # Rows that answers are forced into lie behind the prompt; they do not ask.
        rows = forced[forced < outline.T] if probe_rows is None else probe_rows
        found, probe = _probe(adapter, rows, asked)
        seen.update(found)
    chosen = strategy.rows(outline, 0, seen)
    rows = np.union1d(forced, chosen)
    state = _embed(adapter, rows) if len(rows) else ()
    by_layer, selected = [], []
    for index in range(adapter.num_layers):
        by_layer.append(rows)
        selected.append(chosen)
        if len(rows) == 0:
            continue
        here = [n for n in needs if isinstance(n, Deviation) and n.layer == index]
        undo = bool(here) and strategy.written == "selected"
        before = adapter.read(index, rows) if undo else None
        state, scores = _layer(adapter, index, rows, state, here)
        for need, score in zip(here, scores, strict=True):
            spread = np.zeros(outline.T, np.float32)
            known = rows < outline.T
            spread[rows[known]] = adapter.agree(score).cpu().numpy()[known]
            seen[need] = spread
        if index + 1 == adapter.num_layers:
            break
        kept = strategy.rows(outline, index + 1, seen)
        if len(again := np.setdiff1d(kept, chosen)):
            raise ValueError(
                f"{type(strategy).__name__} takes up {len(again)} rows in layer {index + 1} that "
                f"layer {index} left out, first {again[0]}; allowed: rows of the layer before"
            )
        chosen = kept
        on = np.union1d(forced, chosen)
        if len(on) < len(rows):
            going = np.isin(rows, on)
            if before is not None:
                at = torch.from_numpy(np.flatnonzero(~going))
                adapter.write(index, rows[~going], before[:, :, at.to(before.device)])
            at = torch.from_numpy(np.flatnonzero(going))
            state = tuple(part[at.to(part.device)] for part in state)
            rows = on
    return Outcome(state, by_layer, selected, probe)


def _probe(
    adapter: Adapter, rows: np.ndarray, needs: list[Importance]
) -> tuple[dict[Need, np.ndarray], int]:
    """Importance `[T]` by need, and the row-layers that it took."""
    last = max(layer for need in needs for layer in need.layers)
    total: dict[Need, torch.Tensor] = {}
    state = _embed(adapter, rows)
    for index in range(last + 1):
        here = [need for need in needs if index in need.layers]
        state, scores = _layer(adapter, index, rows, state, here)
        for need, score in zip(here, scores, strict=True):
            total[need] = total[need] + score if need in total else score
    found: dict[Need, np.ndarray] = {
        need: (adapter.agree(score) / len(need.layers)).float().cpu().numpy()
        for need, score in total.items()
        if isinstance(need, Importance)
    }
    return found, len(rows) * (last + 1)


def _slices(adapter: Adapter, rows: np.ndarray) -> list[slice]:
    return [slice(i, i + adapter.max_rows) for i in range(0, len(rows), adapter.max_rows)]


def _embed(adapter: Adapter, rows: np.ndarray) -> State:
    parts = [adapter.embed(rows[s]) for s in _slices(adapter, rows)]
    return _joined(parts)


def _layer(
    adapter: Adapter, index: int, rows: np.ndarray, state: State, needs: Sequence[Need]
) -> tuple[State, list[torch.Tensor]]:
    states, scores = [], []
    for s in _slices(adapter, rows):
        part, found = adapter.layer(index, rows[s], tuple(x[s] for x in state), needs)
        states.append(part)
        scores.append(found)
    merged = [_merged(need, [found[i] for found in scores]) for i, need in enumerate(needs)]
    return _joined(states), merged


def _merged(need: Need, parts: list[torch.Tensor]) -> torch.Tensor:
    """Scores of all slices: rows of a deviation follow each other, askers of an importance add."""
    if isinstance(need, Deviation):
        return torch.cat(parts)
    stacked = torch.stack(parts)
    match need.queries:
        case "sum":
            return stacked.sum(0)
        case "max":
            return stacked.amax(0)
        case "l2":
            return stacked.square().sum(0).sqrt()


def _joined(parts: list[State]) -> State:
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
