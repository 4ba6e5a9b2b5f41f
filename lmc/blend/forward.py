"""The selective forward: chosen rows through the layers, against the KV of all rows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class Step:
    """What a forward asks of the model next: one layer on its rows.

    Attributes:
        index: of the layer.
        rows: `[M]`, at least one. state: theirs. needs: what is to be measured.
    """

    index: int
    rows: np.ndarray
    state: State
    needs: Sequence[Need] = ()


Stepped = tuple[State, list[torch.Tensor]]  # as `Adapter.layer` returns it
Steps = Generator[Step, Stepped, Outcome]


def selective_forward(
    adapter: Adapter,
    forced: np.ndarray,
    strategy: Strategy | None = None,
    outline: Outline | None = None,
    probe_rows: np.ndarray | None = None,
) -> Outcome:
    """Compute rows and leave their K and V in the engine's cache; arguments as `forward_steps`.

    Layer by layer, and within a layer in slices of at most `max_rows` rows, in order of
    position: a later slice then finds the fresh keys of an earlier one, which never needs
    those of a later one. Between layers the state of all rows stays, whatever the slices, so a
    strategy sees every row.
    """

    def layer(steps: dict[int, Step]) -> list[Stepped]:
        def call(steps: list[tuple[int, Step]]) -> list[Stepped]:
            return [adapter.layer(s.index, s.rows, s.state, s.needs) for _, s in steps]

        return in_slices(steps, adapter.max_rows, call)

    steps = forward_steps(adapter, forced, strategy, outline, probe_rows)
    (outcome,) = in_lock_step([steps], layer)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def in_lock_step(
    forwards: Sequence[Steps], layer: Callable[[dict[int, Step]], list[Stepped]]
) -> list[Outcome | Exception]:
    """Run several forwards through the layers together; what each gave, or why it ended.

    Those at the lowest layer go on first, so that all are soon in the same one: where some probe,
    the others wait behind it.

    Args:
        layer: one layer on rows of some forwards, by their index. What it raises ends them all.
    """
    over: dict[int, Outcome | Exception] = {}
    waiting: dict[int, Step] = {}

    def go_on(i: int, stepped: Stepped | None) -> None:
        try:
            # A generator begins with None.
            waiting[i] = forwards[i].send(stepped)  # type: ignore[arg-type]
        except StopIteration as end:
            over[i] = end.value
        except Exception as error:  # of this one alone
            over[i] = error

    for i in range(len(forwards)):
        go_on(i, None)
    while waiting:
        index = min(step.index for step in waiting.values())
        here = {i: step for i, step in waiting.items() if step.index == index}
        stepped = layer(here)
        for i, result in zip(here, stepped, strict=True):
            del waiting[i]
            go_on(i, result)
    return [over[i] for i in range(len(forwards))]


def in_slices(
    steps: dict[int, Step],
    max_rows: int,
    call: Callable[[list[tuple[int, Step]]], list[Stepped]],
) -> list[Stepped]:
    """One layer on the rows of all `steps`, in calls of at most `max_rows` rows."""
    parts: dict[int, list[Stepped]] = {i: [] for i in steps}
    for cut in _cuts(steps, max_rows):
        for (i, _), stepped in zip(cut, call(cut), strict=True):
            parts[i].append(stepped)
    return [_whole(steps[i], part) for i, part in parts.items()]


def forward_steps(
    adapter: Adapter,
    forced: np.ndarray,
    strategy: Strategy | None = None,
    outline: Outline | None = None,
    probe_rows: np.ndarray | None = None,
) -> Steps:
    """A selective forward as a generator: it yields what it wants of a layer, and is sent it.

    The model's layers may so be shared with other forwards.

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
        for index in range(adapter.num_layers if len(rows) else 0):
            state, _ = yield Step(index, rows, state)
        L = adapter.num_layers
        return Outcome(state, [rows] * L, [none] * L)
    needs = strategy.needs(outline)
    seen = {}
    probe = 0
    if asked := [need for need in needs if isinstance(need, Importance)]:
        # Rows that answers are forced into lie behind the prompt; they do not ask.
        rows = forced[forced < outline.T] if probe_rows is None else probe_rows
        found, probe = yield from _probe(adapter, rows, asked)
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
        state, scores = yield Step(index, rows, state, here)
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
) -> Generator[Step, Stepped, tuple[dict[Need, np.ndarray], int]]:
    """Importance `[T]` by need, and the row-layers that it took."""
    last = max(layer for need in needs for layer in need.layers)
    total: dict[Need, torch.Tensor] = {}
    state = _embed(adapter, rows)
    for index in range(last + 1):
        here = [need for need in needs if index in need.layers]
        state, scores = yield Step(index, rows, state, here)
        for need, score in zip(here, scores, strict=True):
            total[need] = total[need] + score if need in total else score
    found: dict[Need, np.ndarray] = {
        need: (adapter.agree(score) / len(need.layers)).float().cpu().numpy()
        for need, score in total.items()
        if isinstance(need, Importance)
    }
    return found, len(rows) * (last + 1)


def _embed(adapter: Adapter, rows: np.ndarray) -> State:
    M, n = len(rows), adapter.max_rows
    return _joined([adapter.embed(rows[i : i + n]) for i in range(0, M, n)])


def _cuts(steps: dict[int, Step], max_rows: int) -> Iterator[list[tuple[int, Step]]]:
    """All rows, `max_rows` at a time: parts of steps, each with the index of its own."""
    cut: list[tuple[int, Step]] = []
    left = max_rows
    for i, step in steps.items():
        done, M = 0, len(step.rows)
        while done < M:
            at = slice(done, done + left)
            part = replace(step, rows=step.rows[at], state=tuple(x[at] for x in step.state))
            cut.append((i, part))
            done, left = done + len(part.rows), left - len(part.rows)
            if left == 0:
                yield cut
                cut, left = [], max_rows
    if cut:
        yield cut


def _whole(step: Step, parts: list[Stepped]) -> Stepped:
    scores = [[found[i] for _, found in parts] for i in range(len(step.needs))]
    merged = [_merged(need, found) for need, found in zip(step.needs, scores, strict=True)]
    return _joined([state for state, _ in parts]), merged


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
