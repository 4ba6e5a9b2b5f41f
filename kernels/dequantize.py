"""Put a quantised chunk into the paged KV cache: decode, rotate the keys and store, in one launch.

Shapes: codes [L, 2, T, G, D] (int4: D/2 bytes), k_scale [L, G, D], v_scale [L, T, G], slots [T],
         cos and sin [R/2] -> pages L x [N, P, G, D] of K and of V.
Formula: that of lmc.kernels.scatter on x = code * scale, in fp32 and rounded once.
Bytes:   reads the codes and both scales, writes 2*L*T*G*D*b, and reads the slots.
Source:  inverse of lmc.kernels.quantize. Scales of K differ over the dims of a pair, so rotating
         codes first and scaling them then would not do.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.cases import make_chunk, make_paged, make_rotation, make_slots
from lmc.kernels.paged import AOT_ARGS, PagedKV, check_slots, describe
from lmc.kernels.quantize import (
    FORMATS,
    Quantised,
    QuantisedCase,
    check_device,
    numbers,
    quantize_reference,
)
from lmc.kernels.rerotate import check_rotation, rotate_args
from lmc.kernels.scatter import scatter, scatter_reference
from lmc.kernels.spec import OPTIONS, ROUNDED, KernelSpec, use_kernel


def dequantize_reference(q: Quantised, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.codes.device)
    dtype = torch.promote_types(out.dtype, torch.float32)
    # A layer at a time stays in the processor's cache between the passes over it.
    for layer in range(q.shape[0]):
        k, v = (numbers(codes, dtype) for codes in q.codes[layer])
        out[layer, 0] = k.mul_(q.k_scale[layer])
        out[layer, 1] = v.mul_(q.v_scale[layer, :, :, None])
    return out


def scatter_quantised_reference(
    q: Quantised,
    paged: PagedKV,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> None:
    dtype = torch.promote_types(paged.dtype, torch.float32)
    chunk = dequantize_reference(q, torch.empty(q.shape, dtype=dtype, device=q.codes.device))
    scatter_reference(chunk, paged, slots, cos, sin, interleaved=interleaved)


@triton.jit
def _numbers(
    p_row, m_t, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    C_D: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What COUNT codes from dim FIRST on stand for, the first BLOCK of them, in fp32."""
    if PACKED:
        o = tl.arange(0, BLOCK // 2)
        m = m_t[:, None] & (o < COUNT // 2)[None, :]
        p = p_row[:, None] + ((FIRST // 2 + o) * C_D)[None, :]
        b_codes = tl.load(p, mask=m, other=0).to(tl.int32)
        return (tl.interleave(b_codes & 15, b_codes >> 4) - 8).to(tl.float32)
    else:
        o = tl.arange(0, BLOCK)
        m = m_t[:, None] & (o < COUNT)[None, :]
        return tl.load(p_row[:, None] + ((FIRST + o) * C_D)[None, :], mask=m).to(tl.float32)


@triton.jit
def _keys(
    p_row, p_scale, m_t, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    C_D: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, BLOCK)
    b_x = _numbers(p_row, m_t, FIRST, COUNT, BLOCK, C_D, PACKED)
    return b_x * tl.load(p_scale + FIRST + o, mask=o < COUNT)[None, :]


@triton.jit
def _put(
    p_row, b_x, m_t, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    PAGE_D: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, BLOCK)
    m = m_t[:, None] & (o < COUNT)[None, :]
    tl.store(p_row[:, None] + ((FIRST + o) * PAGE_D)[None, :], b_x, mask=m)


# Numbers that differ from call to call, and where an index begins, must not compile it anew.
@triton.jit(do_not_specialize=["T", "t_kv"], do_not_specialize_on_alignment=["slots", "table"])
def _dequantize_kernel(
    codes, k_scale, v_scale, pages, slots, cos, sin, T, c_l, c_kv, c_t, c_g, s_l, s_t, s_g,
    table, t_kv, limit, k_n, k_p, k_g, v_n, v_p, v_g,
    K_D: tl.constexpr, V_D: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr,
    C_D: tl.constexpr, D: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """pages: only the type of its elements is used."""
    i_g, G = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_l = tl.program_id(2).to(tl.int64) // 2
    i_kv = tl.program_id(2).to(tl.int64) % 2
    o_t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    b_slot = tl.load(slots + o_t, mask=o_t < T, other=-1)
    b_page, b_offset = b_slot // P, b_slot % P
    m_t = (b_slot >= 0) & (b_slot < limit)
    p_row = codes + i_l * c_l + i_kv * c_kv + i_g * c_g + o_t * c_t
    base = tl.multiple_of(tl.load(table + i_kv * t_kv + i_l).to(pages.dtype), ALIGN)
    if i_kv == 0:
        p_page = base + i_g * k_g + b_page * k_n + b_offset * k_p
        p_scale = k_scale + (i_l * G + i_g) * D
        if R > 0:
            o_r = tl.arange(0, BLOCK_R)
            b_cos = tl.load(cos + o_r, mask=o_r < R // 2)[None, :]
            b_sin = tl.load(sin + o_r, mask=o_r < R // 2)[None, :]
            if INTERLEAVED:
                b_ab = _keys(p_row, p_scale, m_t, 0, R, 2 * BLOCK_R, C_D, PACKED)
                b_a, b_b = tl.split(tl.reshape(b_ab, (BLOCK_T, BLOCK_R, 2)))
                b_ab = tl.interleave(b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin)
                _put(p_page, b_ab, m_t, 0, R, 2 * BLOCK_R, K_D)
            else:
                b_a = _keys(p_row, p_scale, m_t, 0, R // 2, BLOCK_R, C_D, PACKED)
                b_b = _keys(p_row, p_scale, m_t, R // 2, R // 2, BLOCK_R, C_D, PACKED)
                _put(p_page, b_a * b_cos - b_b * b_sin, m_t, 0, R // 2, BLOCK_R, K_D)
                _put(p_page, b_b * b_cos + b_a * b_sin, m_t, R // 2, R // 2, BLOCK_R, K_D)
        for first in tl.static_range(R, D, BLOCK_REST):
            b_rest = _keys(p_row, p_scale, m_t, first, D - first, BLOCK_REST, C_D, PACKED)
            _put(p_page, b_rest, m_t, first, D - first, BLOCK_REST, K_D)
    else:
        p_page = base + i_g * v_g + b_page * v_n + b_offset * v_p
        b_scale = tl.load(v_scale + i_l * s_l + o_t * s_t + i_g * s_g, mask=m_t)
        b_v = _numbers(p_row, m_t, 0, D, BLOCK_D, C_D, PACKED) * b_scale[:, None]
        _put(p_page, b_v, m_t, 0, D, BLOCK_D, V_D)


def _tile(D: int, R: int, interleaved: bool) -> dict[str, int]:
    """8192 codes of one program, so that slots, scales and angles are few beside them.

    Scales and angles of all dims of a tile take registers: with four warps, fp32 would need 190 of
    them, and with the dims that do not turn in one piece it would spill.
    """
    BLOCK_D = triton.next_power_of_2(D)
    return {
        "BLOCK_T": 8192 // BLOCK_D, "BLOCK_D": BLOCK_D,
        **rotate_args(R, D, interleaved), "BLOCK_REST": 64, "num_warps": 8,
    }  # fmt: skip


def scatter_quantised(
    q: Quantised,
    paged: PagedKV,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> None:
    """`scatter` of a quantised chunk, whose codes may lie in pinned host memory like a chunk.

    int4 has two dims in a byte, so it takes only rotations whose halves are even: R % 4 == 0.
    """
    check_slots(slots, paged)
    shape = paged.shape(len(slots))
    if q.shape != shape:
        raise ValueError(f"q must be of a chunk {list(shape)}, got {list(q.shape)}")
    if (cos is None) != (sin is None):
        raise ValueError(f"cos and sin go together, got cos={cos!r}, sin={sin!r}")
    R = 0
    if cos is not None and sin is not None:
        check_rotation(cos, sin, paged.D)
        R = 2 * cos.numel()
        if q.format == "int4" and R % 4:
            raise ValueError(f"cos and sin must be of R % 4 == 0 for int4, got R={R}")
        cos, sin = (x.to(paged.device, non_blocking=True).contiguous() for x in (cos, sin))
    check_device(q.format, paged.device)
    codes, k_scale, v_scale, slots = (
        x.to(paged.device, non_blocking=True) for x in (q.codes, q.k_scale, q.v_scale, slots)
    )
    if not use_kernel(paged.k[0]):
        q = Quantised(codes, k_scale, v_scale, q.dtype)
        if paged.dtype == torch.float32:
            chunk = dequantize_reference(q, torch.empty(q.shape))
            scatter(chunk, paged, slots, cos, sin, interleaved=interleaved)
        else:
            scatter_quantised_reference(q, paged, slots, cos, sin, interleaved=interleaved)
    elif len(slots):
        tile = _tile(paged.D, R, interleaved)
        grid = (paged.G, triton.cdiv(len(slots), tile["BLOCK_T"]), 2 * paged.L)
        with torch.cuda.device_of(codes):
            _dequantize_kernel[grid](
                codes, k_scale.contiguous(), v_scale, paged.k[0], slots.contiguous(), cos, sin,
                len(slots), *codes.stride()[:4], *v_scale.stride(), **paged.kernel_args,
                C_D=codes.stride(4), D=paged.D, PACKED=int(q.format == "int4"), **tile, **OPTIONS,
            )  # fmt: skip


def dequantize(q: Quantised, out: Tensor | None = None) -> Tensor:
    """The chunk [L, 2, T, G, D], in the type that it had or into out."""
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.codes.device)
    elif out.shape != q.shape or out.device != q.codes.device:
        raise ValueError(f"out must be {list(q.shape)} on {q.codes.device}, got {describe(out)}")
    if not use_kernel(out):
        return dequantize_reference(q, out)
    if out.numel():
        # A row of the chunk is a page of one slot.
        layers = [x.unsqueeze(2).unbind() for x in out]
        paged = PagedKV(tuple(k for k, _ in layers), tuple(v for _, v in layers))
        scatter_quantised(q, paged, torch.arange(q.shape[2], device=out.device))
    return out


def make_inputs(case: QuantisedCase, dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {
        "q": quantize_reference(make_chunk(case, dtype, device), case.format),
        "paged": make_paged(case, dtype, device, poisoned=True),
        "slots": make_slots(case, device),
        **make_rotation(case, device),
    }


def _signature(format: str, D: int, R: int, interleaved: bool = False) -> dict[str, str | int]:
    codes = {"int8": "*i8:16", "int4": "*u8:16", "fp8": "*fp8e4nv:16"}[format]
    return {
        "codes": codes, "k_scale": "*fp32:16", "v_scale": "*fp32:16", "pages": "*b:16",
        "slots": "*i64", "cos": "*fp32:16", "sin": "*fp32:16", "T": "i32",
        "c_l": "i32:16", "c_kv": "i32:16", "c_t": "i32:16", "c_g": "i32:16",
        "s_l": "i32", "s_t": "i32", "s_g": 1, **AOT_ARGS,
        "C_D": 1, "D": D, "PACKED": int(format == "int4"), **_tile(D, R, interleaved),
    }  # fmt: skip


CASES = (
    QuantisedCase(T=1, G=1, D=64),
    QuantisedCase(T=37, G=3, D=64, layout="cpu", interleaved=True),
    QuantisedCase(T=21, G=2, D=80, R=32, layout="hnd", slots="holes"),
    QuantisedCase(T=70, G=1, D=128, P=8, rotate=False, layout="cpu", slots="shuffled"),
    QuantisedCase(T=21, G=2, D=96, R=48, layout="joint", slots="shuffled", interleaved=True),
    QuantisedCase(T=70, G=1, D=128),
    QuantisedCase(T=20, G=2, D=256, slots="holes"),
    QuantisedCase(T=7, G=2, D=64, slots="none"),
    QuantisedCase(T=0, G=2, D=64),
)
SPEC = KernelSpec(
    name="dequantize",
    launch=scatter_quantised,
    reference=scatter_quantised_reference,
    kernel=_dequantize_kernel,
    cases=(
        *(replace(case, format="int4") for case in CASES),
        *(replace(case, format=format) for format in ("int8", "fp8") for case in CASES[:4]),
    ),
    bench=QuantisedCase(L=32, T=2048, G=8, D=128),
    inputs=make_inputs,
    bytes=lambda c, b: c.bytes(b) + 8 * c.T,
    check=ROUNDED,
    aot={
        **{format: _signature(format, 128, 128) for format in FORMATS},
        "int4-interleaved": _signature("int4", 128, 128, interleaved=True),
        "int8-partial": _signature("int8", 80, 32),
        "int8-copy": _signature("int8", 128, 0),
    },
    unsupported={"fp8": ("sm_80", "sm_86")},
    traffic={
        **{format: QuantisedCase(L=1, T=512, G=1, D=128, format=format) for format in FORMATS},
        "int4-interleaved": QuantisedCase(L=1, T=512, G=1, D=128, format="int4", interleaved=True),
        "int8-partial": QuantisedCase(L=1, T=512, G=1, D=80, R=32),
        "int8-copy": QuantisedCase(L=1, T=512, G=1, D=128, rotate=False),
    },
    bus=lambda c, b: c.bytes(0),
)
