"""Put rows that lie in runs anywhere in one buffer into the paged KV cache, each run turned alone.

Shapes: buffer [U, G, D], slots [M], runs [n, 5], cos and sin [C, R/2], by_layer [L]
         -> pages L x [N, P, G, D] of K and of V; or latents, buffer [U, 1, D] -> L x [N, P, D].
Formula: that of lmc.kernels.scatter for each run (first, T, base, stride, turn): its row i goes to
         slots[first + i] and is, of layer l and side s, buffer[base + (2*l + s) * stride + i];
         of latents, which have one side, buffer[base + l * stride + i].
         Keys turn by cos[t] and sin[t], t = by_layer[l] + turn; where either is -1, not at all.
Bytes:   reads and writes 2*L*M*G*D*b each, and reads the slots.
Source:  a claim is many chunks: a launch for each would cost more than its bytes. vLLM's
         reshape_and_cache has an index per row for the target, here is one per run for the source.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.cases import Case, make_paged, make_slots
from lmc.kernels.gather import LatentCase, chunk_bytes, make_latents
from lmc.kernels.host import scatter_runs_host
from lmc.kernels.paged import AOT_ARGS, PagedKV, check_slots, describe
from lmc.kernels.rerotate import rotate_args, rotate_tile
from lmc.kernels.scatter import scatter_reference
from lmc.kernels.spec import OPTIONS, ROUNDED, KernelSpec, block_rows, use_kernel


def scatter_runs_reference(
    buffer: Tensor,
    paged: PagedKV,
    slots: Tensor,
    runs: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    by_layer: Tensor | None = None,
    interleaved: bool = False,
    layers: tuple[int, int] | None = None,
) -> None:
    G, D, sides = paged.G, paged.D, paged.sides
    before = [0] * paged.L if by_layer is None else by_layer.tolist()
    for i in range(*(layers or (0, paged.L))):
        one = paged.some(i, i + 1)
        for first, T, base, stride, turn in runs.tolist():
            strides = (sides * stride * G * D, stride * G * D, G * D, D, 1)
            chunk = buffer[base + sides * i * stride :].as_strided((1, sides, T, G, D), strides)
            angles: tuple[Tensor, ...] = ()
            if cos is not None and sin is not None and min(turn, before[i]) >= 0:
                angles = cos[before[i] + turn], sin[before[i] + turn]
            scatter_reference(
                chunk, one, slots[first : first + T], *angles, interleaved=interleaved
            )


# Numbers that differ from claim to claim, and where an index begins, must not compile it anew.
@triton.jit(
    do_not_specialize=["U", "M", "C", "first_layer", "t_kv"],
    do_not_specialize_on_alignment=["slots", "runs", "by_layer", "table"],
)
def _scatter_runs_kernel(
    buffer, slots, runs, cos, sin, by_layer, U, M, C, first_layer,
    table, t_kv, limit, k_n, k_p, k_g, v_n, v_p, v_g,
    K_D: tl.constexpr, V_D: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BY_LAYER: tl.constexpr, SIDES: tl.constexpr, R0: tl.constexpr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    p_run = runs + tl.program_id(0).to(tl.int64) * 5
    i_g = tl.program_id(1).to(tl.int64)
    i_l = first_layer + tl.program_id(2).to(tl.int64) // SIDES
    i_kv = tl.program_id(2).to(tl.int64) % SIDES
    first, T, turn = tl.load(p_run), tl.load(p_run + 1), tl.load(p_run + 4)
    if BY_LAYER:
        before = tl.load(by_layer + i_l)
        turn = tl.where((turn < 0) | (before < 0), -1, before + turn)
    at = tl.load(p_run + 2) + (SIDES * i_l + i_kv) * tl.load(p_run + 3)
    # On a GPU nobody checked them: what is out of range is left alone.
    inside = (first >= 0) & (first + T <= M) & (at >= 0) & (at + T <= U) & (turn < C)
    base = tl.multiple_of(tl.load(table + i_kv * t_kv + i_l).to(buffer.dtype), ALIGN)
    o_d = tl.arange(0, BLOCK_D)
    for start in range(0, tl.where(inside, T, 0), BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        b_slot = tl.load(slots + first + o_t, mask=o_t < T, other=-1)
        b_page, b_offset = b_slot // P, b_slot % P
        m_t = (b_slot >= 0) & (b_slot < limit)
        m = m_t[:, None] & (o_d < D)[None, :]
        p_row = buffer + (at + o_t) * (G * D) + i_g * D
        p_x = p_row[:, None] + o_d[None, :]
        if i_kv == 0:
            p_k = base + i_g * k_g + b_page * k_n + b_offset * k_p
            if turn < 0:
                tl.store(p_k[:, None] + (o_d * K_D)[None, :], tl.load(p_x, mask=m), mask=m)
            elif R > 0:
                if R0 > 0:
                    m_0 = m_t[:, None] & (o_d < R0)[None, :]
                    tl.store(p_k[:, None] + (o_d * K_D)[None, :], tl.load(p_x, mask=m_0), mask=m_0)
                p_cos, p_sin = cos + turn * (R // 2), sin + turn * (R // 2)
                rotate_tile(
                    p_row + R0, p_k + R0 * K_D, m_t, p_cos, p_sin,
                    1, K_D, D - R0, R, INTERLEAVED, BLOCK_R, BLOCK_REST,
                )  # fmt: skip
        else:
            p_v = base + i_g * v_g + b_page * v_n + b_offset * v_p
            tl.store(p_v[:, None] + (o_d * V_D)[None, :], tl.load(p_x, mask=m), mask=m)


def scatter_runs(
    buffer: Tensor,
    paged: PagedKV,
    slots: Tensor,
    runs: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    by_layer: Tensor | None = None,
    interleaved: bool = False,
    layers: tuple[int, int] | None = None,
) -> None:
    """Write rows out of buffer [U, G, D] to `slots` int64 [M], as `runs` int64 [n, 5] have them.

    A run is (first, T, base, stride, turn): see the module. Slots must be distinct; -1 skips a row.
    by_layer: int64 [L], what each layer adds to its turns, or -1; None: nothing, in all of them.
    layers: the first and the one behind the last, of all of which `runs` speak; None: all.

    With pages on a GPU the buffer lies there too, or in pinned host memory: then the kernel reads
    it over the bus, by the address that the driver gives it on the device, and nothing is staged
    (untested on a GPU). Keep what is read unchanged until the current stream has passed.
    """
    check_slots(slots, paged)
    low, high = layers or (0, paged.L)
    if not 0 <= low < high <= paged.L:
        raise ValueError(f"layers must be in 0..{paged.L}, got {low}..{high}")
    if (
        buffer.shape[1:] != (paged.G, paged.D)
        or buffer.dtype != paged.dtype
        or not buffer.is_contiguous()
    ):
        raise ValueError(
            f"buffer must be {paged.dtype} [U, {paged.G}, {paged.D}], contiguous, "
            f"got {describe(buffer)}"
        )
    if paged.k[0].is_cuda and not (buffer.is_cuda or buffer.is_pinned()):
        raise ValueError(f"buffer must be pinned or on {paged.device}, got {describe(buffer)}")
    if (cos is None) != (sin is None):
        raise ValueError(f"cos and sin go together, got cos={cos!r}, sin={sin!r}")
    R = C = 0
    n = _rotations(by_layer, paged.L)
    if cos is not None and sin is not None:
        for name, x in (("cos", cos), ("sin", sin)):
            if x.ndim != 2 or x.dtype != torch.float32 or not 2 <= 2 * x.shape[1] <= paged.D:
                raise ValueError(
                    f"{name} must be float32 [C, R/2], 2 <= R <= D={paged.D}, got {describe(x)}"
                )
        if cos.shape != sin.shape:
            raise ValueError(f"cos and sin must be alike, got {describe(cos)}, {describe(sin)}")
        C, R = len(cos), 2 * cos.shape[1]
        cos, sin = (x.to(paged.device, non_blocking=True).contiguous() for x in (cos, sin))
    _check_runs(runs, len(slots), len(buffer), C - n, paged.L, paged.sides)
    slots, runs, offsets = (
        x.to(paged.device, non_blocking=True).contiguous()
        for x in (slots, runs, slots if by_layer is None else by_layer)
    )
    if not use_kernel(paged.k[0]):
        host = paged.dtype == torch.float32 and paged.sides == 2
        put = scatter_runs_host if host else scatter_runs_reference
        how: dict[str, Any] = {"by_layer": by_layer, "interleaved": interleaved}
        put(buffer, paged, slots, runs, cos, sin, layers=(low, high), **how)
    elif len(runs):
        R0 = paged.turned_from(R) if R else 0
        grid = (len(runs), paged.G, paged.sides * (high - low))
        with torch.cuda.device_of(paged.k[0]):
            _scatter_runs_kernel[grid](
                buffer, slots, runs, cos, sin, offsets, len(buffer), len(slots), C, low,
                **paged.kernel_args, G=paged.G, D=paged.D,
                BLOCK_T=block_rows(paged.D), BLOCK_D=triton.next_power_of_2(paged.D),
                BY_LAYER=int(by_layer is not None), SIDES=paged.sides, R0=R0,
                **rotate_args(R, paged.D - R0, interleaved), **OPTIONS,
            )  # fmt: skip


def _rotations(by_layer: Tensor | None, L: int) -> int:
    """The furthest that a layer's turns lie behind the first; raise unless it is int64 [L]."""
    if by_layer is None:
        return 0
    if by_layer.shape != (L,) or by_layer.dtype != torch.int64:
        raise ValueError(f"by_layer must be int64 [{L}], got {describe(by_layer)}")
    if by_layer.device.type != "cpu":
        return 0
    if int(by_layer.min()) < -1:
        raise ValueError(f"by_layer must be -1 or more, got {int(by_layer.min())}")
    return max(0, int(by_layer.max()))


