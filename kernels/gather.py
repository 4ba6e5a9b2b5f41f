"""Collect a chunk's rows from the paged KV cache: all layers, K and V, in one launch.

Shapes: pages L x [N, P, G, D] of K and of V, slots [T] -> out [L, 2, T, G, D]; or the latents of
         MLA, pages L x [N, P, D] -> out [L, 1, T, 1, D].
Formula: out[l, 0, t] = k[l][slots[t] // P, slots[t] % P], out[l, 1, t] the same of v; -1: left out.
Bytes:   reads and writes 2*L*T*G*D*b each (latents: L*T*D*b), and reads the slots.
Source:  the inverse of vLLM's reshape_and_cache, over all layers through a table of addresses.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.cases import Case, make_paged, make_slots, poison
from lmc.kernels.host import gather_host
from lmc.kernels.paged import AOT_ARGS, PagedKV, PagedLatents, check_slots, describe, page_runs
from lmc.kernels.spec import EXACT, OPTIONS, KernelSpec, block_rows, use_kernel


def gather_reference(paged: PagedKV, slots: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.zeros(paged.shape(len(slots)), dtype=paged.dtype, device=paged.device)
    runs = list(page_runs(slots, paged.P))
    for layer, new in enumerate(out):
        # Latents are one side.
        sides = list(zip(new, (paged.k[layer], paged.v[layer]), strict=False))
        for rows, page, offsets in runs:
            for side, pages in sides:
                side[rows] = pages[page, offsets]
    return out


# Numbers that differ from call to call, and where an index begins, must not compile it anew.
@triton.jit(do_not_specialize=["T", "t_kv"], do_not_specialize_on_alignment=["slots", "table"])
def _gather_kernel(
    out, slots, T, o_l, o_kv, o_t, o_g,
    table, t_kv, limit, k_n, k_p, k_g, v_n, v_p, v_g,
    K_D: tl.constexpr, V_D: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr,
    O_D: tl.constexpr, D: tl.constexpr, SIDES: tl.constexpr, CLEAR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0).to(tl.int64)
    i_l = tl.program_id(2).to(tl.int64) // SIDES
    i_kv = tl.program_id(2).to(tl.int64) % SIDES
    o_row = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    b_slot = tl.load(slots + o_row, mask=o_row < T, other=-1)
    b_page, b_offset = b_slot // P, b_slot % P
    m_d = (o_d < D)[None, :]
    m = ((b_slot >= 0) & (b_slot < limit))[:, None] & m_d
    m_out = (o_row < T)[:, None] & m_d if CLEAR else m
    p_out = out + i_l * o_l + i_kv * o_kv + i_g * o_g
    p_out = (p_out + o_row * o_t)[:, None] + (o_d * O_D)[None, :]
    base = tl.multiple_of(tl.load(table + i_kv * t_kv + i_l).to(out.dtype), ALIGN)
    if i_kv == 0:
        p_k = (base + i_g * k_g + b_page * k_n + b_offset * k_p)[:, None] + (o_d * K_D)[None, :]
        tl.store(p_out, tl.load(p_k, mask=m, other=0), mask=m_out)
    else:
        p_v = (base + i_g * v_g + b_page * v_n + b_offset * v_p)[:, None] + (o_d * V_D)[None, :]
        tl.store(p_out, tl.load(p_v, mask=m, other=0), mask=m_out)


def gather(paged: PagedKV, slots: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows of `slots` as one chunk [L, 2, T, G, D], where the pages are.

    Of latents it is [L, 1, T, 1, D]. Slot -1 leaves that row of out untouched; in an out made here
    it is zero.
    """
    check_slots(slots, paged)
    shape = paged.shape(len(slots))
    if out is not None and (out.shape, out.dtype, out.device) != (shape, paged.dtype, paged.device):
        raise ValueError(
            f"out must be {paged.dtype} {list(shape)} on {paged.device}, got {describe(out)}"
        )
    slots = slots.to(paged.device, non_blocking=True)
    clear, kernel = out is None, use_kernel(paged.k[0])
    if out is None:
        make = torch.empty if kernel else torch.zeros  # the kernel writes the zeros, too
        out = make(shape, dtype=paged.dtype, device=paged.device)
    if not kernel:
        if paged.sides == 2:
            gather_host(paged, slots, out)
            return out
        return gather_reference(paged, slots, out)
    if len(slots):
        BLOCK_T = block_rows(paged.D)
        grid = (paged.G, triton.cdiv(len(slots), BLOCK_T), shape[1] * paged.L)
        with torch.cuda.device_of(out):
            _gather_kernel[grid](
                out, slots.contiguous(), len(slots), *out.stride()[:4],
                **paged.kernel_args, O_D=out.stride(-1), D=paged.D, SIDES=shape[1],
                CLEAR=int(clear), BLOCK_T=BLOCK_T, BLOCK_D=triton.next_power_of_2(paged.D),
                **OPTIONS,
            )  # fmt: skip
    return out


