"""Merge what the splits of an attention over keys found, by their log-sum-exps.

Shapes:  parts [S, M, H, D] and lses [S, M, H] in fp32 -> out [M, H, D], lse [M, H]; S splits.
Formula: out = sum_s exp(lses[s] - lse) parts[s], where lse = log sum_s exp(lses[s]).
Bytes:   reads 4*S*M*H*(D + 1), writes M*H*D*b and, where the lse is asked for, 4*M*H.
Source:  the last step of Flash-Decoding, Dao et al. 2023, pytorch.org/blog/flash-decoding.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.cases import poison
from lmc.kernels.paged import describe
from lmc.kernels.spec import OPTIONS, ROUNDED, KernelSpec, use_kernel


def merge_reference(parts: Tensor, lses: Tensor, out: Tensor, lse: Tensor | None = None) -> None:
    total = lses.logsumexp(dim=0)
    out.copy_((parts * (lses - total).exp()[..., None]).sum(dim=0))
    if lse is not None:
        lse.copy_(total)


@triton.jit
def _merge_kernel(
    parts, lses, out, lse, S, rows, H, o_m, o_h, l_m,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_row < rows
    m = m_row[:, None] & (o_d < D)[None, :]
    b_out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    b_max = tl.full((BLOCK_T,), -1e30, tl.float32)  # finite: the difference of two stays a number
    b_sum = tl.zeros((BLOCK_T,), tl.float32)
    o_part = o_row
    for _ in range(S):
        b_lse = tl.load(lses + o_part, mask=m_row, other=0.0)
        b_part = tl.load(parts + (o_part * D)[:, None] + o_d[None, :], mask=m, other=0.0)
        b_new = tl.maximum(b_max, b_lse)
        b_shrink, b_weight = tl.exp(b_max - b_new), tl.exp(b_lse - b_new)
        b_out = b_out * b_shrink[:, None] + b_part * b_weight[:, None]
        b_sum = b_sum * b_shrink + b_weight
        b_max = b_new
        o_part += rows
    p_out = out + (o_row // H * o_m + o_row % H * o_h)[:, None] + o_d[None, :]
    tl.store(p_out, b_out / b_sum[:, None], mask=m)
    if LSE:
        tl.store(lse + o_row // H * l_m + o_row % H, b_max + tl.log(b_sum), mask=m_row)


def _rows(D: int) -> int:
    """Of one program, which is one warp: in decoding there are few rows to share out, and each is
    a loop over splits. Eight elements a thread of AMD's are the widest accesses in bf16."""
    return max(1, 512 // triton.next_power_of_2(D))


def merge(parts: Tensor, lses: Tensor, out: Tensor, lse: Tensor | None = None) -> None:
    """Merge into out [M, H, D], of any dtype, and lse [M, H], the last axes of both contiguous.

    A part whose lse is -inf has no keys and no weight; every row needs one that has.
    """
    S, M, H, D = parts.shape if parts.ndim == 4 else (0, 0, 0, 0)
    if not S or not parts.is_contiguous() or parts.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"parts must be contiguous float32 [S, M, H, D], got {describe(parts)}")
    for name, x, shape, dtype in (
        ("lses", lses, (S, M, H), parts.dtype),
        ("out", out, (M, H, D), out.dtype),
        ("lse", lse, (M, H), parts.dtype),
    ):
        if x is None:
            continue
        if (x.shape, x.dtype, x.device) != (shape, dtype, parts.device):
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {parts.device}, got {describe(x)}"
            )
        if x.numel() and x.stride(-1) != 1:
            raise ValueError(f"the last stride of {name} must be 1, got {x.stride()}")
    if not use_kernel(parts):
        merge_reference(parts, lses, out, lse)
    elif M:
        BLOCK_T = _rows(D)
        with torch.cuda.device_of(out):
            _merge_kernel[(triton.cdiv(M * H, BLOCK_T),)](
                parts, lses.contiguous(), out, lse, S, M * H, H, *out.stride()[:2],
                0 if lse is None else lse.stride(0), D=D, BLOCK_T=BLOCK_T,
                BLOCK_D=triton.next_power_of_2(D), LSE=lse is not None,
                num_warps=1, **OPTIONS,
            )  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """S partial results of M rows; empty: of them only the last holds keys of every row."""

    M: int
    H: int
    D: int
    S: int
    empty: bool = False

    def __str__(self) -> str:
        return f"M{self.M}-H{self.H}-D{self.D}-S{self.S}" + ("-empty" if self.empty else "")


def make_inputs(case: Parts, dtype: torch.dtype, device: str) -> dict[str, Any]:
    random = torch.Generator().manual_seed(case.M * 1009 + case.D + case.S)
    shape = (case.S, case.M, case.H, case.D)
    parts, lses = torch.randn(shape, generator=random), torch.randn(shape[:3], generator=random)
    if case.empty:
        lses[: case.S // 2] = -torch.inf
        lses[:-1, ::2] = -torch.inf
    return {
        "parts": parts.to(device),
        "lses": (4 * lses).to(device),
        "out": poison(torch.Size(shape[1:]), dtype, device),
        "lse": poison(torch.Size(shape[1:3]), torch.float32, device),
    }


SPEC = KernelSpec(
    name="split",
    launch=merge,
    reference=merge_reference,
    kernel=_merge_kernel,
    cases=(
        Parts(M=1, H=1, D=64, S=1),
        Parts(M=9, H=3, D=80, S=2),
        Parts(M=5, H=7, D=96, S=7, empty=True),
        Parts(M=20, H=4, D=128, S=3, empty=True),
        Parts(M=3, H=2, D=256, S=5),
        Parts(M=0, H=4, D=64, S=2),
    ),
    bench=Parts(M=64, H=32, D=128, S=8),
    inputs=make_inputs,
    bytes=lambda c, b: c.M * c.H * (4 * c.S * (c.D + 1) + c.D * b + 4),
    check=ROUNDED,
    traffic={f"D{D}": Parts(M=64, H=4, D=D, S=4) for D in (64, 80, 128)},
    aot={
        f"D{D}": {
            "parts": "*fp32:16", "lses": "*fp32:16", "out": "*b:16", "lse": "*fp32:16",
            "S": "i32", "rows": "i32", "H": "i32:16", "o_m": "i32:16", "o_h": "i32:16",
            "l_m": "i32:16", "D": D, "BLOCK_T": _rows(D),
            "BLOCK_D": triton.next_power_of_2(D), "LSE": 1, "num_warps": 1,
        }
        for D in (64, 80, 128)
    },
)  # fmt: skip