def _check_runs(runs: Tensor, M: int, U: int, C: int, L: int, sides: int) -> None:
    """Raise unless runs is int64 [n, 5] of runs inside slots [M], buffer [U] and angles [C].

    What is in them is checked where that is free, on the host, as slots are.
    """
    if runs.ndim != 2 or runs.shape[1] != 5 or runs.dtype != torch.int64:
        raise ValueError(f"runs must be int64 [n, 5], got {describe(runs)}")
    if runs.device.type != "cpu":
        return
    first, T, base, stride, turn = runs.unbind(1)
    wrong = (runs[:, :4] < 0).any(1) | (first + T > M) | (turn < -1) | (turn >= C)
    wrong |= base + (sides * L - 1) * stride + T > U
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"runs must be (first, T, base, stride, turn) inside {M} slots, {U} rows of {L} layers "
            f"and {C} turns, got {runs[at].tolist()} for runs[{at}]"
        )


@dataclass(frozen=True)
class RunsCase(Case):
    """T rows out of runs of at most `run`, in any order; the first is copied, two turns follow.

    first: the first layer that is put. apart: layers turn by other rotations than their
    neighbours, and one in three not at all.
    """

    run: int = 5
    first: int = 0
    apart: bool = False


@dataclass(frozen=True)
class LatentRunsCase(LatentCase, RunsCase):
    """Latents, the last R dims of which are rotated."""


