"""How much attention some query rows pay to each key: the attention matrix's columns, reduced.

Shapes:  q [M, H, D], positions [M], k [N, P, G, D] and table [pages] of one request -> [T] fp32.
Formula: A[i, h] = softmax(scale q[i, h] K^T) over keys first[i] <= j <= positions[i]; out[j] is
         the mean or the largest over h, then over i the sum, the largest or the L2 norm, of
         A[i, h, j]. Logits may be capped, and a learned sink may stand beside the keys, as in
         attention.
Bytes:   reads keys twice, 2*T*G*D*b (once with an lse given), and q and positions as often. Keys
         are read again for every tile of q, and q for every tile of keys, but out of L2.
Source:  InfoFlow, arXiv 2603.05353 (mean, L2); QCFuse, 2606.05875 (max, max); ProphetKV, 2602.02579
         and A3, 2511.17560 select by question attention too.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.cases import Case, make_paged, poison
from lmc.kernels.logits import lse_kernel, row_logits, rows_seen, sees
from lmc.kernels.paged import DTYPES, describe
from lmc.kernels.spec import OPTIONS, ROUNDED, KernelSpec, interpreted, use_kernel

Heads = Literal["mean", "max"]
Queries = Literal["sum", "max", "l2"]
# What the kernel calls them: compile-time arguments are numbers.
QUERIES: dict[Queries, int] = {"sum": 0, "max": 1, "l2": 2}
LOG2E = 1.4426950408889634
# Rows of a tile of q, counted as (query, head of one kv head) pairs, keys of a step, and dims of a
# step within it: more and fp32 spills, less and 16-bit loads are no longer 128 bits wide. Fewer
# rows would win nothing: reading the keys takes longer than multiplying them by 64 rows does.
TILE = (64, 32, 32)
# Programs that fill a GPU; keys that are worth a program; and shares that the second pass adds up.
FILL, SPLIT_KEYS, MOST_SPLITS = 256, 256, 32


def _masked_logits(
    q: Tensor, k: Tensor, table: Tensor, positions: Tensor, T: int, scale: float,
    first: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """[M, H, T] in fp32, or float64 for float64; -inf where a row may not look."""
    wide = torch.promote_types(q.dtype, torch.float32)
    (M, H, D), (P, G) = q.shape, k.shape[1:3]
    key = torch.arange(T, device=q.device)
    keys = k[table[key // P].long(), key % P].to(wide)
    logits = torch.einsum("mghd,tgd->mght", q.to(wide).view(M, G, H // G, D), keys) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    unseen = key > positions[:, None]
    if first is not None:
        unseen |= key < first[:, None]
    return logits.flatten(1, 2).masked_fill_(unseen[:, None], -torch.inf)


def importance_reference(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    positions: Tensor,
    T: int,
    scale: float,
    *,
    heads: Heads = "mean",
    queries: Queries = "sum",
    first: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    logits = _masked_logits(q, k, table, positions, T, scale, first, softcap)
    out = logits.new_empty(T) if out is None else out
    if not len(q):
        return out.zero_()
    total = logits.logsumexp(dim=2) if lse is None else lse
    if sinks is not None and lse is None:
        total = torch.logaddexp(total, sinks.to(total.dtype))
    # A row that sees nothing pays nothing: exp(-inf + inf) would be NaN.
    weights = (logits - total[:, :, None]).exp().masked_fill_(logits == -torch.inf, 0)
    weights = weights.mean(dim=1) if heads == "mean" else weights.amax(dim=1)
    match queries:
        case "sum":
            return out.copy_(weights.sum(dim=0))
        case "max":
            return out.copy_(weights.amax(dim=0))
        case "l2":
            return out.copy_(weights.square().sum(dim=0).sqrt())


@triton.jit
def _importance_kernel(
    q, k, table, positions, first, sinks, lse, out, M, T, scale, softcap, unit,
    q_m, q_h, k_n, k_p, k_g, l_s, l_m,
    Q_D: tl.constexpr, K_D: tl.constexpr, P: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr,
    PAD: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, SOFTCAP: tl.constexpr, FIRST: tl.constexpr,
    SINKS: tl.constexpr, SPLITS: tl.constexpr, MEAN: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """One tile of keys against all rows; lse [SPLITS, M, H] counts in 1/unit of a power of 2."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_page = tl.load(table + o_n // P, mask=o_n < T, other=0).to(tl.int64)
    p_n = k + b_page * k_n + (o_n % P).to(tl.int64) * k_p
    o_s = tl.arange(0, SPLITS).to(tl.int64)
    b_out = tl.zeros((BLOCK_N,), tl.float32)
    for i_m in range(0, M, BLOCK_M):
        b_heads = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        p_k = p_n
        for i_g in range(G):
            o_m, o_h, m_r, b_first, b_last = rows_seen(
                positions, first, i_m, i_g, M, T, GROUP, PAD, BLOCK_M, FIRST
            )
            p_q = q + o_m * q_m + o_h * q_h
            b_s = row_logits(
                p_q, p_k, m_r, o_n < T, scale, softcap, Q_D, K_D, D, BLOCK_D, UPCAST, SOFTCAP
            )
            p_k += k_g
            p_lse = (lse + o_m * l_m + o_h)[None, :] + (o_s * l_s)[:, None]
            b_parts = tl.load(p_lse, mask=m_r[None, :], other=0) * unit
            b_max = tl.max(b_parts, 0)
            b_lse = b_max + tl.log2(tl.sum(tl.exp2(b_parts - b_max[None, :]), 0))
            if SINKS:
                b_sink = tl.load(sinks + o_h, mask=m_r, other=0) * 1.4426950408889634
                b_max = tl.maximum(b_lse, b_sink)
                b_lse = b_max + tl.log2(tl.exp2(b_lse - b_max) + tl.exp2(b_sink - b_max))
            m_s = sees(o_n, b_first, b_last, FIRST)
            b_a = tl.where(m_s, tl.exp2(b_s - b_lse[:, None]), 0)
            b_a = tl.reshape(b_a, (BLOCK_M, PAD, BLOCK_N))
            b_heads = b_heads + tl.sum(b_a, 1) if MEAN else tl.maximum(b_heads, tl.max(b_a, 1))
        if MEAN:
            b_heads /= G * GROUP
        if QUERIES == 1:
            b_out = tl.maximum(b_out, tl.max(b_heads, 0))
        else:
            b_out += tl.sum(b_heads if QUERIES == 0 else b_heads * b_heads, 0)
    tl.store(out + o_n, tl.sqrt_rn(b_out) if QUERIES == 2 else b_out, mask=o_n < T)


