"""Put a chunk's rows into the paged KV cache, its keys rotated by one position delta on the way.

Shapes: chunk [L, 2, T, G, D], slots [T], cos and sin [R/2] -> pages L x [N, P, G, D] of K and of V.
Formula: k[l][slots[t] // P, slots[t] % P] = rotate(chunk[l, 0, t]), v the plain copy; -1: left out.
Bytes:   reads and writes 2*L*T*G*D*b each, and reads the slots.
Source:  vLLM's reshape_and_cache with the rotation of lmc.kernels.rerotate fused in, one launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.cases import Case, make_chunk, make_paged, make_rotation, make_slots
from lmc.kernels.host import scatter_host
from lmc.kernels.paged import AOT_ARGS, PagedKV, check_slots, describe, page_runs
from lmc.kernels.rerotate import check_rotation, rotate_args, rotate_tile, rotated
from lmc.kernels.spec import ROUNDED, KernelSpec, block_rows, use_kernel


def scatter_reference(
    chunk: Tensor,
    paged: PagedKV,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> None:
    runs = list(page_runs(slots, paged.P))
    # One layer at a time: its rotated keys are still in the processor's cache when they are copied.
    for layer in range(paged.L):
        k, v, (new_k, new_v) = paged.k[layer], paged.v[layer], chunk[layer]
        if cos is not None and sin is not None:
            new_k = rotated(new_k, cos, sin, interleaved)
        for rows, page, offsets in runs:
            k[page, offsets] = new_k[rows]
            v[page, offsets] = new_v[rows]


@triton.jit
def _scatter_kernel(
    chunk, slots, cos, sin, T, c_l, c_kv, c_t, c_g,
    table, L, limit, k_n, k_p, k_g, v_n, v_p, v_g,
    K_D: tl.constexpr, V_D: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr,
    C_D: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0).to(tl.int64)
    i_l = tl.program_id(2).to(tl.int64) // 2
    i_kv = tl.program_id(2).to(tl.int64) % 2
    o_t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    b_slot = tl.load(slots + o_t, mask=o_t < T, other=-1)
    b_page, b_offset = b_slot // P, b_slot % P
    m_t = (b_slot >= 0) & (b_slot < limit)
    m = m_t[:, None] & (o_d < D)[None, :]
    p_row = chunk + i_l * c_l + i_kv * c_kv + i_g * c_g + o_t * c_t
    p_chunk = p_row[:, None] + (o_d * C_D)[None, :]
    base = tl.multiple_of(tl.load(table + i_kv * L + i_l).to(chunk.dtype), ALIGN)
    if i_kv == 0:
        p_k = base + i_g * k_g + b_page * k_n + b_offset * k_p
        if R > 0:
            rotate_tile(p_row, p_k, m_t, cos, sin, C_D, K_D, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)
        else:
            tl.store(p_k[:, None] + (o_d * K_D)[None, :], tl.load(p_chunk, mask=m), mask=m)
    else:
        p_v = base + i_g * v_g + b_page * v_n + b_offset * v_p
        tl.store(p_v[:, None] + (o_d * V_D)[None, :], tl.load(p_chunk, mask=m), mask=m)


def scatter(
    chunk: Tensor,
    paged: PagedKV,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> None:
    """Write chunk [L, 2, T, G, D] to `slots`, keys rotated by the delta of cos and sin, if given.

    Slots must be distinct; -1 skips a row. The chunk may lie in pinned host memory: it is then
    staged by one asynchronous copy, so keep it unchanged until the current stream has passed.
    """
    check_slots(slots, paged)
    shape = (paged.L, 2, len(slots), paged.G, paged.D)
    if chunk.shape != shape or chunk.dtype != paged.dtype:
        raise ValueError(f"chunk must be {paged.dtype} {list(shape)}, got {describe(chunk)}")
    if (cos is None) != (sin is None):
        raise ValueError(f"cos and sin go together, got cos={cos!r}, sin={sin!r}")
    R = 0
    if cos is not None and sin is not None:
        check_rotation(cos, sin, paged.D)
        R = 2 * cos.numel()
        cos, sin = (x.to(paged.device, non_blocking=True).contiguous() for x in (cos, sin))
    # A copy engine and then a kernel on the device beat a kernel that reads host memory itself.
    chunk, slots = (x.to(paged.device, non_blocking=True) for x in (chunk, slots))
    if not use_kernel(chunk):
        if chunk.dtype == torch.float32:
            scatter_host(chunk, paged, slots, cos, sin, interleaved)
        else:
            scatter_reference(chunk, paged, slots, cos, sin, interleaved=interleaved)
    elif len(slots):
        BLOCK_T = block_rows(len(slots), paged.D)
        grid = (paged.G, triton.cdiv(len(slots), BLOCK_T), 2 * paged.L)
        with torch.cuda.device_of(chunk):
            _scatter_kernel[grid](
                chunk, slots.contiguous(), cos, sin, len(slots), *chunk.stride()[:4],
                **paged.kernel_args, C_D=chunk.stride(4), D=paged.D,
                BLOCK_T=BLOCK_T, BLOCK_D=triton.next_power_of_2(paged.D),
                **rotate_args(R, paged.D, interleaved),
            )  # fmt: skip


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {
        "chunk": make_chunk(case, dtype, device),
        "paged": make_paged(case, dtype, device, poisoned=True),
        "slots": make_slots(case, device),
        **make_rotation(case, device),
    }


def _signature(D: int, R: int, interleaved: bool = False) -> dict[str, str | int]:
    return {
        "chunk": "*b:16", "slots": "*i64:16", "cos": "*fp32:16", "sin": "*fp32:16",
        "T": "i32", "c_l": "i32:16", "c_kv": "i32:16", "c_t": "i32:16", "c_g": "i32:16", **AOT_ARGS,
        "C_D": 1, "D": D, "BLOCK_T": block_rows(8192, D), "BLOCK_D": triton.next_power_of_2(D),
        **rotate_args(R, D, interleaved),
    }  # fmt: skip


SPEC = KernelSpec(
    name="scatter",
    launch=scatter,
    reference=scatter_reference,
    kernel=_scatter_kernel,
    cases=(
        Case(T=1, G=1, D=64),
        Case(T=37, G=3, D=64, layout="cpu"),
        Case(T=37, G=3, D=64, layout="cpu", slots="holes", interleaved=True),
        Case(T=21, G=2, D=80, R=32, layout="hnd", slots="holes"),
        Case(T=21, G=2, D=96, R=48, layout="joint", slots="shuffled", interleaved=True),
        Case(T=21, G=2, D=80, layout="joint", slots="shuffled", interleaved=True),
        Case(T=9, G=1, D=128, P=8, layout="cpu", slots="shuffled"),
        Case(T=20, G=2, D=256, slots="holes"),
        Case(T=21, G=2, D=64, rotate=False, layout="hnd", slots="shuffled"),
        Case(T=7, G=2, D=64, slots="none"),
        Case(T=0, G=2, D=64),
    ),
    bench=Case(L=32, T=2048, G=8, D=128),
    inputs=make_inputs,
    bytes=lambda c, b: 4 * c.L * c.T * c.G * c.D * b + 8 * c.T,
    check=ROUNDED,
    aot={
        "copy": _signature(128, 0),
        "neox": _signature(128, 128),
        "interleaved": _signature(128, 128, interleaved=True),
        "partial": _signature(80, 32),
    },
)
