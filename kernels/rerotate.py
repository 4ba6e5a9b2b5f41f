"""Rotate keys by one position delta (RoPE), alone.

Shapes: k [..., D], cos and sin [R/2] -> [..., D]; R <= D dims rotate, dims R.. are copied.
Formula: (a, b) -> (a cos - b sin, b cos + a sin) over pairs (i, i+R/2), or (2i, 2i+1) interleaved.
Bytes:   reads and writes rows*D*b each.
Source:  RoFormer, arXiv 2104.09864: rotations add up, R(p + delta) = R(delta) R(p).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.cases import Case, make_chunk, make_rotation, poison
from lmc.kernels.paged import DTYPES, describe
from lmc.kernels.spec import OPTIONS, ROUNDED, KernelSpec, block_rows, use_kernel


def _pairs(x: Tensor, R: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0:R:2], x[..., 1:R:2]
    return x[..., : R // 2], x[..., R // 2 : R]


def rotated(k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """A rotated copy in fp32, not yet rounded: storing it elsewhere rounds on the way."""
    R = 2 * cos.numel()
    copy = torch.empty(k.shape, dtype=torch.promote_types(k.dtype, cos.dtype), device=k.device)
    a, b = _pairs(k, R, interleaved)
    x, y = _pairs(copy, R, interleaved)
    torch.mul(a, cos, out=x).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=y).addcmul_(a, sin)
    if k.shape[-1] > R:
        copy[..., R:] = k[..., R:]
    return copy


def rerotate_reference(
    k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, out: Tensor | None = None
) -> Tensor:
    copy = rotated(k, cos, sin, interleaved)
    return copy.to(k.dtype) if out is None else out.copy_(copy)


@triton.jit
def rotate_tile(
    src, dst, rows, cos, sin,
    SRC_D: tl.constexpr, DST_D: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotate the rows at src, pointers [BLOCK_T], into those at dst, where the mask `rows` holds.

    Whole pairs are loaded before either half is stored, so dst may be src.
    """
    i = tl.arange(0, BLOCK_R)
    m_i = i < R // 2
    b_cos = tl.load(cos + i, mask=m_i)[None, :]
    b_sin = tl.load(sin + i, mask=m_i)[None, :]
    if INTERLEAVED:
        # Pairs are parted in registers: two loads of every other element could not be wide.
        o_r = tl.arange(0, 2 * BLOCK_R)
        m = rows[:, None] & (o_r < R)[None, :]
        b_ab = tl.load(src[:, None] + (o_r * SRC_D)[None, :], mask=m).to(tl.float32)
        b_a, b_b = tl.split(tl.reshape(b_ab, (src.shape[0], BLOCK_R, 2)))
        b_ab = tl.interleave(b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin)
        tl.store(dst[:, None] + (o_r * DST_D)[None, :], b_ab, mask=m)
    else:
        m = rows[:, None] & m_i[None, :]
        p_src, p_dst = src[:, None] + (i * SRC_D)[None, :], dst[:, None] + (i * DST_D)[None, :]
        b_a = tl.load(p_src, mask=m).to(tl.float32)
        b_b = tl.load(p_src + R // 2 * SRC_D, mask=m).to(tl.float32)
        tl.store(p_dst, b_a * b_cos - b_b * b_sin, mask=m)
        tl.store(p_dst + R // 2 * DST_D, b_b * b_cos + b_a * b_sin, mask=m)
    if R < D:
        o_d = R + tl.arange(0, BLOCK_REST)
        m = rows[:, None] & (o_d < D)[None, :]
        b_rest = tl.load(src[:, None] + (o_d * SRC_D)[None, :], mask=m)
        tl.store(dst[:, None] + (o_d * DST_D)[None, :], b_rest, mask=m)


def rotate_args(R: int, D: int, interleaved: bool) -> dict[str, int]:
    """The compile-time arguments of rotate_tile that follow from the rotation."""
    return {
        "R": R,
        "INTERLEAVED": int(interleaved),
        "BLOCK_R": triton.next_power_of_2(max(R // 2, 1)),
        "BLOCK_REST": triton.next_power_of_2(max(D - R, 1)),
    }


@triton.jit
def _rerotate_kernel(
    k, out, cos, sin, T, G, k_l, k_t, k_g, o_l, o_t, o_g,
    K_D: tl.constexpr, O_D: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    # Tiles and heads share the one axis of the grid that has no limit at 65,535.
    i_g = tl.program_id(0).to(tl.int64) % G
    i_l = tl.program_id(1).to(tl.int64)
    o_rows = tl.program_id(0).to(tl.int64) // G * BLOCK_T + tl.arange(0, BLOCK_T)
    p_k = k + i_l * k_l + i_g * k_g + o_rows * k_t
    p_out = out + i_l * o_l + i_g * o_g + o_rows * o_t
    rotate_tile(p_k, p_out, o_rows < T, cos, sin, K_D, O_D, D, R, INTERLEAVED, BLOCK_R, BLOCK_REST)


def check_rotation(cos: Tensor, sin: Tensor, D: int) -> None:
    for name, x in (("cos", cos), ("sin", sin)):
        if x.ndim != 1 or x.dtype != torch.float32 or not 2 <= 2 * x.numel() <= D:
            raise ValueError(f"{name} must be float32 [R/2], 2 <= R <= D={D}, got {describe(x)}")
    if cos.shape != sin.shape:
        raise ValueError(f"cos and sin must be equally long, got {len(cos)} and {len(sin)}")


def rerotate(
    k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, out: Tensor | None = None,
    first: int = 0,
) -> Tensor:  # fmt: skip
    """Keys k [..., D] rotated by the delta whose angles have these cosines and sines.

    out may be k itself, but must not otherwise overlap it. Math in fp32. first: the first dim that
    turns; those before are copied.
    """
    if first:
        out = torch.empty_like(k) if out is None else out
        out[..., :first] = k[..., :first]
        rerotate(k[..., first:], cos, sin, interleaved=interleaved, out=out[..., first:])
        return out
    if k.ndim < 1 or k.dtype not in DTYPES:
        raise ValueError(f"k must be floating [..., D], got {describe(k)}")
    check_rotation(cos, sin, k.shape[-1])
    if out is not None and (out.shape, out.dtype, out.device) != (k.shape, k.dtype, k.device):
        raise ValueError(f"out must be like k, {describe(k)}, got {describe(out)}")
    cos, sin = (x.to(k.device, non_blocking=True) for x in (cos, sin))
    if not use_kernel(k):
        return rerotate_reference(k, cos, sin, interleaved=interleaved, out=out)
    out = torch.empty_like(k) if out is None else out
    if k.ndim > 4:
        for part, part_out in zip(k, out, strict=True):
            rerotate(part, cos, sin, interleaved=interleaved, out=part_out)
    elif k.numel():
        # Whatever the leading axes mean, they are the kernel's L, T and G; missing ones are 1. The
        # longer of the last two is cut into tiles, since both [T, G, D] and [G, T, D] are usual.
        k4, o4 = (x[(None,) * (4 - x.ndim)] for x in (k, out))
        if k4.shape[1] < k4.shape[2]:
            k4, o4 = k4.transpose(1, 2), o4.transpose(1, 2)
        L, T, G, D = k4.shape
        BLOCK_T = block_rows(D)
        with torch.cuda.device_of(k):
            _rerotate_kernel[(G * triton.cdiv(T, BLOCK_T), L)](
                k4, o4, cos.contiguous(), sin.contiguous(), T, G,
                *k4.stride()[:3], *o4.stride()[:3],
                K_D=k4.stride(3), O_D=o4.stride(3), D=D, BLOCK_T=BLOCK_T,
                **rotate_args(2 * cos.numel(), D, interleaved), **OPTIONS,
            )  # fmt: skip
    return out


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    k = make_chunk(case, dtype, device)[:, 0]
    return {"k": k, **make_rotation(case, device), "out": poison(k.shape, dtype, device)}


def _signature(D: int, R: int, interleaved: bool) -> dict[str, str | int]:
    return {
        "k": "*b:16", "out": "*b:16", "cos": "*fp32:16", "sin": "*fp32:16", "T": "i32", "G": "i32",
        "k_l": "i32:16", "k_t": "i32:16", "k_g": "i32:16",
        "o_l": "i32:16", "o_t": "i32:16", "o_g": "i32:16",
        "K_D": 1, "O_D": 1, "D": D, "BLOCK_T": block_rows(D),
        **rotate_args(R, D, interleaved),
    }  # fmt: skip


SPEC = KernelSpec(
    name="rerotate",
    launch=rerotate,
    reference=rerotate_reference,
    kernel=_rerotate_kernel,
    cases=(
        Case(T=1, G=1, D=64),
        Case(T=37, G=3, D=64, interleaved=True),
        Case(T=5, G=2, D=80),
        Case(T=9, G=2, D=80, R=32, interleaved=True),
        Case(T=5, G=2, D=96, R=48),
        Case(T=3, G=2, D=128),
        Case(T=3, G=1, D=256, R=64),
        Case(T=0, G=2, D=64),
    ),
    bench=Case(L=32, T=2048, G=8, D=128),
    inputs=make_inputs,
    bytes=lambda c, b: 2 * c.L * c.T * c.G * c.D * b,
    check=ROUNDED,
    aot={
        "neox": _signature(128, 128, False),
        "interleaved": _signature(128, 128, True),
        "partial": _signature(80, 32, False),
    },
    traffic={
        "neox": Case(L=1, T=256, G=2, D=128),
        "interleaved": Case(L=1, T=256, G=2, D=128, interleaved=True),
        "partial": Case(L=1, T=256, G=2, D=80, R=32),
    },
)
