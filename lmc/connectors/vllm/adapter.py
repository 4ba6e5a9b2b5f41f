"""vLLM's own modules as an adapter of the selective forward, for several requests at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import set_forward_context

from lmc.blend.evidence import Importance, Need, Outline
from lmc.blend.forward import (
    Outcome,
    State,
    Step,
    Stepped,
    Steps,
    forward_steps,
    in_lock_step,
    in_slices,
)
from lmc.blend.strategy import Strategy
from lmc.connectors.vllm.attention import PagedAttention
from lmc.connectors.vllm.decoders import Decoder
from lmc.connectors.vllm.layouts import Blocks
from lmc.connectors.vllm.lora import Loras
from lmc.connectors.vllm.rows import Current, Measure, Rows
from lmc.connectors.vllm.windows import Windows
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedKV
from lmc.kernels.scatter import scatter


class VLLMAdapter:
    """One request's rows through vLLM's decoder layers.

    QKV projections, q/k norm, RoPE, MLP, quantisation and tensor-parallel reductions are the
    modules' own; only attention is told where the rows are.

    Args:
        decoder: the model's layers.
        tokens: `[T]` token ids, as far as rows are computed.
        blocks: the request's block ids, in order, by KV cache group.
        max_rows: rows that one call of a layer may carry.
        before: called with a layer's index before its pages are looked at.
        loras, lora: the worker's adapters, if it may have any, and the request's, or 0.
        windows: what rows see in layers of which vLLM has no pages for all that they see.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: PagedAttention,
        tokens: np.ndarray,
        blocks: Sequence[Blocks],
        max_rows: int,
        vllm_config: Any,
        before: Callable[[int], None] = lambda layer: None,
        loras: Loras | None = None,
        lora: int = 0,
        windows: Windows | None = None,
    ) -> None:
        self.decoder = decoder
        self.num_layers = len(decoder.layers)
        self.max_rows = max_rows
        self.attention, self.vllm_config = attention, vllm_config
        # An array, since every layer reads of it.
        self.tokens, self.blocks = tokens, [np.asarray(of, np.int64) for of in blocks]
        self.windows = windows
        self._before = before
        self.loras, self.lora = loras, lora
        self.outline: Outline | None = None

    @property
    def reach(self) -> int:
        """How far the blocks reach."""
        return len(self.blocks[0]) * self.attention.block_size

    def before(self, index: int) -> None:
        """Have a layer's pages hold what its rows see."""
        self._before(index)
        if self.windows is not None:
            self.windows.fill(index)

    def embed(self, rows: np.ndarray) -> State:
        ids = torch.from_numpy(self.tokens[rows]).to(self.attention.device)
        if self.loras is not None:
            self.loras.rows([(self.lora, len(rows))])
        return (self.decoder.embed(ids),)

    def layer(
        self, index: int, rows: np.ndarray, state: State, needs: Sequence[Need] = ()
    ) -> Stepped:
        self.before(index)
        with _installed([self], len(rows)) as layers:
            (stepped,) = layers({0: Step(index, rows, state, needs)})
        return stepped

    def read(self, index: int, rows: np.ndarray) -> torch.Tensor:
        self.before(index)
        pages, blocks = self._seen(index) or self._own(index)
        return gather(pages, self.attention.page_slots(rows, blocks))

    def write(self, index: int, rows: np.ndarray, kv: torch.Tensor) -> None:
        for pages, blocks in filter(None, (self._seen(index), self._own(index))):
            scatter(kv, pages, self.attention.page_slots(rows, blocks))

    def _own(self, index: int) -> tuple[PagedKV, Blocks]:
        """vLLM's pages of a layer, and the request's among them."""
        group = self.attention.groups.of[index]
        return self.attention.pages(self.decoder.layers[index]), self.blocks[group]

    def _seen(self, index: int) -> tuple[PagedKV, Blocks] | None:
        """The same of the pages that rows attend in, where those are others."""
        groups = self.attention.groups
        if self.windows is None or not groups.window(groups.of[index]):
            return None
        return self.windows.scratch.place.pages, self.windows.blocks

    def agree(self, scores: torch.Tensor) -> torch.Tensor:
        # The sum over ranks; the same bits on each, whatever order a reduction adds in.
        group = get_tp_group()
        return group.broadcast(group.all_reduce(scores.clone()))

    def run(
        self, forced: np.ndarray, strategy: Strategy | None = None, outline: Outline | None = None
    ) -> Outcome:
        """One forward alone; arguments as `Forward` has them."""
        (outcome,) = run_together([Forward(self, forced, strategy, outline)])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    @torch.inference_mode()
    def measure(
        self, rows: np.ndarray, needs: Sequence[Need], outline: Outline
    ) -> list[torch.Tensor]:
        """Scores of `rows` in layer 0, over the heads of all ranks."""
        self.outline = outline
        _, scores = self.layer(0, rows, self.embed(rows), needs)
        return [self.agree(score) for score in scores]


