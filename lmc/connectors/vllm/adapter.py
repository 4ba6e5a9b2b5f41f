"""vLLM's own modules as an adapter of the selective forward, and the check that they agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from lmc.blend.forward import State, selective_forward
from lmc.blend.strategy import runs_of


class PagedAttention:
    """vLLM's attention backend, called for rows at any positions of one request.

    Each maximal run of rows is a pseudo-sequence: as many queries as the run is long, a
    sequence that ends with it, the request's block table. The backend's ordinary causal mask
    is then the mask by absolute position, exactly, with one pass over the keys per run.
    """

    def __init__(self, layers: dict[str, Any], kv_cache_spec: Any, vllm_config: Any) -> None:
        self.layers = layers
        self.vllm_config = vllm_config
        self.block_size = kv_cache_spec.block_size
        first = next(iter(layers.values()))
        self.device = first.kv_cache.device
        builder = first.attn_backend.get_builder_cls()
        self._builder = builder(kv_cache_spec, list(layers), vllm_config, self.device)

    def slots(self, rows: np.ndarray, blocks: list[int]) -> torch.Tensor:
        """Flat slots `[M]` of rows in the request's blocks."""
        table = np.asarray(blocks, np.int64)
        flat = table[rows // self.block_size] * self.block_size + rows % self.block_size
        return torch.from_numpy(flat).to(self.device)

    def metadata(self, rows: np.ndarray, blocks: list[int]) -> Any:
        """The backend's metadata for `rows` as pseudo-sequences."""
        runs = np.asarray(runs_of(rows), np.int32)
        lengths = runs[:, 1] - runs[:, 0]
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        ends = torch.from_numpy(runs[:, 1].copy())
        used = -(-int(runs[-1, 1]) // self.block_size)
        table = torch.tensor(blocks[:used], dtype=torch.int32).repeat(len(runs), 1)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=ends.to(self.device),
            seq_lens_cpu_upper_bound=ends,
            num_reqs=len(runs),
            num_actual_tokens=len(rows),
            max_query_len=int(lengths.max()),
            max_seq_len=int(runs[-1, 1]),
            block_table_tensor=table.to(self.device),
            slot_mapping=self.slots(rows, blocks),
            causal=True,
        )
        return self._builder.build(0, common)

    @contextmanager
    def installed(self, current: dict[str, Any]) -> Iterator[None]:
        """While open, attention layers work on the slice of rows that `current` describes.

        They write fresh K and V to its "slots" and attend by its "metadata".
        """
        for layer in self.layers.values():
            layer.forward = _forward_of(layer, current)
        try:
            yield
        finally:
            for layer in self.layers.values():
                del layer.forward  # the instance's; the class's own shows again


def _forward_of(layer: Any, current: dict[str, Any]) -> Any:
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: Any = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        M = query.shape[0]
        query = query.view(M, layer.num_heads, layer.head_size)
        key = key.view(M, layer.num_kv_heads, layer.head_size)
        value = value.view(M, layer.num_kv_heads, layer.head_size_v)
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, current["slots"])
        output = torch.empty_like(query)
        layer.impl.forward(
            layer, query, key, value, layer.kv_cache, current["metadata"], output=output
        )
        return output.view(M, -1)

    return forward


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
    ) -> None:
        inner = model.model
        self.layers = list(inner.layers[inner.start_layer : inner.end_layer])
        self.num_layers = len(self.layers)
        self.max_rows = max_rows
        self._embed = inner.embed_input_ids
        self._attention = attention
        self._tokens, self._blocks = tokens, blocks
        self._current: dict[str, Any] = {}
        self._slices: dict[int, tuple[torch.Tensor, torch.Tensor, Any]] = {}

    def embed(self, rows: np.ndarray) -> State:
        device = self._attention.device
        # A slice of rows is the same in every layer, and so is all that depends on it alone.
        self._slices[int(rows[0])] = (
            torch.from_numpy(rows).to(device),
            self._attention.slots(rows, self._blocks),
            self._attention.metadata(rows, self._blocks),
        )
        ids = torch.from_numpy(self._tokens[rows]).to(device)
        return (self._embed(ids),)

    def layer(self, index: int, rows: np.ndarray, state: State) -> State:
        where, slots, metadata = self._slices[int(rows[0])]
        self._current.update(slots=slots, metadata=metadata)
        hidden, residual = state if len(state) == 2 else (state[0], None)
        hidden, residual = self.layers[index](where, hidden, residual)
        return (hidden, residual)

    @torch.inference_mode()
    def run(self, rows: np.ndarray) -> State:
        """Compute `rows` and leave their KV in the request's blocks."""
        # A context of its own, since layers such as MoE read the number of tokens from it.
        context = set_forward_context(
            None, self._attention.vllm_config, num_tokens=min(len(rows), self.max_rows)
        )
        with context, self._attention.installed(self._current):
            return selective_forward(self, rows)


@torch.inference_mode()
def self_check(model: Any, attention: PagedAttention, vocab_size: int) -> str | None:
    """Why the layer loop is not the model's own forward on 64 tokens, or None when it is.

    Runs in blocks that no request owns yet, once whole through `model.forward` and once by the
    loop in two parts, and compares hidden states and the KV left behind. Architectures that do
    more between their layers than hand on (hidden, residual) are found out here.
    """
    T, block_size = 64, attention.block_size
    tokens = np.arange(T, dtype=np.int64) * 7919 % vocab_size
    blocks = list(range(1, 1 + -(-T // block_size)))  # block 0 is vLLM's null block
    rows = np.arange(T, dtype=np.int64)
    caches = [layer.kv_cache for layer in attention.layers.values()]
    before = [cache[blocks].clone() for cache in caches]
    try:
        metadata = attention.metadata(rows, blocks)
        slots = attention.slots(rows, blocks)
        names = list(attention.layers)
        with set_forward_context(
            dict.fromkeys(names, metadata),
            attention.vllm_config,
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
        adapter = VLLMAdapter(model, attention, tokens, blocks, max_rows=T // 2)
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
