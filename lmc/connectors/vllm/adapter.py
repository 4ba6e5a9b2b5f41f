"""vLLM's own modules as an adapter of the selective forward, and the check that they agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context

from lmc.blend.forward import State, selective_forward
from lmc.connectors.vllm.attention import BackendAttention, PagedAttention


class VLLMAdapter:
    """One request's rows through vLLM's decoder layers.

    QKV projections, q/k norm, RoPE, MLP, quantisation and tensor-parallel reductions are the
    modules' own; only attention is told where the rows are.
    """

    def __init__(
        self,
        model: Any,
        attention: PagedAttention,
        tokens: np.ndarray,
        blocks: list[int],
        max_rows: int,
        vllm_config: Any,
    ) -> None:
        inner = model.model
        self.layers = list(inner.layers[inner.start_layer : inner.end_layer])
        self.num_layers = len(self.layers)
        self.max_rows = max_rows
        self._embed = inner.embed_input_ids
        self._attention = attention
        self._tokens, self._blocks = tokens, blocks
        self._current: dict[str, Any] = {}
        self._vllm_config = vllm_config
        self._slices: dict[int, tuple[torch.Tensor, Any]] = {}

    def embed(self, rows: np.ndarray) -> State:
        device = self._attention.device
        # A slice of rows is the same in every layer, and so is all that depends on it alone.
        self._slices[int(rows[0])] = (
            torch.from_numpy(rows).to(device),
            self._attention.prepare(rows, self._blocks),
        )
        ids = torch.from_numpy(self._tokens[rows]).to(device)
        return (self._embed(ids),)

    def layer(self, index: int, rows: np.ndarray, state: State) -> State:
        where, self._current["prepared"] = self._slices[int(rows[0])]
        hidden, residual = state if len(state) == 2 else (state[0], None)
        hidden, residual = self.layers[index](where, hidden, residual)
        return (hidden, residual)

    @torch.inference_mode()
    def run(self, rows: np.ndarray) -> State:
        """Compute `rows` and leave their KV in the request's blocks."""
        # A context of its own, since layers such as MoE read the number of tokens from it.
        context = set_forward_context(
            None, self._vllm_config, num_tokens=min(len(rows), self.max_rows)
        )
        with context, self._attention.installed(self._current):
            return selective_forward(self, rows)


@torch.inference_mode()
def self_check(
    model: Any, attention: PagedAttention, oracle: BackendAttention, vllm_config: Any
) -> str | None:
    """Why the layer loop is not the model's own forward on 64 tokens, or None when it is.

    Runs in blocks that no request owns yet, once whole through `model.forward` with the backend's
    attention and once by the loop in two parts with `attention`, and compares hidden states and
    the KV left behind. Architectures that do more between their layers than hand on
    (hidden, residual) are found out here.
    """
    T, block_size = 64, attention.block_size
    tokens = np.arange(T, dtype=np.int64) * 7919 % vllm_config.model_config.get_vocab_size()
    blocks = list(range(1, 1 + -(-T // block_size)))  # block 0 is vLLM's null block
    rows = np.arange(T, dtype=np.int64)
    caches = [layer.kv_cache for layer in attention.layers.values()]
    before = [cache[blocks].clone() for cache in caches]
    try:
        slots, metadata = oracle.prepare(rows, blocks)
        names = list(attention.layers)
        with set_forward_context(
            dict.fromkeys(names, metadata),
            vllm_config,
            num_tokens=T,
            slot_mapping=dict.fromkeys(names, slots),
        ):
            device = attention.device
            whole = model(
                input_ids=torch.from_numpy(tokens).to(device),
                positions=torch.from_numpy(rows).to(device),
            )
        kept = [cache[blocks].clone() for cache in caches]
        for cache, old in zip(caches, before, strict=True):
            cache[blocks] = old
        adapter = VLLMAdapter(model, attention, tokens, blocks, T // 2, vllm_config)
        hidden, residual = adapter.run(rows)
        looped, _ = model.model.norm(hidden, residual)
        pairs = [(whole, looped), *zip(kept, (cache[blocks] for cache in caches), strict=True)]
        # Sums are taken in another order, and compiled code may fuse; no more than that.
        tolerance = torch.finfo(whole.dtype).eps ** 0.5
        worst = max(_relative_error(a, b) for a, b in pairs)
    except Exception as error:  # an architecture of another shape may fail in any way
        return f"the layer loop does not run on this model: {type(error).__name__}: {error}"
    finally:
        for cache, old in zip(caches, before, strict=True):
            cache[blocks] = old
    if not worst <= tolerance:
        return f"the layer loop differs from model.forward by {worst:.1e} (at most {tolerance:.1e})"
    return None


def _relative_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    scale = expected.float().abs().max().clamp_min(1e-6)
    return float((expected.float() - got.float()).abs().max() / scale)
