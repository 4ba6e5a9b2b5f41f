"""A GPU that is not there, for Triton's JIT: launches compile for it and are executed here.

    with Device("sm_90") as device:
        device.allow(tables)          # memory that a launch reaches through an address in memory
        kernel[grid](x, y, n)         # tensors on the CPU; raises FaultError at what is wrong
    print(device.totals)

What a launch may touch are its tensors' own elements, not the storage around them, and those of
`allow`. Elements of a tensor that torch.empty made, and nobody wrote since, are uninitialised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler.compiler import CompiledKernel

from tests.ptx import arithmetic, moving, tensor_cores, tensor_memory  # noqa: F401  they register what they know
from tests.ptx.lanes import Totals, launch
from tests.ptx.memory import GlobalMemory, Region
from tests.ptx.program import Program, parse

EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}  # KiB of a CTA


class _Driver(CudaDriver):
    """As much of a driver as the JIT asks for before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: arch  # the JIT keeps what it compiled by device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class _Unwritten(TorchDispatchMode):
    """Storages that torch.empty made and nothing was put into, with who keeps them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}  # address to bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if schema.name.removeprefix("aten::") in EMPTY:
            self.storages[_storage(result)[0]] = _storage(result)[1]
        elif all(r.alias_info is None for r in schema.returns):
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, Tensor):
                    self.written(x)
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write and isinstance(value, Tensor):
                self.written(value)
        if isinstance(out := (kwargs or {}).get("out"), Tensor):
            self.written(out)
        return result

    def written(self, x: Tensor) -> None:
        self.storages.pop(_storage(x)[0], None)


def _storage(x: Tensor) -> tuple[int, int]:
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class Device:
    """A context in which Triton's kernels run on tensors in host memory.

    arch: such as "sm_90"; rewrite: what is done to the PTX before it runs, to plant faults.
    """

    def __init__(self, arch: str, rewrite: Callable[[str], str] | None = None) -> None:
        self.arch = int(arch.removeprefix("sm_"))
        self.rewrite = rewrite
        self.totals = Totals()
        self._allowed: list[Tensor] = []
        self._mode = _Unwritten()

    def allow(self, tensors: Iterable[Tensor]) -> None:
        """Launches may touch these tensors, too."""
        self._allowed += tensors

    def forget(self) -> None:
        """Launches may touch their arguments alone."""
        self._allowed.clear()

    def __enter__(self) -> Device:
        self._active = triton.runtime.driver._active
        self._init = CompiledKernel._init_handles
        triton.runtime.driver.set_active(_Driver(self.arch))
        device = self

        def init(kernel: CompiledKernel) -> None:
            kernel._run = functools.partial(device._launch, kernel)

        CompiledKernel._init_handles = init
        self._mode.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._mode.__exit__(*exception)
        CompiledKernel._init_handles = self._init
        triton.runtime.driver._active = self._active

    def _launch(
        self, kernel: CompiledKernel, x: int, y: int, z: int, stream: int, function: None,
        metadata: object, launch_metadata: object, enter: object, exit: object, *arguments: Any,
    ) -> None:  # fmt: skip
        limit = SHARED_LIMIT[self.arch] * 1024
        if kernel.metadata.shared > limit:
            raise triton.OutOfResources(kernel.metadata.shared, limit, "shared memory")
        text = kernel.asm["ptx"]
        program = parse(self.rewrite(text) if self.rewrite else text)
        values, tensors = self._parameters(kernel, program, arguments)
        reachable = {id(t): t for t in (*tensors, *self._allowed) if t.numel()}
        memory = GlobalMemory(map(self._region, reachable.values()), program.granule["global"])
        self.totals.add(launch(program, (x, y, z), values, memory, kernel.metadata.shared))
        for tensor in tensors:
            # Of one that the launch wrote to, what it left out is poison that results show.
            self._mode.written(tensor)

    def _parameters(
        self, kernel: CompiledKernel, program: Program, arguments: tuple[Any, ...]
    ) -> tuple[list[int], list[Tensor]]:
        values, tensors = [], []
        for name, value in zip(kernel.src.fn.arg_names, arguments, strict=True):
            kind = kernel.src.signature[name]
            if kind == "constexpr":
                continue
            if isinstance(value, Tensor):
                tensors.append(value)
                values.append(value.data_ptr())
            elif kind == "fp32":
                values.append(int(np.float32(value).view(np.uint32)))
            else:
                values.append(int(value))
        # Behind them Triton's own: scratch memory, which kernels here do not ask for.
        return values + [0] * (len(program.parameters) - len(values)), tensors

    def _region(self, x: Tensor) -> Region:
        size = x.element_size()
        last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        start = x.data_ptr()
        return Region(start, start + (last + 1) * size, _storage(x)[0] in self._mode.storages)
