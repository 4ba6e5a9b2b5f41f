"""What a kernel declares about itself, the check that it must pass, and the list of all kernels.

Tests, the compile check, benchmarks and the README table all read this list and no other.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from lmc.kernels.cases import Case
from lmc.kernels.paged import PagedKV

KERNELS = ("gather", "scatter", "rerotate")

# A tolerance is a kind, not a number. EXACT: equal bits. ROUNDED: at most twice the error that the
# reference makes in the same dtype, both measured against the reference in float64.
Check = Literal["exact", "rounded"]
EXACT: Check = "exact"
ROUNDED: Check = "rounded"


@dataclass(frozen=True)
class KernelSpec:
    """One kernel.

    launch, reference: called with the keyword arguments inputs(case, dtype, device) makes;
    bytes: the floor of memory traffic of a case at b bytes an element, reads and writes;
    aot: argument types by variant, as triton.tools.compile writes them ("*b:16" is an aligned
    pointer to elements, a number a compile-time constant).
    """

    name: str
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    kernel: Any
    cases: tuple[Case, ...]
    bench: Case
    inputs: Callable[[Case, torch.dtype, str], dict[str, Any]]
    bytes: Callable[[Case, int], int]
    check: Check
    aot: Mapping[str, Mapping[str, str | int]]


def load() -> tuple[KernelSpec, ...]:
    """The SPEC of every kernel, in the order of KERNELS."""
    return tuple(importlib.import_module(f"lmc.kernels.{name}").SPEC for name in KERNELS)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set, so that kernels run on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def use_kernel(x: Tensor) -> bool:
    """Whether x is worked on by the kernel (on a GPU, or interpreted) or by the reference."""
    return (x.is_cuda or interpreted()) and x.dtype != torch.float64


def block_rows(T: int, D: int) -> int:
    """Rows of one program: 4096 elements, so four 16-byte loads a thread in bf16, eight in fp32."""
    rows = max(1, 4096 // triton.next_power_of_2(D))
    return min(rows, triton.next_power_of_2(max(T, 1)))


def tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor that can be reached from a call's arguments or its result."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, PagedKV):
        yield from (*x.k, *x.v)
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from tensors(value)


def _exactly(x: Any) -> Any:
    """Keyword arguments with keys and values in float64; cosines and sines stay as given."""
    if isinstance(x, PagedKV):
        return PagedKV(tuple(t.double() for t in x.k), tuple(t.double() for t in x.v))
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def verify(spec: KernelSpec, case: Case, dtype: torch.dtype, device: str) -> None:
    """Raise AssertionError unless launcher and reference leave the same in every tensor.

    Inputs and poisoned rows that nobody may write are compared too.
    """
    got, want = (spec.inputs(case, dtype, device) for _ in range(2))
    exact = {
        name: x if name in ("cos", "sin") else _exactly(x)
        for name, x in spec.inputs(case, dtype, device).items()
    }
    calls = ((spec.launch, got), (spec.reference, want), (spec.reference, exact))
    states = [[*tensors(args), *tensors(call(**args))] for call, args in calls]
    for i, (x, y, z) in enumerate(zip(*states, strict=True)):
        where = f"{spec.name} {case} {dtype}: tensor {i} of {list(x.shape)}"
        assert (x.shape, x.dtype) == (y.shape, y.dtype), where
        assert torch.equal(x.isnan(), y.isnan()), f"{where}: a row missed, or written but not ours"
        if spec.check == EXACT:
            assert torch.equal(x.nan_to_num(), y.nan_to_num()), f"{where}: not equal"
        elif x.numel():
            error, own = (float((t.double() - z).nan_to_num().abs().max()) for t in (x, y))
            # Triton 3.9's interpreter truncates fp32 to bf16 where a GPU rounds: twice the error.
            truncates = interpreted() and dtype == torch.bfloat16
            bound = (4 if truncates else 2) * own + 1e-9
            assert error <= bound, f"{where}: error {error}, the reference's own is {own}"
