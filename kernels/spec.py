"""What a kernel declares about itself, the check that it must pass, and the list of all kernels.

Tests, the compile check, benchmarks and the README table all read this list and no other.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from lmc.kernels.paged import PagedKV

KERNELS = (
    "gather",
    "scatter",
    "scatter_runs",
    "rerotate",
    "sparse_attention",
    "split",
    "deviation",
    "importance",
    "quantize",
    "dequantize",
    "checksum",
)

# What every launch and every compile check says of the compiler, whose default will change.
OPTIONS = {"enable_fp_fusion": True}

# A tolerance is a kind, not a number. EXACT: equal bits. ROUNDED: at most twice the error that the
# reference makes in the same dtype, both measured against the reference in float64. QUANTISED:
# equal scales, and every code the nearest one, so that two differ only where rounding tips a tie.
Check = Literal["exact", "rounded", "quantised"]
EXACT: Check = "exact"
ROUNDED: Check = "rounded"
QUANTISED: Check = "quantised"


@dataclass(frozen=True)
class KernelSpec:
    """One kernel.

    launch, reference: called with the keyword arguments inputs(case, dtype, device) makes;
    bench: a case of a size that is worth timing, with the shapes of Llama-3.1-8B (L=32, H=32, G=8,
    D=128);
    bytes: the floor of memory traffic of a case at b bytes an element, reads and writes;
    aot: argument types by variant, as triton.tools.compile writes them ("*b:16" is an aligned
    pointer to elements, a number a compile-time constant), and "num_warps" where it is not 4;
    kernels: the jitted function of a variant of aot, where it is not `kernel`;
    unsupported: names in aot.TARGETS by variant, for what the hardware or compiler cannot do; with
    a dtype behind it ("gfx942 fp32"), what does not fit into registers there;
    moves: it only moves data, so every access is 128 bits wide and traffic is the floor's;
    traffic: by variant of aot, a case that the interpreter can run in seconds, to count bytes on;
    flops: floating-point operations of a case, where they could matter;
    bus: bytes of a case that cross the bus when the chunk lies in host memory, at b an element;
    at: the bench case at T tokens, where its size is not a field T.
    """

    name: str
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    kernel: Any
    cases: tuple[Any, ...]
    bench: Any
    inputs: Callable[[Any, torch.dtype, str], dict[str, Any]]
    bytes: Callable[[Any, int], int]
    check: Check
    aot: Mapping[str, Mapping[str, str | int]]
    kernels: Mapping[str, Any] = field(default_factory=dict)
    unsupported: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    moves: bool = True
    traffic: Mapping[str, Any] = field(default_factory=dict)
    flops: Callable[[Any], int] | None = None
    bus: Callable[[Any, int], int] | None = None
    at: Callable[[int], Any] | None = None

    def supports(self, variant: str, target: str, dtype: str) -> bool:
        """Whether a variant is for elements of a dtype, by its short name, on a target."""
        return {target, f"{target} {dtype}"}.isdisjoint(self.unsupported.get(variant, ()))

    def sized(self, T: int) -> Any:
        """The bench case at T tokens, or None if tokens are not what its size is counted in."""
        if self.at:
            return self.at(T)
        return replace(self.bench, T=T) if hasattr(self.bench, "T") else None


def load() -> tuple[KernelSpec, ...]:
    """The SPEC of every kernel, in the order of KERNELS."""
    return tuple(importlib.import_module(f"lmc.kernels.{name}").SPEC for name in KERNELS)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set, so that kernels run on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def use_kernel(x: Tensor) -> bool:
    """Whether x is worked on by the kernel (on a GPU, or interpreted) or by the reference."""
    return (x.is_cuda or interpreted()) and x.dtype != torch.float64


def block_rows(D: int) -> int:
    """Rows of one program: 4096 elements, so four 16-byte loads a thread in bf16, eight in fp32.

    However few rows there are: a binary for each number of them would have to be compiled.
    """
    return max(1, 4096 // triton.next_power_of_2(D))


def tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor that can be reached from a call's arguments or its result."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from tensors(value)
    elif isinstance(x, tuple):
        for value in x:
            yield from tensors(value)
    elif is_dataclass(x):
        for part in fields(x):
            yield from tensors(getattr(x, part.name))


def _exactly(x: Any) -> Any:
    """Keyword arguments with keys and values in float64; cosines and sines stay as given."""
    if isinstance(x, PagedKV):
        return x.to(torch.float64)
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def verify(spec: KernelSpec, case: Any, dtype: torch.dtype, device: str) -> None:
    """Raise AssertionError unless launcher and reference leave the same in every tensor.

    Inputs and poisoned rows that nobody may write are compared too.
    """
    got, want = (spec.inputs(case, dtype, device) for _ in range(2))
    exact = {
        name: x if name in ("cos", "sin") else _exactly(x)
        for name, x in spec.inputs(case, dtype, device).items()
    }
    calls = ((spec.launch, got), (spec.reference, want), (spec.reference, exact))
    results = [call(**args) for call, args in calls]
    states = [
        [*tensors(args), *tensors(result)] for (_, args), result in zip(calls, results, strict=True)
    ]
    for i, (x, y, z) in enumerate(zip(*states, strict=True)):
        where = f"{spec.name} {case} {dtype}: tensor {i} of {list(x.shape)}"
        assert (x.shape, x.dtype) == (y.shape, y.dtype), where
        assert torch.equal(x.isnan(), y.isnan()), f"{where}: a row missed, or written but not ours"
        if spec.check == EXACT:
            assert torch.equal(x.nan_to_num(), y.nan_to_num()), f"{where}: not equal"
        elif spec.check == QUANTISED:
            assert x.element_size() == 1 or torch.equal(x, y), f"{where}: not equal"
        elif x.numel():
            z = z.double()
            error, own = (float((t.double() - z).nan_to_num().abs().max()) for t in (x, y))
            # Triton 3.9's interpreter truncates fp32 to bf16 where a GPU rounds: twice the error.
            truncates = interpreted() and dtype == torch.bfloat16
            # Both add up in fp32, in other orders: of few elements one sum may be right by chance.
            last_places = 8 * 2**-23 * float(z.nan_to_num().abs().max())
            bound = (4 if truncates else 2) * own + last_places + 1e-9
            assert error <= bound, f"{where}: error {error}, the reference's own is {own}"
    if spec.check == QUANTISED:
        off = results[0].steps_off(got["chunk"])
        # Three roundings of fp32 in up to 127 steps are what may tip a tie.
        assert (off <= 0.5 + 2**-15).all(), f"{spec.name} {case} {dtype}: {off.max()} steps off"
