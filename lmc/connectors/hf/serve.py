"""One request on a Hugging Face model: reuse, blend, and what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch

from lmc.blend.dense import Dense
from lmc.blend.encoding import Position
from lmc.blend.forward import Outcome
from lmc.blend.plan import Plan
from lmc.blend.strategy import Strategy
from lmc.connectors.hf.adapter import HFAdapter, Pages
from lmc.connectors.hf.model import HFModel
from lmc.connectors.hf.store import HFStore
from lmc.kernels.scatter import scatter


@dataclass(frozen=True)
class Blended:
    """A blended prompt.

    Attributes:
        plan: what became of each token.
        outcome: which rows each layer computed before the suffix.
        logits: for each answer, `[n, V]` fp32 of the prompt's last token and of the answer's
            tokens but its last; of an empty answer, `[1, V]`.
        pages: K and V of all rows; behind the prompt those of the last answer.
        compute_fraction: row-layers computed, probe and check layers included, over T * L.
        flops_fraction: the same in FLOPs: late rows attend to more keys.
        outputs: attention outputs `[L, n, H * D]` of the rows that have logits, of the first
            answer, if recorded.
        answer: the most likely tokens behind the prompt, if asked for.
    """

    plan: Plan
    outcome: Outcome
    logits: list[torch.Tensor]
    pages: Pages
    compute_fraction: float
    flops_fraction: float
    outputs: torch.Tensor | None = None
    answer: list[int] = field(default_factory=list)

    @property
    def selection(self) -> list[list[int]]:
        """Positions that the strategy chose, by layer: what `replay` takes."""
        chosen = [np.union1d(rows, self.plan.chosen) for rows in self.outcome.selected]
        return [rows.tolist() for rows in chosen]


def run_blend(
    store: HFStore,
    tokens: Sequence[int],
    spans: Sequence[tuple[int, int]],
    strategy: Strategy,
    *,
    position: Position = "global",
    answers: Sequence[Sequence[int]] = ((),),
    truth: Pages | None = None,
    record: bool = False,
    generate: int = 0,
) -> Blended:
    """Serve a prompt out of `store`, and force answers behind it, or generate one.

    Args:
        tokens: `[T]`. spans: where its chunks are.
        position: `global`: chunks are rotated to where they stand. `local`: all moved chunks
            begin at one position, and what follows stands behind the longest.
        answers: each forced behind the prompt on its own; they count as no compute of it.
        truth: K and V of full prefill, for a strategy that needs them; made when missing, and
            for `local`, where keys stand elsewhere.
        record: keep attention outputs.
        generate: tokens to decode greedily behind the prompt.

    Raises:
        ValueError: an unknown position policy.
    """
    if position not in get_args(Position):
        raise ValueError(f"position: got {position!r}, valid: {', '.join(get_args(Position))}")
    model = store.model
    T = len(tokens)
    plan = store.plan(tokens, spans, strategy)
    n = T + max(generate, *(len(answer) for answer in answers))
    at = positions_of(plan, spans, n) if position == "local" else None
    pages = model.pages(n)
    _load(store, plan, pages, at)
    dense = strategy if isinstance(strategy, Dense) else Dense()
    if dense.needs_truth and (truth is None or at is not None):
        truth = model.prefill(np.asarray(tokens, np.int64), at).pages
    dense.loaded(plan, pages, truth)
    extra = 1.0 if dense.needs_truth else 0.0  # a full prefill
    options: dict[str, Any] = {
        "positions": at,
        "outline": plan.outline,
        "mask": strategy.mask,
        "attention": dense.attention(plan),
    }

    def adapter_for(answer: Sequence[int]) -> HFAdapter:
        ids = np.array([*tokens, *answer], np.int64)
        return model.adapter(ids, pages, **options)

    suffix = np.arange(plan.end, T)
    asking = np.concatenate([plan.rows, suffix])
    blended = strategy if plan.selective else None
    outcome = model.run(adapter_for(()), plan.rows, blended, plan.outline, asking)
    # As in an engine: the suffix comes behind the claim, in a forward of its own.
    logits: list[torch.Tensor] = []
    outputs = None
    for answer in answers:
        adapter = adapter_for(answer)
        # The last token of an answer is only predicted.
        behind = np.arange(T, T + max(0, len(answer) - 1))
        rows = behind if logits else np.concatenate([suffix, behind])
        adapter.outputs = [] if record and not logits else None
        parts = [logits[0][:1]] if logits else []
        if len(rows):
            hidden = model.run(adapter, rows).state[0]
            parts.append(model.logits(hidden if logits else hidden[T - 1 - plan.end :]))
        if adapter.outputs:
            outputs = torch.stack(adapter.outputs)[:, T - 1 - plan.end :]
        logits.append(torch.cat(parts))
    answer = model.greedy(np.asarray(tokens), logits[0][0], pages, generate, **options)
    compute, flops = _fractions(model, plan, outcome, asking)
    return Blended(plan, outcome, logits, pages, compute + extra, flops + extra, outputs, answer)


def positions_of(plan: Plan, spans: Sequence[tuple[int, int]], n: int) -> np.ndarray:
    """RoPE positions `[n]` when all moved chunks begin where the first of them does."""
    at = np.arange(n)
    if not plan.moved:
        return at
    first, last = plan.moved[0][0], plan.moved[-1][1]
    longest = 0
    inside = [(start, end) for start, end in spans if start < last and end > first]
    for start, end in inside:
        at[start:end] = first + np.arange(end - start)
        longest = max(longest, end - start)
    behind = inside[-1][1]
    at[behind:] = first + longest + np.arange(n - behind)
    return at


def _load(store: HFStore, plan: Plan, pages: Pages, at: np.ndarray | None) -> None:
    device = pages.buffer.device
    rotations = store.model.rotations
    alike = [
        (slice(low, high), pages.all.some(low, high), which)
        for low, high, which in rotations.runs()
    ]
    for s in plan.found:
        chunk = store.chunk(s.record.slot)[:, :, s.start - s.at : s.end - s.at]
        delta = s.delta if at is None else int(at[s.at]) - s.record.start
        slots = torch.arange(s.start, s.end, device=device)
        chunk = chunk.to(device).contiguous()
        if not delta or not plan.strategy.rotate:
            scatter(chunk, pages.all, slots)
            continue
        cos, sin = (torch.from_numpy(x).to(device) for x in rotations.angles(delta))
        for layers, some, which in alike:
            angles = () if which < 0 else (cos[which], sin[which])
            scatter(chunk[layers], some, slots, *angles, interleaved=rotations.interleaved)


def _fractions(
    model: HFModel, plan: Plan, outcome: Outcome, asking: np.ndarray
) -> tuple[float, float]:
    """Row-layers, and FLOPs, over those of a full prefill."""
    T, L, cost = plan.T, model.L, model.shape.cost
    passes = [*outcome.rows, *[np.arange(plan.end, T)] * L]
    passes += [asking] * (outcome.probe // max(1, len(asking)))
    row_layers = sum(len(rows) for rows in passes)
    # Each pass goes through the layers from the first one on.
    flops = sum(cost.of_layer(i % L, rows, L) for i, rows in enumerate(passes))
    return row_layers / (T * L), flops / cost.flops(0, T)
