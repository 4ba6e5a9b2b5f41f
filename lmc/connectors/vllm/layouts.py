"""Attention-layout adapters: one engine layer's cache as K and V views `[N, P, G, D]`, or latents.

vLLM gives every layer one tensor of logical shape `[N, G, P, 2D]`; what lies in it, and in which
order, is the attention backend's business. The views share its memory, whatever its strides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lmc.kernels.paged import PagedKV, PagedLatents

KV = tuple[torch.Tensor, torch.Tensor]
# A request's block ids, in order; an array where it is long. 0, vLLM's null block, stands where a
# window has left a page behind.
Blocks = Sequence[int] | np.ndarray


def side_by_side(cache: torch.Tensor) -> KV:
    """FlashAttention and Triton backends: `[..., :D]` is K and `[..., D:]` V of the same token.

    Source: `kv_cache.transpose(1, 2).split(head_size, dim=-1)` in v1/attention/backends/
    flash_attn.py and triton_attn.py. Untested on a GPU.
    """
    D = cache.shape[-1] // 2
    k, v = cache.transpose(1, 2).split(D, dim=-1)
    return k, v


def cpu_transposed_keys(cache: torch.Tensor) -> KV:
    """The CPU backend, ISA vec and vec16: per page and head K^T `[D, P]`, then V `[P, D]`.

    Found by writing through its own kernel and reading back; AMX packs K in another way.
    """
    N, G, P, width = cache.shape
    D = width // 2
    flat = cache.view(N, G, 2 * P * D)
    k = flat[..., : P * D].view(N, G, D, P).permute(0, 3, 1, 2)
    v = flat[..., P * D :].view(N, G, P, D).permute(0, 2, 1, 3)
    return k, v


LAYOUTS: dict[str, Callable[[torch.Tensor], KV]] = {
    "CPU_ATTN": cpu_transposed_keys,
    "FLASH_ATTN": side_by_side,
    "TRITON_ATTN": side_by_side,
}
CPU_ISAS = ("vec", "vec16")
# Of MLA: latents `[N, P, D]`, whose last dims turn. All but the first untested.
LATENTS = (
    "CPU_MLA", "AMX_MLA", "TRITON_MLA", "FLASHMLA", "FLASH_ATTN_MLA", "FLASHINFER_MLA",
    "CUTLASS_MLA",
)  # fmt: skip


def views_of(layer: Any, cache: torch.Tensor | None = None) -> KV:
    """One layer's K and V, views `[N, P, G, D]` of its pages, or of others in the same layout.

    Raises:
        ValueError: a backend, or a CPU instruction set, whose layout is not known.
    """
    backend = layer.attn_backend.get_name()
    if backend not in LAYOUTS:
        raise ValueError(
            f"KV layout of attention backend {backend} is unknown; "
            f"known: {sorted([*LAYOUTS, *LATENTS])}"
        )
    if backend == "CPU_ATTN" and layer.isa not in CPU_ISAS:
        raise ValueError(f"KV layout of CPU ISA {layer.isa!r} is unknown; known: {CPU_ISAS}")
    return LAYOUTS[backend](layer.kv_cache if cache is None else cache)


def flat_slots(rows: np.ndarray, blocks: Blocks, block_size: int) -> np.ndarray:
    """Flat page slots `[M]` of rows of a request in its blocks (vLLM's slot mapping).

    -1 where it has none.
    """
    if not len(rows):
        return np.empty(0, np.int64)
    pages = rows // block_size
    # Of a list no more is read than is needed: a prompt of many chunks is many calls.
    first, last = int(pages.min()), int(pages.max())
    table = np.asarray(blocks[first : last + 1], np.int64)
    slots = (table[pages - first] - pages) * block_size + rows
    slots[slots < block_size] = -1
    return slots


def page_slots_of(
    rows: np.ndarray, blocks: Blocks, block_size: int, device: torch.device
) -> torch.Tensor:
    """`flat_slots` on the device."""
    return torch.from_numpy(flat_slots(rows, blocks, block_size)).to(device)


def blank_pages(layer: Any, n: int) -> torch.Tensor:
    """A cache of n pages, zero, laid out as the layer's own is."""
    cache = layer.kv_cache
    # Without the gaps that there are between pages where layers share a tensor.
    order = sorted(range(1, cache.ndim), key=cache.stride, reverse=True)
    shape = [n, *(cache.shape[axis] for axis in order)]
    blank = torch.zeros(shape, dtype=cache.dtype, device=cache.device)
    return blank.permute(0, *(1 + order.index(axis) for axis in range(1, cache.ndim)))


def paged_kv(layers: list[Any]) -> PagedKV:
    """The paged KV of vLLM's attention layers, in layer order; ValueError as `views_of`."""
    if all(layer.attn_backend.get_name() in LATENTS for layer in layers):
        return PagedLatents([layer.kv_cache for layer in layers])
    views = [views_of(layer) for layer in layers]
    return PagedKV(k=tuple(k for k, _ in views), v=tuple(v for _, v in views))