@dataclass(frozen=True)
class LatentCase(Case):
    """Latents of MLA, the last R dims of which are rotated."""

    G: int = 1
    D: int = 576
    R: int | None = 64


def make_latents(case: Case, dtype: torch.dtype, device: str, *, poisoned: bool) -> PagedKV:
    k = make_paged(case, dtype, device, poisoned=poisoned).k
    return PagedLatents([x.squeeze(2) for x in k])


def chunk_bytes(case: Case, b: int) -> int:
    sides = 1 if isinstance(case, LatentCase) else 2
    return sides * case.L * case.T * case.G * case.D * b


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    pages = make_latents if isinstance(case, LatentCase) else make_paged
    paged = pages(case, dtype, device, poisoned=False)
    return {
        "paged": paged,
        "slots": make_slots(case, device),
        "out": poison(torch.Size(paged.shape(case.T)), dtype, device),
    }


def _signature(D: int, SIDES: int = 2) -> dict[str, str | int]:
    return {
        "out": "*b:16", "slots": "*i64", "T": "i32",
        "o_l": "i32:16", "o_kv": "i32:16", "o_t": "i32:16", "o_g": "i32:16", **AOT_ARGS,
        "O_D": 1, "D": D, "SIDES": SIDES, "CLEAR": 0,
        "BLOCK_T": block_rows(D), "BLOCK_D": triton.next_power_of_2(D),
    }  # fmt: skip


SPEC = KernelSpec(
    name="gather",
    launch=gather,
    reference=gather_reference,
    kernel=_gather_kernel,
    cases=(
        Case(T=1, G=1, D=64, rotate=False),
        Case(T=37, G=3, D=64, rotate=False, layout="cpu"),
        Case(T=21, G=2, D=80, rotate=False, layout="hnd", slots="holes"),
        Case(T=21, G=2, D=96, rotate=False, layout="joint", slots="shuffled"),
        Case(T=33, G=2, D=64, rotate=False, layout="packed", slots="holes"),
        Case(T=9, G=1, D=128, P=8, rotate=False, layout="cpu", slots="shuffled"),
        Case(T=20, G=2, D=256, rotate=False, slots="holes"),
        Case(T=7, G=2, D=64, rotate=False, slots="none"),
        Case(T=0, G=2, D=64, rotate=False),
        LatentCase(T=21, slots="shuffled"),
        LatentCase(T=19, D=288, R=32, slots="holes"),
    ),
    bench=Case(L=32, T=2048, G=8, D=128, rotate=False),
    inputs=make_inputs,
    bytes=lambda c, b: 2 * chunk_bytes(c, b) + 8 * c.T,
    check=EXACT,
    aot={"D128": _signature(128), "D80": _signature(80), "latents": _signature(576, SIDES=1)},
    traffic={
        **{f"D{D}": Case(L=1, T=256, G=2, D=D, rotate=False) for D in (128, 80)},
        "latents": LatentCase(L=1, T=128),
    },
    bus=chunk_bytes,
)