def make_inputs(case: RunsCase, dtype: torch.dtype, device: str) -> dict[str, Any]:
    random = torch.Generator().manual_seed(case.T * 1009 + case.G * 31 + case.D)
    starts = list(range(0, case.T, case.run))
    lengths = [min(case.run, case.T - start) for start in starts]
    latents = isinstance(case, LatentCase)
    sides = 1 if latents else 2
    runs, token = [], 3  # a few that are nobody's lie before
    for i in torch.randperm(len(starts), generator=random).tolist():
        turn = i % 3 - 1 if case.rotate else -1
        runs.append((starts[i], lengths[i], token * sides * case.L, lengths[i], turn))
        token += lengths[i]
    buffer = torch.randn((token * sides * case.L, case.G, case.D), generator=random)
    angles: dict[str, Any] = {}
    if case.rotate:
        R = case.R or case.D
        turns = torch.tensor([[123.0], [-4567.0]], dtype=torch.float64)
        bases = (1e4, 1e6) if case.apart else (1e4,)
        exponent = -torch.arange(0, R, 2, dtype=torch.float64) / R
        angle = torch.cat([turns * base**exponent for base in bases])
        angles = {"cos": angle.cos().float().to(device), "sin": angle.sin().float().to(device)}
    return {
        "buffer": buffer.to(device, dtype),
        "paged": (make_latents if latents else make_paged)(case, dtype, device, poisoned=True),
        "slots": make_slots(case, device),
        "runs": torch.tensor(runs, dtype=torch.int64, device=device).view(-1, 5),
        **angles,
        "by_layer": torch.tensor([(-1, 0, 2)[i % 3] for i in range(case.L)], device=device)
        if case.apart
        else None,
        "interleaved": case.interleaved,
        "layers": (case.first, case.L),
    }


