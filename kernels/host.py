"""Gather and scatter on a CPU, in compiled loops: how chunks leave and reach vLLM's CPU backend.

Shapes: as lmc.kernels.gather, lmc.kernels.scatter and lmc.kernels.scatter_runs have them.
Formula: theirs: on a CPU they call this, where there are keys and values; to scatter, in float32.
Bytes:   reads and writes 2*L*T*G*D*b each, and reads the slots.
Source:  numba (Lam, Pitrou, Seibert, LLVM-HPC 2015). In torch the same is a copy per page and
         layer, and the calls cost twice what the bytes do.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmc.kernels.paged import PagedKV

_NO_ANGLES = np.empty((0, 0), np.float32)


@cache
def _compiled(function: Callable[..., None]) -> Any:
    # Not at the top: vLLM 0.32, as it starts on a CPU, asks every object of every loaded module
    # for its attributes, and one of llvmlite's cannot answer.
    import numba

    return numba.njit(nogil=True)(function)


def _gather_layers(k, v, at, strides, new, slots, P):
    L, _, end, G, D = new.shape
    flat = new.reshape(-1)
    start = 0
    while start < end:
        # A run of slots inside one page. K may lie transposed there: a row of it is D places apart,
        # whose neighbours, of the next tokens, are in the cache by then.
        n = 1
        while start + n < end and slots[start + n] == slots[start] + n and slots[start + n] % P:
            n += 1
        page, offset = slots[start] // P, slots[start] % P
        for layer in range(L if slots[start] >= 0 else 0):
            for side in range(2):
                pages = k[layer] if side == 0 else v[layer]
                of_page, of_token, of_head, of_dim = strides[side]
                first = at[side, layer] + page * of_page + offset * of_token
                for g in range(G):
                    for t in range(n):
                        # Unsigned: of an index that may be negative each access would be a branch.
                        row = np.uint64(first + g * of_head + t * of_token)
                        to = np.uint64((((2 * layer + side) * end + start + t) * G + g) * D)
                        if of_dim == 1:  # said, so that it is compiled to moves of many bytes
                            for d in range(np.uint64(D)):
                                flat[to + d] = pages[row + d]
                        else:
                            step = np.uint64(of_dim)
                            for d in range(np.uint64(D)):
                                flat[to + d] = pages[row + d * step]
        start += n


def gather_host(paged: PagedKV, slots: Tensor, out: Tensor) -> None:
    """`gather` for checked arguments in host memory, of any dtype: bits are copied.

    On one thread, since the model computes beside it; and in one call, since a thread that comes
    back to Python again and again keeps the one that runs the model from it.
    """
    integer = getattr(torch, f"int{8 * paged.dtype.itemsize}")
    gather_layers = _compiled(_gather_layers)
    new = out.contiguous()
    gather_layers(*paged.in_host_memory, new.view(integer).numpy(), slots.numpy(), paged.P)
    if new.data_ptr() != out.data_ptr():
        out.copy_(new)


def _scatter_layer(k, v, new_k, new_v, slots, runs, layer, cos, sin, interleaved):
    # One function for both launchers: it is compiled once, and by the first of them.
    G, D = new_k.shape[1:]
    P = k.shape[1]
    for first, T, base, stride, turn in runs:
        half = cos.shape[1] if turn >= 0 else 0
        # Row i of this run is i + at_k of new_k, i + at_v of new_v, and goes to slots[i].
        at_k = base + 2 * layer * stride - first
        at_v = at_k + stride
        start, end = first, first + T
        while start < end:
            # A run of slots inside one page: K may lie transposed there, so the token is the inner
            # loop, and a run of it is what makes stores consecutive.
            n = 1
            while start + n < end and slots[start + n] == slots[start] + n and slots[start + n] % P:
                n += 1
            if slots[start] >= 0:
                page, offset = slots[start] // P, slots[start] % P
                row_k, row_v = at_k + start, at_v + start
                for g in range(G):
                    for i in range(half):
                        i_a, i_b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
                        c, s = cos[turn, i], sin[turn, i]
                        for t in range(n):
                            a, b = new_k[row_k + t, g, i_a], new_k[row_k + t, g, i_b]
                            k[page, offset + t, g, i_a] = a * c - b * s
                            k[page, offset + t, g, i_b] = b * c + a * s
                    for d in range(2 * half, D):
                        for t in range(n):
                            k[page, offset + t, g, d] = new_k[row_k + t, g, d]
                    for t in range(n):
                        for d in range(D):
                            v[page, offset + t, g, d] = new_v[row_v + t, g, d]
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
    angles = [_NO_ANGLES if x is None else x.numpy()[None] for x in (cos, sin)]
    rows, new = slots.numpy(), chunk.numpy()
    whole = np.array([[0, len(rows), 0, 0, -1 if cos is None else 0]])
    scatter_layer = _compiled(_scatter_layer)

    def put(i: int) -> None:
        k, v = paged.k[i].numpy(), paged.v[i].numpy()
        scatter_layer(k, v, new[i, 0], new[i, 1], rows, whole, i, *angles, interleaved)

    _by_layer(put, 0, paged.L)


def scatter_runs_host(
    buffer: Tensor,
    paged: PagedKV,
    slots: Tensor,
    runs: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    by_layer: Tensor | None,
    interleaved: bool,
    layers: tuple[int, int],
) -> None:
    """`scatter_runs` for checked float32 arguments, as `scatter_host`."""
    angles = [_NO_ANGLES if x is None else x.numpy() for x in (cos, sin)]
    rows, new, table = slots.numpy(), buffer.numpy(), runs.numpy()
    before = [0] * paged.L if by_layer is None else by_layer.tolist()
    scatter_layer = _compiled(_scatter_layer)

    def put(i: int) -> None:
        k, v = paged.k[i].numpy(), paged.v[i].numpy()
        here = [_NO_ANGLES if before[i] < 0 else x[before[i] :] for x in angles]
        scatter_layer(k, v, new, new, rows, table, i, *here, interleaved)

    _by_layer(put, *layers)


def _by_layer(put: Callable[[int], None], first: int, end: int) -> None:
    """Call `put` for each layer, on as many threads as torch has."""

    def some(at: int) -> None:
        for i in range(at, end, threads):
            put(i)

    threads = torch.get_num_threads()
    others = [_pool(threads).submit(some, first + i) for i in range(1, threads)]
    some(first)
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="lmc-scatter")
