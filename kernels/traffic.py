"""Count the bytes that a launch moves, lane by lane, as Triton's interpreter runs it.

Every unmasked lane of every load, store and atomic counts with the size of its element: keys,
values, slots, address tables, angles. Caches are not modelled: what two programs read counts twice.
`python -m lmc.kernels.traffic` prints bytes over the floor as JSON: kernel -> variant -> dtype.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from lmc.kernels.aot import DTYPES
from lmc.kernels.spec import KernelSpec, interpreted, load


@dataclass
class Traffic:
    """Bytes moved so far."""

    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


def _bytes(pointers: TensorHandle, mask: TensorHandle | None = None) -> int:
    lanes = pointers.data.size if mask is None else int(mask.data.sum())
    return lanes * max(1, pointers.get_element_ty().primitive_bitwidth // 8)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what kernels move inside the block; TRITON_INTERPRET=1 must be set."""
    if not interpreted():
        raise RuntimeError("bytes can be counted under TRITON_INTERPRET=1 only")
    traffic = Traffic()
    builder = interpreter_builder

    # Every other way to memory (unmasked, by descriptor, atomic load) ends in one of these four.
    def load(pointers: TensorHandle, mask: TensorHandle, *rest: Any, **options: Any) -> Any:
        traffic.loaded += _bytes(pointers, mask)
        return originals["create_masked_load"](pointers, mask, *rest, **options)

    def store(pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        traffic.stored += _bytes(pointers, mask)
        return originals["create_masked_store"](pointers, value, mask, *rest)

    def modify(op: Any, pointers: TensorHandle, value: Any, mask: TensorHandle, *rest: Any) -> Any:
        traffic.loaded += _bytes(pointers, mask)
        traffic.stored += _bytes(pointers, mask)
        return originals["create_atomic_rmw"](op, pointers, value, mask, *rest)

    def swap(pointers: TensorHandle, *rest: Any) -> Any:
        traffic.loaded += _bytes(pointers)
        traffic.stored += _bytes(pointers)
        return originals["create_atomic_cas"](pointers, *rest)

    hooks = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": modify,
        "create_atomic_cas": swap,
    }
    originals = {name: getattr(builder, name) for name in hooks}
    for name, hook in hooks.items():
        setattr(builder, name, hook)
    try:
        yield traffic
    finally:
        for name in hooks:
            delattr(builder, name)


def over_floor(spec: KernelSpec, case: Any, dtype: torch.dtype) -> float:
    """Bytes that a launch moves over those that spec.bytes says it must."""
    inputs = spec.inputs(case, dtype, "cpu")
    with counted() as traffic:
        spec.launch(**inputs)
    return traffic.total / spec.bytes(case, dtype.itemsize)


Ratios = dict[str, dict[str, dict[str, float]]]


def measure() -> Ratios:
    """over_floor of every SPEC's traffic cases, in a process of its own that interprets."""
    run = subprocess.run(
        [sys.executable, "-m", __name__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ratios: Ratios = json.loads(run.stdout)
    return ratios


if __name__ == "__main__":
    print(
        json.dumps(
            {
                spec.name: {
                    variant: {name: over_floor(spec, case, dtype) for dtype, name in DTYPES.items()}
                    for variant, case in spec.traffic.items()
                }
                for spec in load()
            }
        )
    )
