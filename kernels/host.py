"""Scatter on a CPU, in compiled loops: the path by which chunks reach vLLM's CPU backend.

Shapes: chunk [L, 2, T, G, D], slots [T], cos and sin [R/2] -> pages L x [N, P, G, D] of K and of V.
Formula: that of lmc.kernels.scatter, which calls this for float32 on a CPU.
Bytes:   reads and writes 2*L*T*G*D*b each, and reads the slots.
Source:  numba (Lam, Pitrou, Seibert, LLVM-HPC 2015). In torch the same is a copy per page and
         layer, and the calls cost twice what the bytes do.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmc.kernels.paged import PagedKV

_NO_ANGLES = np.empty(0, np.float32)


@cache
def _compiled() -> Any:
    # Not at the top: vLLM 0.32, as it starts on a CPU, asks every object of every loaded module
    # for its attributes, and one of llvmlite's cannot answer.
    import numba

    return numba.njit(nogil=True)(_scatter_layer)


def _scatter_layer(k, v, new_k, new_v, slots, cos, sin, interleaved):
    T, G, D = new_k.shape
    P = k.shape[1]
    half = len(cos)
    start = 0
    while start < T:
        # A run of slots inside one page: K may lie transposed there, so the token is the inner
        # loop, and a run of it is what makes stores consecutive.
        n = 1
        while start + n < T and slots[start + n] == slots[start] + n and slots[start + n] % P:
            n += 1
        if slots[start] >= 0:
            page, offset = slots[start] // P, slots[start] % P
            for g in range(G):
                for i in range(half):
                    i_a, i_b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
                    for t in range(n):
                        a, b = new_k[start + t, g, i_a], new_k[start + t, g, i_b]
                        k[page, offset + t, g, i_a] = a * cos[i] - b * sin[i]
                        k[page, offset + t, g, i_b] = b * cos[i] + a * sin[i]
                for d in range(2 * half, D):
                    for t in range(n):
                        k[page, offset + t, g, d] = new_k[start + t, g, d]
                for t in range(n):
                    for d in range(D):
                        v[page, offset + t, g, d] = new_v[start + t, g, d]
        start += n


def scatter_host(
    chunk: Tensor,
    paged: PagedKV,
    slots: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> None:
    """`scatter` for checked float32 arguments in host memory; layers are shared among threads."""
    angles = [_NO_ANGLES if x is None else x.numpy() for x in (cos, sin)]
    rows, new = slots.numpy(), chunk.numpy()
    scatter_layer = _compiled()

    def layers(first: int) -> None:
        for i in range(first, paged.L, threads):
            k, v = paged.k[i].numpy(), paged.v[i].numpy()
            scatter_layer(k, v, new[i, 0], new[i, 1], rows, *angles, interleaved)

    threads = torch.get_num_threads()
    others = [_pool(threads).submit(layers, first) for first in range(1, threads)]
    layers(0)
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="lmc-scatter")