def _signature(
    D: int, R: int, interleaved: bool = False, apart: bool = False, latents: bool = False
) -> dict[str, str | int]:
    R0 = D - R if latents else 0
    return {
        "buffer": "*b:16", "slots": "*i64", "runs": "*i64", "cos": "*fp32:16", "sin": "*fp32:16",
        "by_layer": "*i64", "BY_LAYER": int(apart),
        "U": "i64", "M": "i32", "C": "i32", "first_layer": "i32", **AOT_ARGS,
        "G": 1 if latents else 8, "D": D, "SIDES": 1 if latents else 2, "R0": R0,
        "BLOCK_T": block_rows(D), "BLOCK_D": triton.next_power_of_2(D),
        **rotate_args(R, D - R0, interleaved),
    }  # fmt: skip


SPEC = KernelSpec(
    name="scatter_runs",
    launch=scatter_runs,
    reference=scatter_runs_reference,
    kernel=_scatter_runs_kernel,
    cases=(
        RunsCase(T=1, G=1, D=64),
        RunsCase(T=37, G=3, D=64, layout="cpu"),
        RunsCase(T=37, G=3, D=64, layout="cpu", slots="holes", interleaved=True, run=16),
        RunsCase(T=21, G=2, D=80, R=32, layout="hnd", slots="holes", first=1),
        RunsCase(T=21, G=2, D=96, R=48, layout="joint", slots="shuffled", interleaved=True),
        RunsCase(T=90, G=1, D=128, P=8, layout="cpu", slots="shuffled", run=80),
        RunsCase(T=20, G=2, D=256, L=3, slots="holes", first=2),
        RunsCase(T=33, G=2, D=64, layout="packed", run=9),
        RunsCase(T=21, G=2, D=64, rotate=False, layout="hnd", slots="shuffled"),
        RunsCase(T=21, G=1, D=64, L=5, layout="cpu", apart=True),
        RunsCase(T=33, G=2, D=80, R=32, L=4, slots="shuffled", apart=True, first=1),
        RunsCase(T=7, G=2, D=64, slots="none"),
        RunsCase(T=0, G=2, D=64),
        LatentRunsCase(T=37, slots="shuffled", interleaved=True),
        LatentRunsCase(T=19, D=288, R=32, L=3, slots="holes", apart=True, first=1),
        LatentRunsCase(T=9, rotate=False),
    ),
    bench=RunsCase(L=32, T=2048, G=8, D=128, run=33),
    inputs=make_inputs,
    bytes=lambda c, b: 2 * chunk_bytes(c, b) + 8 * c.T,
    check=ROUNDED,
    aot={
        "copy": _signature(128, 0),
        "neox": _signature(128, 128),
        "interleaved": _signature(128, 128, interleaved=True),
        "partial": _signature(80, 32),
        "apart": _signature(128, 128, apart=True),
        "latents": _signature(576, 64, interleaved=True, latents=True),
    },
    traffic={
        "copy": RunsCase(L=1, T=256, G=2, D=128, rotate=False, run=64),
        "neox": RunsCase(L=1, T=256, G=2, D=128, run=64),
        "interleaved": RunsCase(L=1, T=256, G=2, D=128, interleaved=True, run=64),
        "partial": RunsCase(L=1, T=256, G=2, D=80, R=32, run=64),
        "apart": RunsCase(L=3, T=256, G=2, D=128, apart=True, run=64),
        "latents": LatentRunsCase(L=1, T=128, interleaved=True, run=64),
    },
    bus=chunk_bytes,
)
