"""Logits of some query rows over paged keys, a tile at a time, and the log-sum-exps of rows.

Shapes:  q [M, H, D], positions and first [M], k [N, P, G, D], table [pages] -> lse [splits, M, H].
Formula: lse[i, h] = log2 sum_j exp2 s[i, h, j], s = capped(scale q[i, h] k[j]) / log 2, over the
         keys first[i] <= j <= positions[i] of one split.
Bytes:   reads keys once, T*G*D*b, and again, out of L2, for every tile of q.
Source:  FlashAttention-2, arXiv 2307.08691, whose first pass this is; `importance` has its SPEC.
"""

import triton
import triton.language as tl

from lmc.kernels.sparse_attention import capped


@triton.jit
def row_logits(
    q, k, m_r, m_n, scale, softcap, q_d: tl.constexpr, k_d: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits, in powers of 2, of the rows at q, pointers [R], and keys at k, pointers [BLOCK_N].

    Whole rows would be plainer, but for fp32 the compiler unrolls a dot into more registers than
    there are.
    """
    b_s = tl.zeros((q.shape[0], k.shape[0]), tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_q = tl.load(q[:, None] + (o_d * q_d)[None, :], mask=m_r[:, None] & m_d[None, :], other=0)
        b_k = tl.load((o_d * k_d)[:, None] + k[None, :], mask=m_d[:, None] & m_n[None, :], other=0)
        if UPCAST:
            b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        b_s = tl.dot(b_q, b_k, b_s, input_precision="ieee")
    b_s *= scale  # in powers of 2 already, where nothing is capped
    if SOFTCAP:
        b_s = capped(b_s, softcap) * 1.4426950408889634
    return b_s


@triton.jit
def rows_seen(
    positions, first, i_m, i_g, M, T, GROUP: tl.constexpr, PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Queries i_m.. by the heads of kv head i_g, PAD a query: rows, heads, mask, the first and the
    last keys that they see.

    A row that is padding sees up to key -1, so none.
    """
    o_r = tl.arange(0, BLOCK_M * PAD)
    o_m, o_h = i_m + o_r // PAD, i_g * GROUP + o_r % PAD
    m_r = (o_m < M) & (o_r % PAD < GROUP)
    b_last = tl.minimum(tl.load(positions + o_m, mask=m_r, other=-1), T - 1).to(tl.int32)
    b_first = tl.zeros(b_last.shape, tl.int32)
    if FIRST:
        b_first = tl.load(first + o_m, mask=m_r, other=T).to(tl.int32)
    return o_m.to(tl.int64), o_h, m_r, b_first, b_last


@triton.jit
def sees(o_n, b_first, b_last, FIRST: tl.constexpr):
    """Which rows see which keys."""
    m_s = o_n[None, :] <= b_last[:, None]
    if FIRST:  # one comparison: two masks of a tile are more than AMD's scalar registers hold
        b_n = tl.maximum(b_last - b_first + 1, 0).to(tl.uint32)
        m_s = (o_n[None, :] - b_first[:, None]).to(tl.uint32) < b_n[:, None]
    return m_s


@triton.jit
def lse_kernel(
    q, k, table, positions, first, lse, M, T, share, scale, softcap,
    q_m, q_h, k_n, k_p, k_g, l_s, l_m,
    Q_D: tl.constexpr, K_D: tl.constexpr, P: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr,
    PAD: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, SOFTCAP: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """log2 of sum exp2 of the rows' logits times scale, over one split's share of the keys."""
    i_m = tl.program_id(0) // G * BLOCK_M
    i_g = tl.program_id(0).to(tl.int64) % G
    i_s = tl.program_id(1)
    o_m, o_h, m_r, b_first, b_last = rows_seen(
        positions, first, i_m, i_g, M, T, GROUP, PAD, BLOCK_M, FIRST
    )
    p_q = q + o_m * q_m + o_h * q_h
    b_max = tl.full(b_last.shape, -1e30, tl.float32)  # finite: the difference of two is a number
    b_sum = tl.zeros(b_last.shape, tl.float32)
    begin = i_s * share
    end = tl.minimum(begin + share, tl.max(b_last, 0) + 1)
    if FIRST:  # none of what lies before all windows
        begin = tl.maximum(begin, tl.min(b_first, 0) // BLOCK_N * BLOCK_N)
    for n in range(begin, end, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_page = tl.load(table + o_n // P, mask=o_n < T, other=0).to(tl.int64)
        p_k = k + i_g * k_g + b_page * k_n + (o_n % P).to(tl.int64) * k_p
        b_s = row_logits(
            p_q, p_k, m_r, o_n < T, scale, softcap, Q_D, K_D, D, BLOCK_D, UPCAST, SOFTCAP
        )
        m_s = sees(o_n, b_first, b_last, FIRST)
        b_s = tl.where(m_s, b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
        b_max = b_new
    # Where a row saw no key here, the next to nothing that b_max is.
    b_lse = b_max + tl.log2(tl.where(b_sum == 0, 1, b_sum))
    tl.store(lse + i_s.to(tl.int64) * l_s + o_m * l_m + o_h, b_lse, mask=m_r)
