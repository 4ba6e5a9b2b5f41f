"""Attention of any rows of a prompt against paged keys and values, masked by absolute position.

Shapes:  q [M, H, D], positions [M], k [N, P, G, D], v [N, P, G, D_v], tables [B, pages]
         -> out [M, H, D_v]. Latents of MLA are keys of one head, D_v of their dims its values.
Formula: out[i] = softmax(scale q[i] K^T) V over the keys k_pos <= positions[i] of its request.
Bytes:   reads q and, once, the keys and values that any row needs, G*(D + D_v)*b a token; writes
         out.
         Tiles of one request read them again, but out of L2, where a layer's 32 MiB at 8K stay.
Source:  FlashAttention-2, arXiv 2307.08691; splits over keys: Flash-Decoding, Dao et al. 2023.
"""

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.cases import Case, make_paged, poison
from lmc.kernels.paged import PagedKV, describe
from lmc.kernels.query_rows import (
    Prompts,
    QueryRows,
    choose_splits,
    choose_tile,
    processors,
    query_rows,
)
from lmc.kernels.spec import OPTIONS, ROUNDED, KernelSpec, interpreted, use_kernel
from lmc.kernels.split import merge


def sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor,
    rows: QueryRows,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    out = q.new_empty(*q.shape[:2], v.shape[3]) if out is None else out
    wide = torch.promote_types(q.dtype, torch.float32)
    P, G = k.shape[1:3]
    for request, (first, end) in enumerate(pairwise(rows.cu_rows)):
        if first == end:
            continue
        position = rows.positions[first:end, None]
        start = max(0, int(position[0]) - window + 1) if window else 0
        key = torch.arange(start, int(position[-1]) + 1, device=q.device)
        page = tables[request, key // P].long()
        keys, values = (x[page, key % P].to(wide) for x in (k, v))
        unseen = key > position
        if window:
            unseen |= key <= position - window
        for g in range(G):
            heads = slice(g * rows.group, (g + 1) * rows.group)
            logits = torch.einsum("mhd,td->hmt", q[first:end, heads].to(wide), keys[:, g]) * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            logits.masked_fill_(unseen, -torch.inf)
            weights = logits.softmax(dim=-1).to(q.dtype).to(wide)  # as matrix units take them
            out[first:end, heads] = torch.einsum("hmt,td->mhd", weights, values[:, g]).to(q.dtype)
            if lse is not None:
                lse[first:end, heads] = logits.logsumexp(dim=-1).T
    return out


@triton.constexpr_function
def _pairs(bits, BLOCK_M):
    # NVIDIA multiplies fp32 without matrix units, out of registers that a whole tile would exceed:
    # there programs share a tile, and take some dims at a time.
    return BLOCK_M if bits == 16 else 16


@triton.constexpr_function
def _dims(bits, BLOCK_D):
    # Of q and of keys at a time: all that registers hold beside the results.
    if BLOCK_D < 32 or (bits == 16 and BLOCK_D <= 256):
        return BLOCK_D
    return 64 if bits == 16 else 32 if BLOCK_D <= 256 else 64


@triton.jit
def capped(x, softcap):
    # softcap * tanh(x / softcap). 1 - 2/(e^2y + 1) cancels near 0; there Lambert's continued
    # fraction is exact to fp32.
    b_y = x / softcap
    b_yy = b_y * b_y
    b_near = x * ((945 + b_yy * (105 + b_yy)) / (945 + b_yy * (420 + 15 * b_yy)))
    return tl.where(b_yy < 1, b_near, softcap * (1 - 2 / (tl.exp(2 * b_y) + 1)))


@triton.jit
def _attention_kernel(
    q, k, v, out, lse, tables, positions, tiles, scale, softcap,
    q_m, q_h, o_s, o_m, o_h, l_s, l_m, t_b, k_n, k_p, k_g, v_n, v_p, v_g,
    K_D: tl.constexpr, V_D: tl.constexpr, P: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    BITS: tl.constexpr = q.dtype.element_ty.primitive_bitwidth
    PAIRS: tl.constexpr = _pairs(BITS, BLOCK_M)
    DIMS: tl.constexpr = _dims(BITS, BLOCK_D)
    # A step is loaded in two stages, its pages and what they hold: 3 keep one step in shared
    # memory and 5 two, as they fit into the 64 KiB that AMD has.
    STAGES: tl.constexpr = 5 if BLOCK_D * BITS <= 2048 else 3 if BLOCK_D * BITS <= 4096 else 1
    i_g = tl.program_id(0).to(tl.int64) % G
    i_part = tl.program_id(0).to(tl.int64) // G
    i_tile, i_part = i_part // (BLOCK_M // PAIRS), i_part % (BLOCK_M // PAIRS)
    i_split = tl.program_id(1).to(tl.int64)
    i_b = tl.load(tiles + 3 * i_tile).to(tl.int64)
    o_pair = tl.load(tiles + 3 * i_tile + 1) + i_part * PAIRS + tl.arange(0, PAIRS)
    m_pair = o_pair < tl.load(tiles + 3 * i_tile + 2)
    o_row, o_head = (o_pair // GROUP).to(tl.int64), i_g * GROUP + o_pair % GROUP
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_V)
    m_dv = (o_dv < D_V)[None, :]
    b_pos = tl.load(positions + o_row, mask=m_pair, other=-1).to(tl.int32)
    p_q = q + (o_row * q_m + o_head * q_h)[:, None]
    if DIMS == BLOCK_D:
        b_q = tl.load(p_q + o_d[None, :], mask=m_pair[:, None] & (o_d < D)[None, :], other=0.0)
        if UPCAST:
            b_q = b_q.to(tl.float32)

    # Some row sees the keys first..last, and every row those from `low` to its `smallest` position.
    last = tl.max(b_pos, 0)
    smallest = tl.min(tl.where(m_pair, b_pos, last), 0)
    first, low = 0, 0
    if WINDOW:
        first, low = tl.maximum(smallest - WINDOW + 1, 0), tl.maximum(last - WINDOW + 1, 0)
    # In steps: this split's share of all, and the part of it that needs no mask.
    begin, end = first // BLOCK_N, last // BLOCK_N + 1
    share = tl.cdiv(end - begin, tl.num_programs(1))
    begin = tl.minimum(begin + i_split.to(tl.int32) * share, end)
    end = tl.minimum(begin + share, end)
    full = tl.minimum(tl.maximum(tl.cdiv(low, BLOCK_N), begin), end)
    full_end = tl.minimum(tl.maximum((smallest + 1) // BLOCK_N, full), end)

    b_acc = tl.zeros((PAIRS, BLOCK_V), tl.float32)
    b_max = tl.full((PAIRS,), -1e30, tl.float32)  # finite: the difference of two stays a number
    b_sum = tl.zeros((PAIRS,), tl.float32)
    p_k, p_v = k + i_g * k_g, v + i_g * v_g + (o_dv * V_D)[None, :]
    unit = 1.0 if SOFTCAP else scale
    to_exp2 = unit * 1.4426950408889634  # the hardware has only powers of two
    for MASKED in tl.static_range(2):
        steps = end - begin - (full_end - full) if MASKED else full_end - full
        for i in tl.range(0, steps, num_stages=1 if MASKED else STAGES):
            step = full + i
            if MASKED:
                step = begin + i
                step += tl.where(step < full, 0, full_end - full)
            o_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
            m_n = (o_n >= first) & (o_n <= last) if MASKED else tl.full((BLOCK_N,), 1, tl.int1)
            b_page = tl.load(tables + i_b * t_b + o_n // P, mask=m_n, other=0).to(tl.int64)
            o_k, o_v = b_page * k_n + o_n % P * k_p, b_page * v_n + o_n % P * v_p
            b_s = tl.zeros((PAIRS, BLOCK_N), tl.float32)
            for d in tl.static_range(0, D, DIMS):
                o_c = d + tl.arange(0, DIMS)
                m_c = (o_c < D)[None, :]
                p_c = p_k + o_k[:, None] + (o_c * K_D)[None, :]
                b_k = tl.load(p_c, mask=m_n[:, None] & m_c, other=0.0)
                if UPCAST:
                    b_k = b_k.to(tl.float32)
                if DIMS < BLOCK_D:
                    b_q = tl.load(p_q + o_c[None, :], mask=m_pair[:, None] & m_c, other=0.0)
                    if UPCAST:
                        b_q = b_q.to(tl.float32)
                b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
            if SOFTCAP:
                b_s = capped(b_s * scale, softcap)
            if MASKED:
                b_behind = b_pos[:, None] - o_n[None, :]
                m_s = b_behind >= 0
                if WINDOW:
                    m_s = b_behind.to(tl.uint32) < WINDOW  # what is negative becomes large
                b_s = tl.where(m_s, b_s, -float("inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_p = tl.exp2(b_s * to_exp2 - (b_new * to_exp2)[:, None])
            b_shrink = tl.exp2((b_max - b_new) * to_exp2)
            b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
            b_max = b_new
            # What no row sees may be NaN, and 0 times NaN is NaN: those values are masked to 0.
            b_v = tl.load(p_v + o_v[:, None], mask=m_n[:, None] & m_dv, other=0.0)
            b_p = b_p.to(b_v.dtype)
            if UPCAST:
                b_p, b_v = b_p.to(tl.float32), b_v.to(tl.float32)
            b_acc = tl.dot(b_p, b_v, b_acc * b_shrink[:, None], input_precision="ieee")

    # A split may hold no key of a row: 0, and of no weight beside those that do.
    b_sum = tl.where(b_sum == 0, 1, b_sum)
    p_out = out + i_split * o_s + (o_row * o_m + o_head * o_h)[:, None] + o_dv[None, :]
    tl.store(p_out, b_acc / b_sum[:, None], mask=m_pair[:, None] & m_dv)
    if LSE:
        p_lse = lse + i_split * l_s + o_row * l_m + o_head
        tl.store(p_lse, b_max * unit + tl.log(b_sum), mask=m_pair)


def _check(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, rows: QueryRows,
    out: Tensor | None, lse: Tensor | None, numbers: dict[str, float | None],
) -> None:  # fmt: skip
    paged, (M,) = PagedKV((k,), (k,)), rows.positions.shape
    like_k = v.ndim == 4 and v.shape[:3] == k.shape[:3] and 1 <= v.shape[3] <= paged.D
    if not like_k or (v.dtype, v.device) != (k.dtype, k.device):
        raise ValueError(f"v must be like k, {describe(k)}, of no more dims, got {describe(v)}")
    B, pages, H = len(rows.cu_rows) - 1, -(-rows.keys // paged.P), paged.G * rows.group
    for name, x, shape, dtype in (
        ("positions", rows.positions, (M,), torch.int64),
        ("q", q, (M, H, paged.D), paged.dtype),
        ("out", out, (M, H, v.shape[3]), paged.dtype),
        ("lse", lse, (M, H), torch.float32),
        ("tables", tables, (B, max(pages, tables.shape[-1])), torch.int32),
    ):
        if x is None:
            continue
        if (x.shape, x.dtype, x.device) != (shape, dtype, paged.device):
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {paged.device} for M={M} rows of B={B} "
                f"requests, {rows.keys} keys, G={paged.G} and H/G={rows.group}, got {describe(x)}"
            )
        if x.numel() and x.stride(-1) != 1:
            raise ValueError(f"the last stride of {name} must be 1, got {x.stride()}")
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor,
    rows: QueryRows,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of the query rows q [M, H, D] against one layer's pages, [M, H, D_v].

    k is [N, P, G, D] and v [N, P, G, D_v], which may be dims of k's own memory, as of latents.
    Row i sees the keys of its request at k_pos <= positions[i], its own included, so that must be
    in the pages; with a window only those at k_pos > positions[i] - window. softcap c makes
    c tanh(x / c) of a logit x. Page numbers in tables [B, pages] are used up to a request's
    largest position and not checked. lse [M, H], in fp32, takes the log-sum-exps.
    """
    numbers = {"scale": scale, "window": window, "softcap": softcap, "splits": splits}
    _check(q, k, v, tables, rows, out, lse, numbers)
    if not use_kernel(q):
        return sparse_attention_reference(
            q, k, v, tables, rows, scale, window=window, softcap=softcap, out=out, lse=lse
        )
    (M, H, D), (P, G), D_V = q.shape, k.shape[1:3], v.shape[3]
    out = q.new_empty(M, H, D_V) if out is None else out
    if not M:
        return out
    programs = len(rows.tiles) * G * (rows.tile[0] // _pairs(8 * q.itemsize, rows.tile[0]))
    if splits is None:
        splits = choose_splits(programs, rows.keys, processors(q.device))
    parts, lses = out[None], None if lse is None else lse[None]
    if splits > 1:
        parts = torch.empty((splits, M, H, D_V), dtype=torch.float32, device=q.device)
        lses = torch.empty((splits, M, H), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _attention_kernel[(programs, splits)](
            q, k, v, parts, lses, tables, rows.positions, rows.tiles, scale, softcap or 0.0,
            *q.stride()[:2], *parts.stride()[:3], *((0, 0) if lses is None else lses.stride()[:2]),
            tables.stride(0), *k.stride()[:3], *v.stride()[:3],
            K_D=k.stride(3), V_D=v.stride(3), P=P, G=G, GROUP=rows.group, D=D, D_V=D_V,
            BLOCK_M=rows.tile[0], BLOCK_N=rows.tile[1],
            BLOCK_D=triton.next_power_of_2(D), BLOCK_V=triton.next_power_of_2(D_V),
            WINDOW=window or 0, SOFTCAP=softcap is not None, LSE=lses is not None,
            # Triton 3.9's interpreter multiplies bf16 as integers.
            UPCAST=interpreted() and q.dtype != torch.float32,
            num_warps=rows.tile[2], **OPTIONS,
        )  # fmt: skip
    if lses is not None and splits > 1:
        merge(parts, lses, out, lse)
    return out


def make_inputs(case: Prompts, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """NaN is what comes after a request's last row, or before the window of its first one, and the
    page that tables end with."""
    at = case.positions()
    cu_rows = [0, *torch.tensor([len(x) for x in at]).cumsum(0).tolist()]
    pages = [-(-T // case.P) for T, _ in case.requests]
    random = torch.Generator().manual_seed(sum(pages))
    paged = make_paged(
        Case(T=sum(pages) * case.P, G=case.G, D=case.D, L=1, P=case.P, layout=case.layout),
        dtype, device, poisoned=False,
    )  # fmt: skip
    page = torch.randperm(paged.N, generator=random)
    tables = torch.full((len(pages), max(pages) + 3), int(page[-1]), dtype=torch.int32)
    unseen = torch.ones(paged.N, case.P, dtype=torch.bool)
    for table, mine, keys in zip(tables, page[: sum(pages)].split(pages), case.keys(), strict=True):
        table[: len(mine)] = mine
        keys = torch.arange(int(keys[0]), int(keys[-1]) + 1) if len(keys) else keys
        unseen[mine[keys // case.P], keys % case.P] = False
    for x in (*paged.k, *paged.v):
        x[unseen.to(device)] = torch.nan
    shape = torch.Size((cu_rows[-1], case.H, case.D_v or case.D))
    return {
        "q": torch.randn((*shape[:2], case.D), generator=random).to(device, dtype),
        "k": paged.k[0],
        "v": paged.k[0][..., : case.D_v] if case.D_v else paged.v[0],
        "tables": tables.to(device),
        "rows": query_rows(torch.cat(at), cu_rows, case.H, paged.k[0]),
        "scale": case.D**-0.5,
        "window": case.window,
        "softcap": case.softcap,
        "out": poison(shape, dtype, device),
        "lse": poison(shape[:2], torch.float32, device),
    }


def floor(case: Prompts, b: int) -> int:
    rows, keys = (sum(map(len, x)) for x in (case.positions(), case.keys()))
    D, D_v = case.D, case.D_v or case.D
    beside = 0 if case.D_v else D_v  # latents hold their values
    read = rows * case.H * D * b + keys * case.G * (D + beside) * b
    return read + rows * case.H * D_v * b + rows * (4 * case.H + 8)


def flops(case: Prompts) -> int:
    """Two products, each one multiplication and one addition a key and dimension."""
    pairs = sum(int((at + 1).clamp(max=case.reach).sum()) for at in case.positions())
    return 2 * case.H * (case.D + (case.D_v or case.D)) * pairs


def _bench(T: int) -> Prompts:
    return Prompts(requests=((T, T * 15 // 100),), H=32, G=8, D=128)


def _signature(
    D: int, GROUP: int, pairs: int = 1024, *, window: int = 0, softcap: bool = False, D_v: int = 0
) -> dict[str, str | int]:
    BLOCK_M, BLOCK_N, warps = choose_tile(pairs, D)
    strides = "q_m q_h o_s o_m o_h l_s l_m t_b k_n k_p k_g v_n v_p v_g"
    return {
        **dict.fromkeys(("q", "k", "v", "out"), "*b:16"), "lse": "*fp32:16",
        "tables": "*i32:16", "positions": "*i64:16", "tiles": "*i32:16",
        "scale": "fp32", "softcap": "fp32",
        **dict.fromkeys(strides.split(), "i32:16"),
        "K_D": 1, "V_D": 1, "P": 16, "G": 1 if D_v else 8, "GROUP": GROUP, "D": D, "D_V": D_v or D,
        "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N,
        "BLOCK_D": triton.next_power_of_2(D), "BLOCK_V": triton.next_power_of_2(D_v or D),
        "WINDOW": window, "SOFTCAP": int(softcap), "LSE": 1, "UPCAST": 0, "num_warps": warps,
    }  # fmt: skip


VARIANTS = ((64, 8), (80, 4), (128, 4), (256, 4))  # D, H/G
SPEC = KernelSpec(
    name="sparse_attention",
    launch=sparse_attention,
    reference=sparse_attention_reference,
    kernel=_attention_kernel,
    cases=(
        Prompts(requests=((1, 1),) * 6, H=16, G=1),
        Prompts(requests=((45, 45),), H=3, G=1, layout="cpu"),
        Prompts(requests=((70, 21), (1, 1), (20, 0), (133, 40)), layout="hnd"),
        Prompts(requests=((90, 12),), D=80, P=8, H=14, G=2, layout="cpu"),
        Prompts(requests=((50, 9), (33, 33)), D=96, P=32, layout="joint", softcap=2.0),
        Prompts(requests=((200, 30),), D=128, window=50, H=8),
        Prompts(requests=((75, 20), (20, 3)), D=128, H=8, layout="packed"),
        Prompts(requests=((70, 5), (150, 9)), D=256, P=128, window=7, softcap=30.0, layout="cpu"),
        Prompts(requests=((20, 0),)),
        Prompts(requests=((40, 9), (33, 5)), H=4, G=1, D=288, D_v=256),
    ),
    bench=_bench(8192),
    inputs=make_inputs,
    bytes=floor,
    check=ROUNDED,
    aot={
        **{f"D{D}-GQA{n}": _signature(D, n) for D, n in VARIANTS},
        "D128-GQA8-few": _signature(128, 8, pairs=16),
        "D128-window-softcap": _signature(128, 4, window=4096, softcap=True),
        "latents": _signature(576, 128, D_v=512),
    },
    traffic={
        **{f"D{D}-GQA{n}": Prompts(requests=((512, 64),), H=2 * n, D=D) for D, n in VARIANTS},
        "D128-GQA8-few": Prompts(requests=((512, 2),), H=16, D=128),
        "D128-window-softcap": Prompts(requests=((512, 64),), H=8, D=128, window=64, softcap=50.0),
        "latents": Prompts(requests=((256, 8),), H=16, G=1, D=576, D_v=512),
    },
    moves=False,
    flops=flops,
    at=_bench,
    unsupported={"latents": ("gfx942 fp32",)},  # three registers too many
)
