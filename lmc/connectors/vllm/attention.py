"""How rows at any positions of one request attend to its pages: two ways that must agree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from lmc.blend.strategy import runs_of
from lmc.connectors.vllm.layouts import views_of
from lmc.kernels.paged import PagedKV
from lmc.kernels.query_rows import query_rows
from lmc.kernels.scatter import scatter
from lmc.kernels.sparse_attention import sparse_attention


class PagedAttention(ABC):
    """Attention of rows `[M]` of one request, their fresh K and V written to its pages first."""

    def __init__(self, layers: dict[str, Any], kv_cache_spec: Any) -> None:
        self.layers = layers
        self.block_size = kv_cache_spec.block_size
        self.device = next(iter(layers.values())).kv_cache.device

    def slots(self, rows: np.ndarray, blocks: list[int]) -> torch.Tensor:
        """Flat slots `[M]` of rows in the request's blocks."""
        table = np.asarray(blocks, np.int64)
        flat = table[rows // self.block_size] * self.block_size + rows % self.block_size
        return torch.from_numpy(flat).to(self.device)

    @abstractmethod
    def prepare(self, rows: np.ndarray, blocks: list[int]) -> Any:
        """What is the same in every layer for these rows."""

    @abstractmethod
    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prepared: Any,
    ) -> torch.Tensor:
        """Write key and value `[M, G, D]`, and attend with query `[M, H, D]`; `[M, H, D]`."""

    @contextmanager
    def installed(self, current: dict[str, Any]) -> Iterator[None]:
        """While open, attention layers work on the rows that `current["prepared"]` describes."""
        for layer in self.layers.values():
            layer.forward = self._forward_of(layer, current)
        try:
            yield
        finally:
            for layer in self.layers.values():
                del layer.forward  # the instance's; the class's own shows again

    def _forward_of(self, layer: Any, current: dict[str, Any]) -> Any:
        def forward(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            output_shape: Any = None,
            output_dtype: torch.dtype | None = None,
        ) -> torch.Tensor:
            M = query.shape[0]
            return self.attend(
                layer,
                query.view(M, layer.num_heads, layer.head_size),
                key.view(M, layer.num_kv_heads, layer.head_size),
                value.view(M, layer.num_kv_heads, layer.head_size_v),
                current["prepared"],
            ).view(M, -1)

        return forward


class BackendAttention(PagedAttention):
    """vLLM's attention backend, called for rows at any positions.

    Each maximal run of rows is a pseudo-sequence: as many queries as the run is long, a
    sequence that ends with it, the request's block table. The backend's ordinary causal mask
    is then the mask by absolute position, exactly, with one pass over the keys per run.
    """

    def __init__(self, layers: dict[str, Any], kv_cache_spec: Any, vllm_config: Any) -> None:
        super().__init__(layers, kv_cache_spec)
        first = next(iter(layers.values()))
        builder = first.attn_backend.get_builder_cls()
        self._builder = builder(kv_cache_spec, list(layers), vllm_config, self.device)

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

    def prepare(self, rows: np.ndarray, blocks: list[int]) -> Any:
        return self.slots(rows, blocks), self.metadata(rows, blocks)

    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prepared: Any,
    ) -> torch.Tensor:
        slots, metadata = prepared
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
        output = torch.empty_like(query)
        layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata, output=output)
        return output


class KernelAttention(PagedAttention):
    """lmc's own kernel: one launch a layer, whatever the rows, masked by absolute position.

    Raises:
        ValueError: layers with what the kernel does not compute (ALiBi, sinks), or pages whose
            layout is not known.
    """

    def __init__(self, layers: dict[str, Any], kv_cache_spec: Any) -> None:
        super().__init__(layers, kv_cache_spec)
        self._views: dict[int, PagedKV] = {}
        for name, layer in layers.items():
            for extra in ("alibi_slopes", "sinks"):
                if getattr(layer.impl, extra, None) is not None:
                    raise ValueError(f"attention: kernels do not compute the {extra} of {name}")
            k, v = views_of(layer)
            self._views[id(layer)] = PagedKV((k,), (v,))

    def prepare(self, rows: np.ndarray, blocks: list[int]) -> Any:
        layer = next(iter(self.layers.values()))
        keys = self._views[id(layer)].k[0]
        tiles = query_rows(torch.from_numpy(rows), (0, len(rows)), layer.num_heads, keys)
        used = -(-(int(rows[-1]) + 1) // self.block_size)
        table = torch.tensor([blocks[:used]], dtype=torch.int32, device=self.device)
        return self.slots(rows, blocks), table, tiles

    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prepared: Any,
    ) -> torch.Tensor:
        slots, table, tiles = prepared
        pages = self._views[id(layer)]
        scatter(torch.stack((key, value))[None], pages, slots)
        return sparse_attention(
            query,
            pages.k[0],
            pages.v[0],
            table,
            tiles,
            layer.impl.scale,
            window=layer.sliding_window,
            softcap=getattr(layer.impl, "logits_soft_cap", None) or None,
        )


def paged_attention(
    way: str, layers: dict[str, Any], kv_cache_spec: Any, vllm_config: Any
) -> PagedAttention:
    """The way that the config names: `kernels`, `backend`, or `auto` (kernels on a GPU)."""
    on_gpu = next(iter(layers.values())).kv_cache.is_cuda
    if way == "kernels" or (way == "auto" and on_gpu):
        return KernelAttention(layers, kv_cache_spec)
    return BackendAttention(layers, kv_cache_spec, vllm_config)
