"""The page views against what vLLM's own backends write."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from lmc.connectors.vllm.layouts import (
    LAYOUTS,
    cpu_transposed_keys,
    flat_slots,
    paged_kv,
    side_by_side,
)


def poisoned(N: int, G: int, P: int, D: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((N, G, P, 2 * D), float("nan"), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("P", "D"), [(32, 32), (32, 64), (128, 64)])
def test_cpu_layout_is_what_the_cpu_kernel_writes(dtype: torch.dtype, P: int, D: int) -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    import vllm._custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(dtype, P, D)
    if isa not in ("vec", "vec16"):
        pytest.skip(f"this CPU's attention ISA is {isa}, whose packing lmc refuses")
    N, G = 3, 2
    cache = poisoned(N, G, P, D, dtype)
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(N * P, generator=generator)[: P + 5]
    key = torch.randn(len(slots), G, D, generator=generator).to(dtype)
    value = torch.randn(len(slots), G, D, generator=generator).to(dtype)
    written = cache.view(N, G, 2 * P, D)
    k_cache, v_cache = written.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, k_cache, v_cache, slots, isa)

    k, v = cpu_transposed_keys(cache)
    assert k.shape == v.shape == (N, P, G, D)
    assert torch.equal(k[slots // P, slots % P], key)
    assert torch.equal(v[slots // P, slots % P], value)
    untouched = torch.ones(N * P, dtype=torch.bool)
    untouched[slots] = False
    assert k.reshape(N * P, G, D)[untouched].isnan().all()


def test_cuda_layout_is_how_the_cuda_backends_read_it() -> None:
    # The backends' modules import on a CPU; their kernels do not run there. Their source is
    # what the view repeats, so a change of it must be seen here.
    from vllm.v1.attention.backends import flash_attn, triton_attn

    for module in (flash_attn, triton_attn):
        source = inspect.getsource(module)
        assert "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)" in source
    N, G, P, D = 3, 2, 16, 8
    cache = torch.randn(N, G, P, 2 * D)
    k, v = side_by_side(cache)
    assert k.shape == (N, P, G, D)
    assert torch.equal(k[2, 5, 1], cache[2, 1, 5, :D])
    assert torch.equal(v[2, 5, 1], cache[2, 1, 5, D:])
    assert k.data_ptr() == cache.data_ptr()


def test_unknown_backends_are_refused_by_name() -> None:
    class Backend:
        @staticmethod
        def get_name() -> str:
            return "FLASHINFER"

    class Layer:
        attn_backend = Backend

    with pytest.raises(ValueError, match=r"FLASHINFER is unknown; known:.*CPU_ATTN"):
        paged_kv([Layer()])
    assert set(LAYOUTS) == {"CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN"}

    class CPU:
        @staticmethod
        def get_name() -> str:
            return "CPU_ATTN"

    class AMXLayer:
        attn_backend = CPU
        isa = "amx"

    with pytest.raises(ValueError, match="'amx'"):
        paged_kv([AMXLayer()])


@pytest.mark.parametrize("rows", [[], [0], [5, 6, 7, 8, 20], [20, 3, 11]], ids=str)
def test_rows_lie_where_the_block_table_says(rows: list[int]) -> None:
    blocks = [9, 4, 17, 2, 30, 11]
    expected = [blocks[row // 4] * 4 + row % 4 for row in rows]
    for some in (blocks, np.array(blocks)):
        assert flat_slots(np.array(rows, np.int64), some, 4).tolist() == expected
