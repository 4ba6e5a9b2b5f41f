"""Put a chunk's rows into the paged KV cache, its keys rotated by one position delta on the way.

Shapes: chunk [L, 2, T, G, D], slots [T], cos and sin [R/2] -> pages L x [N, P, G, D] of K and of V;
         or the latents of MLA, chunk [L, 1, T, 1, D] -> pages L x [N, P, D].
Formula: k[l][slots[t] // P, slots[t] % P] = rotate(chunk[l, 0, t]), v the plain copy; -1: left out.
         Of keys the first R dims turn, of latents the last R.
Bytes:   reads and writes 2*L*T*G*D*b each (latents: L*T*D*b), and reads the slots.
Source:  vLLM's reshape_and_cache with the rotation of lmc.kernels.rerotate fused in, one launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.cases import Case, make_chunk, make_paged, make_rotation, make_slots
from lmc.kernels.gather import (
    LatentCase,
    chunk_bytes,
    make_latents,
)
from lmc.kernels.host import scatter_host
from lmc.kernels.paged import AOT_ARGS, PagedKV, check_slots, describe, page_runs
from lmc.kernels.rerotate import check_rotation, rotate_args, rotate_tile, rotated
from lmc.kernels.spec import OPTIONS, ROUNDED, KernelSpec, block_rows, interpreted, use_kernel


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
    for layer, (new_k, *new_v) in enumerate(chunk):
        if cos is not None and sin is not None:
            R0 = paged.turned_from(2 * len(cos))
            turned = rotated(new_k[..., R0:], cos, sin, interleaved)
            new_k = torch.cat((new_k[..., :R0], turned), -1) if R0 else turned
        sides = list(zip((new_k, *new_v), (paged.k[layer], paged.v[layer]), strict=False))
        for rows, page, offsets in runs:
            for new, pages in sides:
                pages[page, offsets] = new[rows]


# Numbers that differ from call to call, and where an index begins, must not compile it anew.
@triton.jit(do_not_specialize=["T", "t_kv"], do_not_specialize_on_alignment=["slots", "table"])
def _scatter_kernel(
    chunk, slots, cos, sin, T, c_l, c_kv, c_t, c_g,
    table, t_kv, limit, k_n, k_p, k_g, v_n, v_p, v_g,
    K_D: tl.constexpr, V_D: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr,
    C_D: tl.constexpr, D: tl.constexpr, SIDES: tl.constexpr, R0: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0).to(tl.int64)
    i_l = tl.program_id(2).to(tl.int64) // SIDES
    i_kv = tl.program_id(2).to(tl.int64) % SIDES
    o_t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    b_slot = tl.load(slots + o_t, mask=o_t < T, other=-1)
    b_page, b_offset = b_slot // P, b_slot % P
    m_t = (b_slot >= 0) & (b_slot < limit)
    m = m_t[:, None] & (o_d < (R0 if R0 > 0 else D))[None, :]
    p_row = chunk + i_l * c_l + i_kv * c_kv + i_g * c_g + o_t * c_t
    p_chunk = p_row[:, None] + (o_d * C_D)[None, :]
    base = tl.multiple_of(tl.load(table + i_kv * t_kv + i_l).to(chunk.dtype), ALIGN)
    if i_kv == 0:
        p_k = base + i_g * k_g + b_page * k_n + b_offset * k_p
        if R == 0 or R0 > 0:
            tl.store(p_k[:, None] + (o_d * K_D)[None, :], tl.load(p_chunk, mask=m), mask=m)
        if R > 0:
            rotate_tile(
                p_row + R0 * C_D, p_k + R0 * K_D, m_t, cos, sin,
                C_D, K_D, D - R0, R, INTERLEAVED, BLOCK_R, BLOCK_REST,
            )  # fmt: skip
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
    zero_copy: bool = False,
) -> None:
    """Write chunk [L, 2, T, G, D] to `slots`, keys rotated by the delta of cos and sin, if given.

    Latents are [L, 1, T, 1, D], and their pages a PagedLatents. Slots must be distinct; -1 skips a
    row. The chunk may lie in pinned host memory: it is then staged by one asynchronous copy, or,
    with zero_copy, read over the bus by the kernel itself, to which Triton passes the address that
    the driver gives pinned memory on the device (untested on a GPU). Either way keep it unchanged
    until the current stream has passed.
    """
    check_slots(slots, paged)
    shape = paged.shape(len(slots))
    if chunk.shape != shape or chunk.dtype != paged.dtype:
        raise ValueError(f"chunk must be {paged.dtype} {list(shape)}, got {describe(chunk)}")
    if (cos is None) != (sin is None):
        raise ValueError(f"cos and sin go together, got cos={cos!r}, sin={sin!r}")
    if zero_copy and not interpreted() and not (paged.k[0].is_cuda and chunk.is_pinned()):
        raise ValueError(
            f"zero_copy needs the chunk in pinned memory and pages on a CUDA device, "
            f"got {describe(chunk)}{', pinned' * chunk.is_pinned()}, and pages on {paged.device}"
        )
    R = R0 = 0
    if cos is not None and sin is not None:
        check_rotation(cos, sin, paged.D)
        R = 2 * cos.numel()
        R0 = paged.turned_from(R)
        cos, sin = (x.to(paged.device, non_blocking=True).contiguous() for x in (cos, sin))
    slots = slots.to(paged.device, non_blocking=True)
    if not zero_copy:
        # A copy engine and then a kernel on the device beat a kernel that reads host memory itself.
        chunk = chunk.to(paged.device, non_blocking=True)
    if not use_kernel(paged.k[0]):
        if chunk.dtype == torch.float32 and paged.sides == 2:
            scatter_host(chunk, paged, slots, cos, sin, interleaved)
        else:
            scatter_reference(chunk, paged, slots, cos, sin, interleaved=interleaved)
    elif len(slots):
        copied = R0 or paged.D
        BLOCK_T = block_rows(copied)
        grid = (paged.G, triton.cdiv(len(slots), BLOCK_T), shape[1] * paged.L)
        with torch.cuda.device_of(paged.k[0]):
            _scatter_kernel[grid](
                chunk, slots.contiguous(), cos, sin, len(slots), *chunk.stride()[:4],
                **paged.kernel_args, C_D=chunk.stride(-1), D=paged.D, SIDES=shape[1], R0=R0,
                BLOCK_T=BLOCK_T, BLOCK_D=triton.next_power_of_2(copied),
                **rotate_args(R, paged.D - R0, interleaved), **OPTIONS,
            )  # fmt: skip


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    chunk = make_chunk(case, dtype, device)
    latents = isinstance(case, LatentCase)
    return {
        "chunk": chunk[:, :1] if latents else chunk,
        "paged": (make_latents if latents else make_paged)(case, dtype, device, poisoned=True),
        "slots": make_slots(case, device),
        **make_rotation(case, device),
    }


def _signature(
    D: int, R: int, interleaved: bool = False, SIDES: int = 2, R0: int = 0
) -> dict[str, str | int]:
    copied = R0 or D
    return {
        "chunk": "*b:16", "slots": "*i64", "cos": "*fp32:16", "sin": "*fp32:16",
        "T": "i32", "c_l": "i32:16", "c_kv": "i32:16", "c_t": "i32:16", "c_g": "i32:16", **AOT_ARGS,
        "C_D": 1, "D": D, "SIDES": SIDES, "R0": R0,
        "BLOCK_T": block_rows(copied), "BLOCK_D": triton.next_power_of_2(copied),
        **rotate_args(R, D - R0, interleaved),
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
        Case(T=33, G=2, D=64, layout="packed", slots="holes"),
        Case(T=20, G=2, D=256, slots="holes"),
        Case(T=21, G=2, D=64, rotate=False, layout="hnd", slots="shuffled"),
        Case(T=7, G=2, D=64, slots="none"),
        Case(T=0, G=2, D=64),
        LatentCase(T=21, slots="shuffled", interleaved=True),
        LatentCase(T=19, D=288, R=32, slots="holes"),
        LatentCase(T=9, rotate=False),
    ),
    bench=Case(L=32, T=2048, G=8, D=128),
    inputs=make_inputs,
    bytes=lambda c, b: 2 * chunk_bytes(c, b) + 8 * c.T,
    check=ROUNDED,
    aot={
        "copy": _signature(128, 0),
        "neox": _signature(128, 128),
        "interleaved": _signature(128, 128, interleaved=True),
        "partial": _signature(80, 32),
        "latents": _signature(576, 64, interleaved=True, SIDES=1, R0=512),
    },
    traffic={
        "copy": Case(L=1, T=256, G=2, D=128, rotate=False),
        "neox": Case(L=1, T=256, G=2, D=128),
        "interleaved": Case(L=1, T=256, G=2, D=128, interleaved=True),
        "partial": Case(L=1, T=256, G=2, D=80, R=32),
        "latents": LatentCase(L=1, T=128, interleaved=True),
    },
    bus=chunk_bytes,
)