@dataclass(frozen=True, eq=False)
class Forward:
    """Rows of one request that are to be computed; their KV stays in the request's blocks.

    A probe runs the suffix too, as far as the blocks reach: its KV there is the engine's to
    write afterwards. Where they do not reach its end, the last rows within reach ask.

    Attributes:
        adapter: of the request.
        forced: ascending positions `[M]`.
        strategy, outline: what chooses further rows, if anything does, and what it sees.
    """

    adapter: VLLMAdapter
    forced: np.ndarray
    strategy: Strategy | None = None
    outline: Outline | None = None

    def steps(self) -> Steps:
        """What is asked of the layers, each when all of the request that it needs is in place."""
        adapter, outline, probe_rows = self.adapter, None, None
        if self.strategy is not None and self.outline is not None:
            reach = min(self.outline.T, adapter.reach)
            outline = adapter.outline = replace(self.outline, T=reach)
            probe_rows = np.union1d(self.forced, np.arange(outline.end, reach))
        steps = forward_steps(adapter, self.forced, self.strategy, outline, probe_rows)
        stepped: Any = None
        while True:
            try:
                step = steps.send(stepped)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            adapter.before(step.index)
            stepped = yield step


@torch.inference_mode()
def run_together(forwards: Sequence[Forward]) -> list[Outcome | Exception]:
    """Compute rows of several requests in one pass of the layers; what became of each.

    All are of one model. One that fails by itself, for want of a chunk or by its strategy, leaves
    the others to go on.

    Raises:
        Exception: whatever a layer raises, for nobody knows then whose rows it was.
    """
    if not forwards:
        return []
    M = sum(most_rows(f.forced, f.strategy, f.outline) for f in forwards)
    with _installed([f.adapter for f in forwards], M) as layers:
        return in_lock_step([f.steps() for f in forwards], layers)


def most_rows(forced: np.ndarray, strategy: Strategy | None, outline: Outline | None) -> int:
    """How many rows of a request go through a layer at most: chosen ones too, or the suffix."""
    if strategy is None or outline is None:
        return len(forced)
    return len(forced) + max(*strategy.counts(outline), outline.T - outline.end)


@contextmanager
def _installed(adapters: Sequence[VLLMAdapter], rows: int) -> Iterator[_Layers]:
    """The layers of the adapters' model, while their attention is lmc's; at most so many rows."""
    one, layers = adapters[0], _Layers(adapters)
    # A context of its own, since layers such as MoE read the number of tokens from it.
    context = set_forward_context(None, one.vllm_config, num_tokens=min(rows, one.max_rows))
    lent = nullcontext() if one.loras is None else one.loras.borrowed()
    with context, lent, one.attention.installed(layers.current):
        yield layers


class _Layers:
    """The decoder layers of one model, on rows of several requests.

    Args:
        adapters: of the requests.
    """

    def __init__(self, adapters: Sequence[VLLMAdapter]) -> None:
        self.current = Current()
        self._adapters, self._one = adapters, adapters[0]
        # By KV cache group: the layer it was made in, and rows by what they are made of.
        self._prepared: dict[int, tuple[int, dict[tuple[Any, ...], Rows]]] = {}

    def __call__(self, steps: dict[int, Step]) -> list[Stepped]:
        """One layer on the rows of some requests, by their index among the adapters."""
        return in_slices(steps, self._one.max_rows, self._call)

    def _call(self, steps: list[tuple[int, Step]]) -> list[Stepped]:
        index = steps[0][1].index
        rows = self.current.rows = self._rows(index, steps)
        measures = [Measure(step.needs, self._adapters[i].outline) for i, step in steps]
        self.current.measures = measures
        if self._one.loras is not None:
            self._one.loras.rows([(self._adapters[i].lora, len(s.rows)) for i, s in steps])
        states = [step.state for _, step in steps]
        joined = states[0] if len(states) == 1 else tuple(map(torch.cat, zip(*states, strict=True)))
        after = self._one.decoder.layer(index, rows.where, joined)
        return [
            (
                tuple(of_rows[part.at] for of_rows in after),
                [_of_all_heads(need, measure.scores[need]) for need in measure.needs],
            )
            for part, measure in zip(rows.parts, measures, strict=True)
        ]

    def _rows(self, index: int, steps: list[tuple[int, Step]]) -> Rows:
        """What depends on rows alone; the same in every layer until a strategy drops some."""
        attention = self._one.attention
        group, key = attention.groups.of[index], tuple((i, s.rows.tobytes()) for i, s in steps)
        made_in, known = self._prepared.get(group, (index, {}))
        if key not in known:
            if index != made_in:
                known = {}
            self._prepared[group] = index, known
            own = [(step.rows, self._adapters[i].blocks[group]) for i, step in steps]
            windows = [self._adapters[i].windows for i, _ in steps]
            if attention.groups.window(group) and windows[0] is not None:
                seen = [(s.rows, w.blocks) for (_, s), w in zip(steps, windows, strict=True) if w]
                place, kept = windows[0].scratch.place, [blocks for _, blocks in own]
                known[key] = attention.prepare(seen, group, place, kept)
            else:
                known[key] = attention.prepare(own, group)
        return known[key]


def _of_all_heads(need: Need, score: torch.Tensor) -> torch.Tensor:
    """One rank's part of a score; the parts of all ranks add up to that of all heads.

    A deviation is a sum over heads (its cosine form is taken to be one). An importance is a mean
    over heads, so over ranks too: exact with queries summed, near it with their norm or maximum,
    and with the maximum over heads the mean of the ranks' maxima.
    """
    return score / get_tp_group().world_size if isinstance(need, Importance) else score