def _check(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    positions: Tensor,
    T: int,
    heads: Heads,
    queries: Queries,
    first: Tensor | None,
    sinks: Tensor | None,
    lse: Tensor | None,
    out: Tensor | None,
) -> None:
    if k.ndim != 4 or 0 in k.shape or k.dtype not in DTYPES:
        raise ValueError(f"k must be floating [N, P, G, D], no axis empty, got {describe(k)}")
    if T < 0:
        raise ValueError(f"T must be at least 0, got {T}")
    N, P, G, D = k.shape
    like_k = q.ndim == 3 and q.shape[2] == D and (q.dtype, q.device) == (k.dtype, k.device)
    if not like_k or not q.shape[1] or q.shape[1] % G:
        raise ValueError(
            f"q must be {k.dtype} [M, H, {D}] on {k.device}, H a multiple of G={G}, "
            f"got {describe(q)}"
        )
    M, H, _ = q.shape
    wanted: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
        ("positions", positions, torch.int64, (M,)),
        ("first", first, torch.int64, (M,)),
        ("sinks", sinks, torch.float32, (H,)),
        ("lse", lse, torch.float32, (M, H)),
        ("out", out, torch.float32, (T,)),
    ]
    for name, x, dtype, shape in wanted:
        if x is None:
            continue
        if (x.shape, x.dtype, x.device) != (shape, dtype, q.device) or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} {list(shape)} on {q.device}, "
                f"got {describe(x)}, strides {x.stride()}"
            )
    if table.ndim != 1 or (table.dtype, table.device) != (torch.int32, q.device):
        raise ValueError(f"table must be int32 [pages] on {q.device}, got {describe(table)}")
    if len(table) * P < T or table.stride() != (1,):
        raise ValueError(
            f"table must be contiguous and hold T={T} keys, got {len(table)} pages of P={P}, "
            f"strides {table.stride()}"
        )
    used = table[: -(-T // P)]
    if used.device.type == "cpu" and T and not 0 <= int(used.min()) <= int(used.max()) < N:
        raise ValueError(f"table must name pages 0..{N - 1}, got {used.tolist()}")
    for name, value, allowed in (("heads", heads, get_args(Heads)), ("queries", queries, QUERIES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _shape(group: int) -> dict[str, int]:
    rows, keys, dims = TILE
    pad = triton.next_power_of_2(group)
    return {"PAD": pad, "BLOCK_M": max(1, rows // pad), "BLOCK_N": keys, "BLOCK_D": dims}


def _splits(programs: int, T: int) -> int:
    """Shares of the keys, a power of two, that make about FILL programs of few rows too."""
    wanted = triton.next_power_of_2(triton.cdiv(FILL, programs))
    return max(1, min(wanted, MOST_SPLITS, triton.next_power_of_2(T // SPLIT_KEYS + 1) // 2))


def importance(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    positions: Tensor,
    T: int,
    scale: float,
    *,
    heads: Heads = "mean",
    queries: Queries = "sum",
    first: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention that the query rows pay to each of the keys 0..T-1 of one request, fp32 [T].

    k is one layer's pages, any strides; row i sees the keys at or before positions[i], of layers
    with a window only those from first[i] on. softcap c makes c tanh(x / c) of a logit x. sinks
    [H] fp32 are logits that every row sees beside its keys. lse [M, H], natural logarithms as
    attention leaves them, sinks included, saves the first of two passes over the keys.
    """
    _check(q, k, table, positions, T, heads, queries, first, sinks, lse, out)
    if not use_kernel(q):
        return importance_reference(
            q, k, table, positions, T, scale, heads=heads, queries=queries, first=first,
            softcap=softcap, sinks=sinks, lse=lse, out=out,
        )  # fmt: skip
    out = torch.empty(T, dtype=torch.float32, device=q.device) if out is None else out
    (M, H, D), (P, G) = q.shape, k.shape[1:3]
    if not M or not T:
        return out.zero_()
    shape = {
        "Q_D": q.stride(2), "K_D": k.stride(3), "P": P, "G": G, "GROUP": H // G, "D": D,
        **_shape(H // G),
        # Triton 3.9's interpreter multiplies bf16 as integers.
        "UPCAST": int(interpreted() and q.dtype != torch.float32),
        "SOFTCAP": int(bool(softcap)), "FIRST": int(first is not None),
    }  # fmt: skip
    strides = (*q.stride()[:2], *k.stride()[:3])
    seen = positions if first is None else first
    others = q if sinks is None else sinks
    capping = (scale, softcap) if softcap else (scale * LOG2E, 0.0)
    programs = triton.cdiv(M, shape["BLOCK_M"]) * G
    splits = _splits(programs, T) if lse is None else 1
    with torch.cuda.device_of(q):
        parts = lse[None] if lse is not None else q.new_empty((splits, M, H), dtype=torch.float32)
        if lse is None:
            share = triton.cdiv(T, splits * shape["BLOCK_N"]) * shape["BLOCK_N"]
            lse_kernel[(programs, splits)](
                q, k, table, positions, seen, parts, M, T, share, *capping, *strides,
                *parts.stride()[:2], **shape, **OPTIONS,
            )  # fmt: skip
        _importance_kernel[(triton.cdiv(T, shape["BLOCK_N"]),)](
            q, k, table, positions, seen, others, parts, out, M, T, *capping,
            1.0 if lse is None else LOG2E, *strides, *parts.stride()[:2], **shape,
            SINKS=int(sinks is not None and lse is None), SPLITS=splits,
            MEAN=int(heads == "mean"), QUERIES=QUERIES[queries], **OPTIONS,
        )  # fmt: skip
    return out


@dataclass(frozen=True)
class Probe(Case):
    """M query rows, the last of T (suffix) or any of them, that see the last `window` keys or, with
    0, all; given: with log-sum-exps."""

    L: int = 1
    rotate: bool = False
    M: int = 4
    H: int = 4
    heads: Heads = "mean"
    queries: Queries = "sum"
    suffix: bool = False
    given: bool = False
    window: int = 0
    softcap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        rows = f"M{self.M}-H{self.H}-{'suffix' if self.suffix else 'anywhere'}"
        return f"{rows}-{super().__str__()}-{self.heads}-{self.queries}{'-lse' * self.given}"


def make_inputs(case: Probe, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Keys behind the last that a row may see are NaN, as what no page of the table holds is."""
    random = torch.Generator().manual_seed(case.T * 1009 + case.M)
    positions = torch.randperm(case.T, generator=random)[: case.M].sort().values
    if case.suffix:
        positions = torch.arange(case.T - case.M, case.T)
    paged = make_paged(case, dtype, device, poisoned=True)
    table = torch.randperm(case.N, generator=random).to(device, torch.int32)
    key = torch.arange(int(positions[-1]) + 1 if case.M else 0, device=device)
    at = table[key // case.P].long(), key % case.P
    paged.k[0][at] = make_paged(case, dtype, device, poisoned=False).k[0][at]
    q = torch.randn((case.M, case.H, case.D), generator=random).to(device, dtype)
    call = {
        "q": q, "k": paged.k[0], "table": table, "positions": positions.to(device), "T": case.T,
        "scale": case.D**-0.5, "softcap": case.softcap,
        "first": (positions - case.window + 1).clamp(min=0).to(device) if case.window else None,
    }  # fmt: skip
    sinks = torch.randn(case.H, generator=random).to(device) if case.sinks else None
    lse = _masked_logits(**{**call, "q": q.double(), "k": paged.k[0].double()}).logsumexp(dim=2)
    return {
        **call, "heads": case.heads, "queries": case.queries, "sinks": sinks,
        "lse": lse.float() if case.given else None,
        "out": poison(torch.Size((case.T,)), torch.float32, device),
    }  # fmt: skip


def _bytes(c: Probe, b: int) -> int:
    passes = 1 if c.given else 2
    rows = c.M * c.H * c.D * b + 8 * c.M
    return passes * (c.T * c.G * c.D * b + rows) + 4 * passes * c.M * c.H + 4 * c.T


def _signature(
    D: int,
    group: int,
    heads: Heads = "mean",
    queries: Queries = "sum",
    *,
    window: int = 0,
    softcap: bool = False,
    sinks: bool = False,
) -> dict[str, str | int]:
    pointers: dict[str, str | int] = {
        "table": "*i32:16", "positions": "*i64:16", "first": "*i64:16", "FIRST": int(bool(window)),
        "SOFTCAP": int(softcap), "sinks": "*fp32:16", "SINKS": int(sinks),
        "lse": "*fp32:16", "out": "*fp32:16",
    }  # fmt: skip
    strides = dict.fromkeys(("q_m", "q_h", "k_n", "k_p", "k_g", "l_s", "l_m"), "i32:16")
    return {
        "q": "*b:16", "k": "*b:16", **pointers, "M": "i32", "T": "i32", "share": "i32:16",
        "scale": "fp32", "softcap": "fp32", "unit": "fp32", **strides,
        "Q_D": 1, "K_D": 1, "P": 16, "G": 8, "GROUP": group, "D": D, **_shape(group), "UPCAST": 0,
        "SPLITS": 4, "MEAN": int(heads == "mean"), "QUERIES": QUERIES[queries],
    }  # fmt: skip


SPEC = KernelSpec(
    name="importance",
    launch=importance,
    reference=importance_reference,
    kernel=_importance_kernel,
    cases=(
        Probe(T=1, G=1, D=64, M=1, H=1),
        Probe(T=301, G=3, D=64, M=5, H=9, layout="cpu", queries="l2"),
        Probe(T=250, G=2, D=80, M=40, H=8, layout="hnd", heads="max", queries="max"),
        Probe(T=233, G=1, D=96, M=3, H=4, layout="joint", queries="max", suffix=True, given=True),
        Probe(T=330, G=1, D=128, P=8, M=65, H=2, layout="cpu", heads="max", suffix=True),
        Probe(T=200, G=2, D=256, P=32, M=7, H=2, heads="max", queries="l2"),
        Probe(T=530, G=2, D=64, P=128, M=9, H=14, suffix=True),
        Probe(T=301, G=1, D=64, M=9, H=4, layout="cpu", window=50),
        Probe(T=233, G=1, D=80, M=5, H=4, heads="max", window=7, softcap=2.0, given=True),
        Probe(T=333, G=1, D=64, M=6, H=2, queries="l2", suffix=True, softcap=30.0),
        Probe(T=90, G=1, D=64, M=6, H=4, suffix=True, window=30, sinks=True),
        Probe(T=20, G=2, D=64, M=0, H=4),
        Probe(T=0, G=2, D=64, M=0, H=4),
    ),
    bench=Probe(T=8192, G=8, D=128, M=64, H=32, suffix=True),
    inputs=make_inputs,
    bytes=_bytes,
    check=ROUNDED,
    moves=False,
    flops=lambda c: 4 * c.M * c.H * c.D * c.T,
    kernels=dict.fromkeys(("lse", "lse-D80", "lse-window-softcap"), lse_kernel),
    aot={
        "lse": _signature(128, 4),
        "lse-D80": _signature(80, 8),
        "lse-window-softcap": _signature(128, 4, window=4096, softcap=True),
        "mean-sum": _signature(128, 4),
        "max-max": _signature(64, 7, "max", "max"),
        "mean-l2": _signature(80, 8, "mean", "l2"),
        "window-softcap": _signature(128, 4, window=4096, softcap=True),
        "window-sinks": _signature(64, 8, window=128, sinks=True),
    },
    traffic={
        "lse": Probe(T=512, G=2, D=128, M=16, H=8, suffix=True),
        "lse-D80": Probe(T=512, G=1, D=80, M=16, H=8, suffix=True),
        "lse-window-softcap": Probe(
            T=512, G=2, D=128, M=16, H=8, suffix=True, window=512, softcap=50.0
        ),
        "mean-sum": Probe(T=512, G=2, D=128, M=16, H=8, suffix=True, given=True),
        "max-max": Probe(
            T=512, G=1, D=64, M=16, H=7, heads="max", queries="max", suffix=True, given=True
        ),
        "mean-l2": Probe(T=512, G=1, D=80, M=16, H=8, queries="l2", suffix=True, given=True),
        "window-softcap": Probe(T=512, G=2, D=128, M=16, given=True, window=512, softcap=50.0),
        "window-sinks": Probe(T=512, G=1, D=64, M=16, H=8, suffix=True, given=True, window=512),
    },
)
