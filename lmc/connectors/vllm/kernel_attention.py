"""Rows attend by lmc's own kernels; and which of the ways an engine takes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch

from lmc.blend.evidence import Deviation
from lmc.connectors.vllm.attention import (
    BackendAttention,
    PagedAttention,
    deviation_of,
    softcap_of,
)
from lmc.connectors.vllm.groups import LATENT, Groups
from lmc.connectors.vllm.rows import Current, Part, Place, Rows
from lmc.kernels.paged import PagedKV
from lmc.kernels.query_rows import query_rows
from lmc.kernels.scatter import scatter
from lmc.kernels.sparse_attention import sparse_attention


class KernelAttention(PagedAttention):
    """lmc's own kernels: one launch a layer, whatever the rows, masked by absolute position.

    Raises:
        ValueError: layers with what the kernel does not compute (ALiBi, sinks), or pages whose
            layout is not known.
    """

    def __init__(self, layers: dict[str, Any], groups: Groups) -> None:
        super().__init__(layers, groups)
        for name, layer in layers.items():
            for extra in ("alibi_slopes", "sinks"):
                if getattr(layer.impl, extra, None) is not None:
                    raise ValueError(f"attention: kernels do not compute the {extra} of {name}")
            if getattr(layer, "attention_chunk_size", None):
                raise ValueError(f"attention: kernels do not attend in chunks, as {name} does")

    def _how(
        self, parts: list[Part], page_slots: torch.Tensor, tables: torch.Tensor, group: int
    ) -> Any:
        layer = next(iter(self.layers.values()))
        keys = self._places[id(layer)].pages.k[0]
        positions = torch.from_numpy(np.concatenate([part.positions for part in parts]))
        return query_rows(positions, (0, *(p.at.stop for p in parts)), layer.num_heads, keys)

    def _write(
        self,
        layer: Any,
        place: Place,
        key: torch.Tensor,
        value: torch.Tensor,
        page_slots: torch.Tensor,
        needs: list[Deviation],
    ) -> list[torch.Tensor]:
        if not needs:
            scatter(place.pages.fresh(key, value), place.pages, page_slots)
        # The last one stores the rows in the pass in which it reads them.
        return [
            deviation_of(need, key, value, place.pages, page_slots, write=need is needs[-1])
            for need in needs
        ]

    def _attend(
        self,
        layer: Any,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: Rows,
    ) -> torch.Tensor:
        return sparse_attention(
            query,
            place.pages.k[0],
            self._values(layer, place.pages),
            rows.tables,
            rows.how,
            layer.impl.scale,
            window=layer.sliding_window,
            softcap=softcap_of(layer),
        )

    def _values(self, layer: Any, pages: PagedKV) -> torch.Tensor:
        """What weights are multiplied with."""
        return pages.v[0]


class LatentAttention(KernelAttention):
    """Rows of MLA attend to latents as they are, like vLLM's decoding: what unfolds keys is
    multiplied into the queries, and what unfolds values into what comes out (DeepSeek-V2,
    arXiv 2405.04434, section 2.1.2).

    Raises:
        ValueError: what unfolds keys is not a matrix a head, but packed or quantised.
    """

    def __init__(self, layers: dict[str, Any], groups: Groups) -> None:
        super().__init__(layers, groups)
        for name, layer in layers.items():
            if not isinstance(getattr(layer, "W_UK_T", None), torch.Tensor):
                raise ValueError(f"what unfolds the keys of {name} is packed: not supported")

    def _values(self, layer: Any, pages: PagedKV) -> torch.Tensor:
        return pages.k[0][..., : layer.kv_lora_rank]

    def _forward_of(self, layer: Any, current: Current) -> Any:
        def forward(
            q: torch.Tensor,
            kv_c_normed: torch.Tensor,
            k_pe: torch.Tensor,
            output_shape: Any = None,
            q_dcp_replicated: Any = None,
        ) -> torch.Tensor:
            assert current.rows is not None
            M, H = len(q), layer.num_heads
            q = q.view(M, H, -1)
            folded = torch.bmm(q[..., : layer.qk_nope_head_dim].transpose(0, 1), layer.W_UK_T)
            query = torch.cat((folded.transpose(0, 1), q[..., layer.qk_nope_head_dim :]), -1)
            latents = torch.cat((kv_c_normed, k_pe.view(M, -1)), -1)[:, None]
            of = (query, latents, latents, current.rows, current.measures)
            out = q.new_empty(M, H * layer.v_head_dim)
            layer._v_up_proj(self.attend(layer, *of), out=out)
            return out

        return forward


def paged_attention(
    way: str, layers: dict[str, Any], groups: Groups, vllm_config: Any
) -> PagedAttention:
    """The way that the config names: `kernels`, `backend`, or `auto`: kernels on a GPU, and vLLM's
    backend for layers of which they do not compute all.

    Latents have one way: lmc's own.
    """
    on_gpu = next(iter(layers.values())).kv_cache.is_cuda
    if type(groups.specs[0]).__name__ == LATENT:
        return LatentAttention(layers, groups)
    if way == "kernels":
        return KernelAttention(layers, groups)
    if way == "auto" and on_gpu:
        with suppress(ValueError):
            return KernelAttention(layers, groups)
    return BackendAttention(layers, groups, vllm_config)
