"""The engine's paged KV cache, seen by the kernels: one logical shape, any strides.

A page table row is a flat slot, s = page * P + offset; slot -1 means "leave this row out".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

# float64 never reaches a kernel: it exists so that tests can run a reference exactly.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(x: object) -> str:
    """Type, shape and device of a value, for error messages."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    return repr(x)


@dataclass(frozen=True, eq=False)
class PagedKV:
    """Paged K and V of every layer.

    k, v: L tensors each, views of logical shape [N, P, G, D] with any strides, equal over the
    layers; K's and V's may differ. vLLM's CPU backend, for one, keeps K transposed inside a page.
    """

    k: Sequence[Tensor]
    v: Sequence[Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", tuple(self.k))
        object.__setattr__(self, "v", tuple(self.v))
        if not self.k or len(self.k) != len(self.v):
            raise ValueError(
                f"PagedKV needs as many v as k and at least one layer, "
                f"got {len(self.k)} k and {len(self.v)} v"
            )
        first = self.k[0]
        if first.ndim != 4 or 0 in first.shape or first.dtype not in DTYPES:
            raise ValueError(
                f"PagedKV needs floating [N, P, G, D], no axis empty, got k[0] {describe(first)}"
            )
        for name, layers in (("k", self.k), ("v", self.v)):
            for layer, x in enumerate(layers):
                if (x.shape, x.dtype, x.device) != (first.shape, first.dtype, first.device):
                    raise ValueError(
                        f"PagedKV: {name}[{layer}] is {describe(x)}, expected {describe(first)}"
                    )
                if x.stride() != layers[0].stride():
                    raise ValueError(
                        f"PagedKV: strides of {name}[{layer}] are {x.stride()}, "
                        f"expected those of {name}[0], {layers[0].stride()}"
                    )

    sides: ClassVar[int] = 2  # of a chunk: K, then V

    def shape(self, T: int) -> tuple[int, int, int, int, int]:
        """Of a chunk of T tokens: [L, 2, T, G, D], or [L, 1, T, 1, D] of latents."""
        return (self.L, self.sides, T, self.G, self.D)

    def some(self, first: int, behind: int) -> "PagedKV":
        """The same of the layers [first, behind), with a view of the table of all."""
        return self._sharing(PagedKV(self.k[first:behind], self.v[first:behind]), first, behind)

    def _sharing(self, part: "PagedKV", first: int, behind: int) -> "PagedKV":
        part.__dict__["table"] = self.table[:, first:behind]
        return part

    def to(self, dtype: torch.dtype) -> "PagedKV":
        """A copy in another dtype."""
        return PagedKV([x.to(dtype) for x in self.k], [x.to(dtype) for x in self.v])

    def fresh(self, k: Tensor, v: Tensor) -> Tensor:
        """Rows k and v [T, G, D] of one layer as a chunk."""
        return torch.stack((k, v))[None]

    def turned_from(self, R: int) -> int:
        """The first of the R dims of a key that turn."""
        return 0

    @property
    def L(self) -> int:  # noqa: N802
        return len(self.k)

    @property
    def N(self) -> int:  # noqa: N802
        return self.k[0].shape[0]

    @property
    def P(self) -> int:  # noqa: N802
        return self.k[0].shape[1]

    @property
    def G(self) -> int:  # noqa: N802
        return self.k[0].shape[2]

    @property
    def D(self) -> int:  # noqa: N802
        return self.k[0].shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.k[0].dtype

    @property
    def device(self) -> torch.device:
        return self.k[0].device

    @cached_property
    def table(self) -> Tensor:
        """Addresses of the layers' first elements, int64 [2, L] on the device: K, then V.

        Copied out of pinned memory, so that the stream is not waited for.
        """
        rows = [[x.data_ptr() for x in layers] for layers in (self.k, self.v)]
        table = torch.tensor(rows, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return table.to(self.device, non_blocking=True)

    @cached_property
    def in_host_memory(self) -> tuple[Any, ...]:
        """Where the pages lie there, for compiled loops: what holds each layer's K and V, as 1-D
        arrays of integers of their width, where in it they begin [2, L], and strides [2, 4]."""
        integer = getattr(torch, f"int{8 * self.dtype.itemsize}")
        both = (self.k, self.v)
        holds = (
            tuple(torch.empty(0, dtype=integer).set_(x.untyped_storage()).numpy() for x in layers)
            for layers in both
        )
        begin = np.array([[x.storage_offset() for x in layers] for layers in both])
        return (*holds, begin, np.array([layers[0].stride() for layers in both]))

    @cached_property
    def kernel_args(self) -> dict[str, Any]:
        """The arguments by which every kernel addresses the pages; AOT_ARGS are their types."""
        (k_n, k_p, k_g, k_d), (v_n, v_p, v_g, v_d) = self.k[0].stride(), self.v[0].stride()
        # An address that comes out of a table carries no alignment the compiler could know of;
        # without this promise it would issue one load per element.
        aligned = all(x.data_ptr() % 16 == 0 for x in (*self.k, *self.v))
        return {
            "table": self.table, "t_kv": self.table.stride(0), "limit": self.N * self.P,
            "k_n": k_n, "k_p": k_p, "k_g": k_g, "v_n": v_n, "v_p": v_p, "v_g": v_g,
            "K_D": k_d, "V_D": v_d, "P": self.P,
            "ALIGN": 16 if aligned else self.k[0].element_size(),
        }  # fmt: skip


class PagedLatents(PagedKV):
    """MLA's paged cache: one tensor [N, P, D] a layer, whose last dims of a row are the rotated.

    To the kernels it is the K of one head; its V is the same memory and never moved by itself.
    """

    sides = 1

    def __init__(self, pages: Sequence[Tensor]) -> None:
        for layer, x in enumerate(pages):
            if x.ndim != 3:
                raise ValueError(f"pages must be [N, P, D] each, got pages[{layer}] {describe(x)}")
        heads = tuple(x.unsqueeze(2) for x in pages)
        super().__init__(heads, heads)

    def some(self, first: int, behind: int) -> "PagedKV":
        part = PagedLatents([x.squeeze(2) for x in self.k[first:behind]])
        return self._sharing(part, first, behind)

    def to(self, dtype: torch.dtype) -> "PagedLatents":
        return PagedLatents([x.squeeze(2).to(dtype) for x in self.k])

    def fresh(self, k: Tensor, v: Tensor) -> Tensor:
        return k[None, None]

    def turned_from(self, R: int) -> int:
        return self.D - R


AOT_ARGS: dict[str, str | int] = {
    "table": "*i64", "t_kv": "i32", "limit": "i32:16",
    "k_n": "i32:16", "k_p": "i32:16", "k_g": "i32:16",
    "v_n": "i32:16", "v_p": "i32:16", "v_g": "i32:16",
    "K_D": 1, "V_D": 1, "P": 16, "ALIGN": 16,
}  # fmt: skip


def check_slots(slots: Tensor, paged: PagedKV) -> None:
    """Raise unless slots is int64 [T] of -1 or slots of `paged`.

    The range is checked where that is free, on the host; on a GPU it would stall the stream, and
    kernels leave rows out of range alone.
    """
    if slots.ndim != 1 or slots.dtype != torch.int64:
        raise ValueError(f"slots must be int64 [T], got {describe(slots)}")
    if slots.device.type == "cpu" and slots.numel():
        low, high = (int(x) for x in slots.aminmax())
        if low < -1 or high >= paged.N * paged.P:
            raise ValueError(
                f"slots must lie in -1..{paged.N * paged.P - 1} "
                f"(N={paged.N} pages of P={paged.P}), got {low}..{high}"
            )


def page_runs(slots: Tensor, P: int) -> Iterator[tuple[slice, int, slice]]:
    """Cut slots into runs that are consecutive inside one page: (tokens, page, offsets).

    Engines hand out whole pages, so a chunk is a few runs, and copying a run is several times
    cheaper than indexing its rows: it moves blocks, and it is small enough to stay on one thread,
    where indexing pays a thread barrier per layer that a busy machine stretches a hundredfold.
    """
    rows = slots.tolist()
    start = 0
    for t in range(1, len(rows) + 1):
        if t < len(rows) and rows[t] == rows[t - 1] + 1 and rows[t] % P:
            continue
        if rows[start] >= 0:
            page, offset = divmod(rows[start], P)
            yield slice(start, t), page, slice(offset, offset + t - start)
        start = t
