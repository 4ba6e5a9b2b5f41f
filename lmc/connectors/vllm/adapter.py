"""vLLM's own modules as an adapter of the selective forward, and the check that they agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import set_forward_context

from lmc.blend.evidence import Importance, Need, Outline
from lmc.blend.forward import Outcome, State, selective_forward
from lmc.blend.strategy import Strategy
from lmc.connectors.vllm.attention import Current, Measure, PagedAttention, Rows
from lmc.kernels.gather import gather
from lmc.kernels.scatter import scatter


class VLLMAdapter:
    """One request's rows through vLLM's decoder layers.

    QKV projections, q/k norm, RoPE, MLP, quantisation and tensor-parallel reductions are the
    modules' own; only attention is told where the rows are.

    Args:
        tokens: `[T]` token ids, as far as rows are computed.
        blocks: the request's block ids, in order.
        max_rows: rows that one call of a layer may carry.
        before: called with a layer's index before its pages are looked at.
    """

    def __init__(
        self,
        model: Any,
        attention: PagedAttention,
        tokens: np.ndarray,
        blocks: list[int],
        max_rows: int,
        vllm_config: Any,
        before: Callable[[int], None] = lambda layer: None,
    ) -> None:
        inner = model.model
        self.layers = list(inner.layers[inner.start_layer : inner.end_layer])
        self.num_layers = len(self.layers)
        self.max_rows = max_rows
        self._embed = inner.embed_input_ids
        self._attention = attention
        # An array, since every layer reads of it.
        self._tokens, self._blocks = tokens, np.asarray(blocks, np.int64)
        self._current = Current()
        self._outline: Outline | None = None
        self._vllm_config = vllm_config
        self._before = before
        self._prepared: dict[bytes, Rows] = {}
        self._prepared_in = 0

    def embed(self, rows: np.ndarray) -> State:
        self._prepared.clear()
        ids = torch.from_numpy(self._tokens[rows]).to(self._attention.device)
        return (self._embed(ids),)

    def layer(
        self, index: int, rows: np.ndarray, state: State, needs: Sequence[Need] = ()
    ) -> tuple[State, list[torch.Tensor]]:
        self._before(index)
        self._current.rows = self._rows(index, rows)
        self._current.measure = measure = Measure(needs, self._outline)
        hidden, residual = state if len(state) == 2 else (state[0], None)
        where = self._current.rows.where
        hidden, residual = self.layers[index](where, hidden, residual)
        scores = [_of_all_heads(need, measure.scores[need]) for need in needs]
        return (hidden, residual), scores

    def read(self, index: int, rows: np.ndarray) -> torch.Tensor:
        self._before(index)
        pages = self._attention.pages(self.layers[index])
        return gather(pages, self._attention.page_slots(rows, self._blocks))

    def write(self, index: int, rows: np.ndarray, kv: torch.Tensor) -> None:
        pages = self._attention.pages(self.layers[index])
        scatter(kv, pages, self._attention.page_slots(rows, self._blocks))

    def agree(self, scores: torch.Tensor) -> torch.Tensor:
        # The sum over ranks; the same bits on each, whatever order a reduction adds in.
        group = get_tp_group()
        return group.broadcast(group.all_reduce(scores.clone()))

    @torch.inference_mode()
    def run(
        self, forced: np.ndarray, strategy: Strategy | None = None, outline: Outline | None = None
    ) -> Outcome:
        """Compute `forced` and what the strategy chooses; their KV stays in the request's blocks.

        A probe runs the suffix too, as far as the blocks reach: its KV there is the engine's to
        write afterwards. Where they do not reach its end, the last rows within reach ask.
        """
        if strategy is None or outline is None:
            with self._installed(len(forced)):
                return selective_forward(self, forced)
        reach = min(outline.T, len(self._blocks) * self._attention.block_size)
        self._outline = replace(outline, T=reach)
        probe_rows = np.union1d(forced, np.arange(outline.end, reach))
        with self._installed(max(len(forced) + outline.n, len(probe_rows))):
            return selective_forward(self, forced, strategy, self._outline, probe_rows)

    @torch.inference_mode()
    def measure(
        self, rows: np.ndarray, needs: Sequence[Need], outline: Outline
    ) -> list[torch.Tensor]:
        """Scores of `rows` in layer 0, over the heads of all ranks."""
        self._outline = outline
        with self._installed(len(rows)):
            _, scores = self.layer(0, rows, self.embed(rows), needs)
        return [self.agree(score) for score in scores]

    @contextmanager
    def _installed(self, most_rows: int) -> Iterator[None]:
        # A context of its own, since layers such as MoE read the number of tokens from it.
        context = set_forward_context(
            None, self._vllm_config, num_tokens=min(most_rows, self.max_rows)
        )
        with context, self._attention.installed(self._current):
            yield

    def _rows(self, index: int, rows: np.ndarray) -> Rows:
        """What depends on rows alone; the same in every layer until a strategy drops some."""
        key = rows.tobytes()
        if key not in self._prepared:
            if index != self._prepared_in:
                self._prepared.clear()
            self._prepared_in = index
            self._prepared[key] = self._attention.prepare(rows, self._blocks)
        return self._prepared[key]


def _of_all_heads(need: Need, score: torch.Tensor) -> torch.Tensor:
    """One rank's part of a score; the parts of all ranks add up to that of all heads.

    A deviation is a sum over heads (its cosine form is taken to be one). An importance is a mean
    over heads, so over ranks too: exact with queries summed, near it with their norm or maximum,
    and with the maximum over heads the mean of the ranks' maxima.
    """
    return score / get_tp_group().world_size if isinstance(need, Importance) else score
