"""Check every kernel on the GPU of this machine, then time each beside a plain copy.

    python benchmarks/kernels.py        (make gpu-check does this)

Every case of every SPEC is compared with its reference, in fp32, fp16 and bf16; a kernel of which
one fails is timed all the same and marked as wrong, and the exit status is 1. Each bench case runs
in bf16 on inputs that take turns and are larger than the L2 cache together; a table is printed and
a row for each kernel is appended to benchmarks/results/kernels.jsonl. Bytes are the floor that the
SPEC states, so GB/s is what the task needed, not what the kernel moved. Without a GPU nothing runs:
exit status 0. The environment that `make setup` makes has a PyTorch for CPUs; the extra [cuda]
brings one for GPUs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from lmc.kernels.aot import DTYPES
from lmc.kernels.spec import KernelSpec, load, verify
from lmc.results.rows import git_commit

OUT = Path(__file__).parent / "results" / "kernels.jsonl"
DTYPE = torch.bfloat16
COPIED = 1 << 30

Timer = Callable[[Callable[[], object]], float]


def median_ms(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU."""
    found: float = triton.testing.do_bench(call, return_mode="median")
    return found


def failures(specs: Sequence[KernelSpec], device: str) -> dict[str, list[str]]:
    """Check every case in every dtype; by kernel what went wrong, a line each."""
    found: dict[str, list[str]] = {}
    for spec in specs:
        for case in spec.cases:
            for dtype, name in DTYPES.items():
                try:
                    verify(spec, case, dtype, device)
                except Exception as e:  # a kernel that does not compile must not hide the others
                    line = f"{spec.name} {case} {name}: {type(e).__name__}: {e}"
                    found.setdefault(spec.name, []).append(line)
    return found


def copy_rate(nbytes: int, device: str, timer: Timer) -> float:
    """Bytes a second, read and written, of copying nbytes inside the device's memory."""
    a, b = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * nbytes / (timer(lambda: b.copy_(a)) / 1e3)


def measure(
    spec: KernelSpec, device: str, cache: int, copied: float, timer: Timer
) -> dict[str, Any]:
    """Time the bench case. cache: bytes of the L2; copied: bytes a second of a plain copy."""
    nbytes = spec.bytes(spec.bench, DTYPE.itemsize)
    copies = 1 + 2 * cache // nbytes
    turns = cycle([spec.inputs(spec.bench, DTYPE, device) for _ in range(copies)])
    ms = timer(lambda: spec.launch(**next(turns)))
    flops = spec.flops(spec.bench) if spec.flops else None
    return {
        "kernel": spec.name,
        "case": str(spec.bench),
        "dtype": DTYPES[DTYPE],
        "ms": ms,
        "bytes": nbytes,
        "gb_per_s": nbytes / ms / 1e6,
        "of_copy": nbytes / (ms / 1e3) / copied,
        "tflop_per_s": flops / ms / 1e9 if flops else None,
    }


def table(found: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows as people read them."""
    lines = Table(title=title, title_justify="left")
    for name in ("kernel", "case", "ms", "GB/s", "of copy", "TFLOP/s"):
        lines.add_column(name, justify="left" if name in ("kernel", "case") else "right")
    for row in found:
        flops = "–" if row["tflop_per_s"] is None else f"{row['tflop_per_s']:.0f}"
        figures = f"{row['ms']:.3f}", f"{row['gb_per_s']:.0f}", f"{row['of_copy']:.0%}", flops
        name = row["kernel"] if row["agrees"] else f"{row['kernel']} (WRONG)"
        lines.add_row(name, row["case"], *figures)
    return lines


def main() -> int:
    console, device = Console(), "cuda"
    if not torch.cuda.is_available():
        built_for_gpus = torch.version.cuda or torch.version.hip
        why = "No GPU here" if built_for_gpus else f"PyTorch {torch.__version__} knows no GPU"
        console.print(f"{why}: no kernel was run.", highlight=False, soft_wrap=True)
        return 0
    specs = load()
    failed = failures(specs, device)
    cases = sum(len(spec.cases) for spec in specs) * len(DTYPES)
    wrong = [line for lines in failed.values() for line in lines]
    console.print(f"{cases - len(wrong)} of {cases} cases agree with their references.")
    if wrong:
        console.print("\n".join(wrong), style="red", markup=False)
    gpu = torch.cuda.get_device_properties(device)
    copied = copy_rate(COPIED, device, median_ms)
    about = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu.name,
        "copy_gb_per_s": copied / 1e9,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "git_commit": git_commit(),
    }
    found = []
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as file:
        for spec in specs:
            try:
                row = measure(spec, device, gpu.L2_cache_size, copied, median_ms)
            except Exception as e:  # it was told of as wrong already; the others are timed
                console.print(f"{spec.name} was not timed: {type(e).__name__}: {e}", markup=False)
                failed.setdefault(spec.name, [])
                continue
            found.append({**row, "agrees": spec.name not in failed})
            file.write(json.dumps({**found[-1], **about}) + "\n")
            torch.cuda.empty_cache()
    console.print(table(found, f"{gpu.name}: a copy moves {copied / 1e9:.0f} GB/s"))
    console.print(f"rows: {OUT}", soft_wrap=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
