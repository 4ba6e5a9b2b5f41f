"""Compile a SPEC for a GPU that is not there, and read the facts off the binary."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from lmc.kernels.spec import OPTIONS, KernelSpec, interpreted

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Whose binaries the tables of kernels/README.md do not show.
OTHERS = {
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_103": GPUTarget("cuda", 103, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# What does not fit into registers there, by GPU and kernel: variants and dtypes.
SPILLS: dict[str, dict[str, tuple[str, ...]]] = {
    "sm_120": {
        "sparse_attention": (
            "D64-GQA8 fp32", "D80-GQA4 fp16", "D80-GQA4 bf16", "D128-GQA4 fp16", "D128-GQA4 bf16",
            "D128-GQA8-few fp16", "D128-GQA8-few bf16",
        ),
        "importance": ("window-sinks fp32",),
    },
    "gfx950": {
        "importance": (
            "lse fp32", "lse-D80 fp32", "lse-window-softcap fp32", "mean-sum fp32", "max-max fp32",
            "mean-l2 fp32", "window-softcap fp32", "window-sinks fp32",
        ),
    },
}  # fmt: skip
# Bytes of shared memory that one program may have.
SHARED = {
    "sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10,
    "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_103": 227 << 10, "sm_120": 99 << 10,
    "gfx90a": 64 << 10, "gfx950": 160 << 10,
}  # fmt: skip
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Binary:
    """What one compiled kernel takes from the machine.

    spills: registers' worth that did not fit (bytes of local memory on NVIDIA, registers on AMD);
    shared: bytes of shared memory; load_bits, store_bits: the widest global access of one thread.
    """

    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int


def compile_variant(spec: KernelSpec, variant: str, dtype: torch.dtype, target: str) -> Binary:
    """Compile one variant of spec.aot for elements of dtype and a name in TARGETS or OTHERS."""
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: unset it")
    types: dict[str, str] = {}
    constants: dict[str, int] = {}
    aligned = {}
    kernel, arguments = spec.kernels.get(variant, spec.kernel), spec.aot[variant]
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, int):
            constants[name], types[name] = value, "constexpr"
            continue
        kind, _, divisor = value.partition(":")
        types[name] = kind.replace("*b", "*" + DTYPES[dtype]) if kind == "*b" else kind
        if divisor:
            aligned[(i,)] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    gpu = TARGETS[target] if target in TARGETS else OTHERS[target]
    options = {"num_warps": arguments.get("num_warps", 4), **OPTIONS}
    compiled = triton.compile(source, target=gpu, options=options)
    return _nvidia(compiled) if gpu.backend == "cuda" else _amd(compiled)


def _nvidia(compiled: CompiledKernel) -> Binary:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    facts = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    ptx = compiled.asm["ptx"]

    def widest(op: str) -> int:
        found = re.findall(rf"\b{op}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
        return max((int(n or 1) * int(bits) for n, bits in found), default=0)

    # Loads of a pipelined loop go to shared memory directly; ptxas is told their size in bytes.
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)

    return Binary(
        registers=facts["REG"],
        # These kernels have no arrays of their own: whatever lies on the stack was spilled.
        spills=facts["STACK"] + facts["LOCAL"],
        shared=compiled.metadata.shared,
        load_bits=max([widest("ld"), *(8 * int(n, 0) for n in copies)]),
        store_bits=widest("st"),
    )


def _amd(compiled: CompiledKernel) -> Binary:
    asm = compiled.asm["amdgcn"]

    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", asm)
        if found is None:
            raise ValueError(f"the assembly says nothing of {name}")
        return int(found[1])

    def widest(op: str) -> int:
        found = re.findall(rf"\b(?:global|buffer|flat)_{op}_(dwordx\d|dword|\w*short|\w*byte)", asm)
        words = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
        widths = (words.get(name, 16 if name.endswith("short") else 8) for name in found)
        return max(widths, default=0)

    return Binary(
        registers=fact("vgpr_count"),
        spills=fact("vgpr_spill_count") + fact("sgpr_spill_count"),
        shared=compiled.metadata.shared,  # the assembly has 0: it is given at launch
        load_bits=widest("load"),
        store_bits=widest("store"),
    )
