"""Launchers that work on tensors in host memory with the kernels as compiled for a GPU."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lmc.kernels.spec import KERNELS, KernelSpec, tensors, verify
from tests.ptx.device import Device

LAUNCHERS = (*KERNELS, "query_rows")


@contextmanager
def compiled(arch: str, rewrite: Callable[[str], str] | None = None) -> Iterator[Device]:
    """Every launcher of lmc.kernels launches, and what it launches is executed."""
    with pytest.MonkeyPatch.context() as patch, Device(arch, rewrite) as device:
        for name in LAUNCHERS:
            module = importlib.import_module(f"lmc.kernels.{name}")
            if hasattr(module, "use_kernel"):
                patch.setattr(module, "use_kernel", lambda x: x.dtype != torch.float64)
        yield device


def verify_compiled(device: Device, spec: KernelSpec, case: Any, dtype: torch.dtype) -> None:
    """lmc.kernels.spec.verify, with launches that may touch what their inputs reach."""

    def inputs(case: Any, dtype: torch.dtype, where: str) -> dict[str, Any]:
        made = spec.inputs(case, dtype, where)
        device.allow(tensors(made))
        return made

    device.forget()
    verify(dataclasses.replace(spec, inputs=inputs), case, dtype, "cpu")
