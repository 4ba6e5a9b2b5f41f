"""How far each fresh row of K, V or both is from the cached one, storing the fresh rows on the way.

Shapes: k, v [T, G, D], pages [N, P, G, D] of K and of V of one layer, slots [T] -> scores [T] fp32.
Formula: over G*D, with x fresh and y cached: sum |x-y|, or sum (x-y)^2, or 1 - cos(x, y); both is
         the sum of K's and V's. Slot -1: the row is left out and scores 0.
Bytes:   reads T*G*D*b fresh and as much cached for each tensor scored, and the slots; writes the
         scores. With write=True both tensors are read fresh, and written: 2*T*G*D*b more.
Source:  CacheBlend, arXiv 2405.16444: its code takes squares of V, LMCache's of K after RoPE, and
         UCM's absolute differences of K.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.cases import Case, make_chunk, make_paged, make_slots, poison
from lmc.kernels.paged import PagedKV, check_slots, describe
from lmc.kernels.spec import EXACT, OPTIONS, KernelSpec, use_kernel

Which = Literal["k", "v", "both"]
Norm = Literal["l1", "squared", "cosine"]
# What the kernel calls the norms: compile-time arguments are numbers.
NORMS: dict[Norm, int] = {"l1": 1, "squared": 2, "cosine": 3}


def _root(x: Tensor) -> Tensor:
    """Correctly rounded, as a GPU's and numpy's is: torch's fp32 root on a CPU (MKL) is an ulp off
    for a fifth of all values."""
    return x.double().sqrt().to(x.dtype)


def _score(x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """Scores [T] of x [T, G*D] against y."""
    d = x - y
    if norm == "l1":
        return d.abs().sum(1)
    squares = d.square().sum(1)
    if norm == "squared":
        return squares
    # 1 - xy/(|x||y|) loses every digit where rows are nearly equal, which most are; by the law of
    # cosines it is also (|x-y|^2 - (|x|-|y|)^2) / (2|x||y|), which keeps them.
    far, nx, ny = _root(squares), _root(x.square().sum(1)), _root(y.square().sum(1))
    cosine = (far - (nx - ny)) * (far + (nx - ny)) / (2 * nx * ny)
    # A row of zeros has no direction: as far as can be from any other, equal to its like.
    return torch.where(nx * ny == 0, (far > 0).to(x.dtype), cosine.clamp_min(0))


def deviation_reference(
    k: Tensor,
    v: Tensor,
    paged: PagedKV,
    slots: Tensor,
    *,
    tensor: Which = "v",
    norm: Norm = "squared",
    write: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    math = torch.promote_types(k.dtype, torch.float32)
    out = torch.empty(len(slots), dtype=math, device=k.device) if out is None else out
    rows = (slots >= 0).nonzero().squeeze(1)
    page, offset = slots[rows] // paged.P, slots[rows] % paged.P
    out.zero_()
    for name, fresh, cached in (("k", k, paged.k[0]), ("v", v, paged.v[0])):
        if tensor in (name, "both"):
            x, y = (t.to(math).flatten(1) for t in (fresh[rows], cached[page, offset]))
            out[rows] += _score(x, y, norm)
        if write:
            cached[page, offset] = fresh[rows]
    return out


@triton.jit
def _score_tile(
    new, old, m_t, G, n_g, o_g,
    N_D: tl.constexpr, O_D: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    WRITE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of the rows at new, pointers [BLOCK_T], against those at old; NORM 0 only copies."""
    o_d = tl.arange(0, BLOCK_D)
    m = m_t[:, None] & (o_d < D)[None, :]
    b_score = tl.zeros(new.shape, tl.float32)
    b_xx, b_yy = b_score, b_score
    for _ in range(G):
        p_old = old[:, None] + (o_d * O_D)[None, :]
        b_new = tl.load(new[:, None] + (o_d * N_D)[None, :], mask=m, other=0)
        if NORM > 0:
            b_x = b_new.to(tl.float32)
            b_y = tl.load(p_old, mask=m, other=0).to(tl.float32)
            b_d = b_x - b_y
            b_score += tl.sum(tl.abs(b_d) if NORM == 1 else b_d * b_d, 1)
            if NORM == 3:
                b_xx += tl.sum(b_x * b_x, 1)
                b_yy += tl.sum(b_y * b_y, 1)
        if WRITE:
            tl.store(p_old, b_new, mask=m)
        new += n_g
        old += o_g
    if NORM == 3:
        b_far, b_nx, b_ny = tl.sqrt_rn(b_score), tl.sqrt_rn(b_xx), tl.sqrt_rn(b_yy)
        b_norms = 2 * b_nx * b_ny
        b_cosine = (b_far - (b_nx - b_ny)) * (b_far + (b_nx - b_ny))
        b_cosine = tl.div_rn(b_cosine, tl.where(b_norms == 0, 1.0, b_norms))
        b_cosine = tl.maximum(b_cosine, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_score = tl.where(b_norms == 0, tl.where(b_far > 0, 1.0, 0.0), b_cosine)
    return b_score


@triton.jit
def _deviation_kernel(
    k, v, cached_k, cached_v, slots, out, T, G, limit,
    x_t, x_g, y_t, y_g, k_n, k_p, k_g, v_n, v_p, v_g,
    X_D: tl.constexpr, Y_D: tl.constexpr, K_D: tl.constexpr, V_D: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, K_NORM: tl.constexpr, V_NORM: tl.constexpr, WRITE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    b_slot = tl.load(slots + o_t, mask=o_t < T, other=-1)
    b_page, b_offset = b_slot // P, b_slot % P
    m_t = (b_slot >= 0) & (b_slot < limit)
    b_score = tl.zeros((BLOCK_T,), tl.float32)
    if WRITE or K_NORM > 0:
        p_k = cached_k + b_page * k_n + b_offset * k_p
        b_score += _score_tile(
            k + o_t * x_t, p_k, m_t, G, x_g, k_g, X_D, K_D, D, K_NORM, WRITE, BLOCK_D
        )
    if WRITE or V_NORM > 0:
        p_v = cached_v + b_page * v_n + b_offset * v_p
        b_score += _score_tile(
            v + o_t * y_t, p_v, m_t, G, y_g, v_g, Y_D, V_D, D, V_NORM, WRITE, BLOCK_D
        )
    tl.store(out + o_t, b_score, mask=o_t < T)


def _launch_shape(D: int) -> dict[str, int]:
    """2048 elements a tensor: 16-byte loads in bf16 on 256 threads, AMD's four warps.

    It depends on D alone, so that a row's score has the same bits whatever rows come with it.
    """
    BLOCK_D = triton.next_power_of_2(D)
    return {"BLOCK_T": max(1, 2048 // BLOCK_D), "BLOCK_D": BLOCK_D}


def _norms(tensor: Which, norm: Norm) -> dict[str, int]:
    return {
        "K_NORM": NORMS[norm] if tensor in ("k", "both") else 0,
        "V_NORM": NORMS[norm] if tensor in ("v", "both") else 0,
    }


def deviation(
    k: Tensor,
    v: Tensor,
    paged: PagedKV,
    slots: Tensor,
    *,
    tensor: Which = "v",
    norm: Norm = "squared",
    write: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Scores fp32 [T] of fresh k and v [T, G, D] against the rows of `slots` in one layer's pages.

    Math in fp32; a row whose slot is -1 scores 0. With write=True k and v replace the cached rows
    in the same pass, whichever of them is scored; slots must then be distinct.
    """
    check_slots(slots, paged)
    if paged.L != 1:
        raise ValueError(f"paged must hold one layer, got {paged.L}")
    shape = (len(slots), paged.G, paged.D)
    for name, x in (("k", k), ("v", v)):
        if (x.shape, x.dtype, x.device) != (shape, paged.dtype, paged.device):
            raise ValueError(
                f"{name} must be {paged.dtype} {list(shape)} on {paged.device}, got {describe(x)}"
            )
    for name, value, allowed in (("tensor", tensor, get_args(Which)), ("norm", norm, NORMS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if out is not None and (
        (out.shape, out.dtype, out.device) != (shape[:1], torch.float32, k.device)
        or not out.is_contiguous()
    ):
        raise ValueError(
            f"out must be contiguous torch.float32 {list(shape[:1])} on {k.device}, "
            f"got {describe(out)}, strides {out.stride()}"
        )
    slots = slots.to(k.device, non_blocking=True)
    if not use_kernel(k):
        return deviation_reference(
            k, v, paged, slots, tensor=tensor, norm=norm, write=write, out=out
        )
    out = torch.empty(len(slots), dtype=torch.float32, device=k.device) if out is None else out
    if len(slots):
        tile = _launch_shape(paged.D)
        cached_k, cached_v = paged.k[0], paged.v[0]
        with torch.cuda.device_of(k):
            _deviation_kernel[(triton.cdiv(len(slots), tile["BLOCK_T"]),)](
                k, v, cached_k, cached_v, slots.contiguous(), out,
                len(slots), paged.G, paged.N * paged.P,
                *k.stride()[:2], *v.stride()[:2], *cached_k.stride()[:3], *cached_v.stride()[:3],
                X_D=k.stride(2), Y_D=v.stride(2), K_D=cached_k.stride(3), V_D=cached_v.stride(3),
                P=paged.P, D=paged.D, **_norms(tensor, norm), WRITE=int(write), **tile, **OPTIONS,
            )  # fmt: skip
    return out


@dataclass(frozen=True)
class DeviationCase(Case):
    """One layer and what is asked of it."""

    L: int = 1
    rotate: bool = False
    tensor: Which = "v"
    norm: Norm = "squared"
    write: bool = False

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.tensor}-{self.norm}{'-write' * self.write}"


def make_inputs(case: DeviationCase, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Multiples of 1/8: their sums are exact in fp32, so any order must give the same bits."""

    def eighths(x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    k, v = eighths(make_chunk(case, dtype, device))[0]
    paged = make_paged(case, dtype, device, poisoned=True)
    slots = make_slots(case, device)
    values = make_paged(case, dtype, device, poisoned=False)
    rows = slots[slots >= 0]
    for pages, normal in ((paged.k[0], values.k[0]), (paged.v[0], values.v[0])):
        at = rows // case.P, rows % case.P
        pages[at] = eighths(normal[at])
    return {
        "k": k, "v": v, "paged": paged, "slots": slots,
        "tensor": case.tensor, "norm": case.norm, "write": case.write,
        "out": poison(torch.Size((case.T,)), torch.float32, device),
    }  # fmt: skip


def _bytes(c: DeviationCase, b: int) -> int:
    scored = 2 if c.tensor == "both" else 1
    rows = scored + (4 if c.write else scored)
    return rows * c.T * c.G * c.D * b + 8 * c.T + 4 * c.T


def _signature(D: int, tensor: Which, norm: Norm, write: bool) -> dict[str, str | int]:
    strides = ("x_t", "x_g", "y_t", "y_g", "k_n", "k_p", "k_g", "v_n", "v_p", "v_g")
    return {
        "k": "*b:16", "v": "*b:16", "cached_k": "*b:16", "cached_v": "*b:16",
        "slots": "*i64:16", "out": "*fp32:16", "T": "i32", "G": "i32", "limit": "i32:16",
        **dict.fromkeys(strides, "i32:16"), "X_D": 1, "Y_D": 1, "K_D": 1, "V_D": 1, "P": 16, "D": D,
        **_norms(tensor, norm), "WRITE": int(write), **_launch_shape(D),
    }  # fmt: skip


SPEC = KernelSpec(
    name="deviation",
    launch=deviation,
    reference=deviation_reference,
    kernel=_deviation_kernel,
    cases=(
        DeviationCase(T=1, G=1, D=64),
        DeviationCase(T=37, G=3, D=64, layout="cpu", tensor="both", norm="cosine", write=True),
        DeviationCase(T=21, G=2, D=80, layout="hnd", slots="holes", norm="l1", write=True),
        DeviationCase(T=21, G=2, D=96, layout="joint", slots="shuffled", tensor="k"),
        DeviationCase(T=9, G=1, D=128, P=8, layout="cpu", slots="shuffled", tensor="k", write=True),
        DeviationCase(T=20, G=8, D=256, slots="holes", tensor="both", norm="l1"),
        DeviationCase(T=1, G=1, D=80, norm="cosine"),
        DeviationCase(T=7, G=2, D=64, slots="none", write=True),
        DeviationCase(T=0, G=2, D=64),
    ),
    bench=DeviationCase(T=8192, G=8, D=128, write=True),
    inputs=make_inputs,
    bytes=_bytes,
    check=EXACT,
    aot={
        "squared": _signature(128, "v", "squared", True),
        "both-l1": _signature(80, "both", "l1", True),
        "both-cosine": _signature(128, "both", "cosine", True),
    },
    traffic={
        "squared": DeviationCase(T=256, G=2, D=128, write=True),
        "both-l1": DeviationCase(T=256, G=2, D=80, tensor="both", norm="l1", write=True),
        "both-cosine": DeviationCase(T=256, G=2, D=128, tensor="both", norm="cosine", write=True),
    },
)
