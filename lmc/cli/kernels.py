"""What can be known of every kernel without a GPU: `lmc kernels` and kernels/README.md."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.errors import errors_in_one_line

if TYPE_CHECKING:
    from lmc.kernels.spec import KernelSpec
    from lmc.kernels.traffic import Ratios

Row = dict[str, Any]

FIGURES = ("registers", "spills", "shared_bytes", "load_bits", "store_bits")
TOKENS = (8192, 32768)
README = Path(__file__).parents[1] / "kernels" / "README.md"

HEAD = """\
# Kernels

One kernel a file, each in the same order: what it is in four facts, a reference in PyTorch, the
kernel in Triton, the launcher, and `SPEC`, which tests, this page and the benchmark read.
Tensors on a GPU go to the kernel; tensors in host memory to the reference or, with
`TRITON_INTERPRET=1`, to the kernel as Triton's interpreter runs it.

`lmc kernels --write` wrote this page with Triton {triton}; a test fails when it is out of date.
No GPU took part: the figures come out of compiled binaries and of the interpreter.
`make gpu-check` checks and times the kernels where there is a GPU.

## How to read the tables

A **variant** is one set of compile-time constants, and a cell is its binary for one GPU:
**registers** of a thread / **spills**, what did not fit (in bytes on NVIDIA, in registers on AMD) /
**shared** memory of a program in bytes / the widest global **load** / **store** of a thread in
bits; 128 is the most there is before sm_100, and 0 means none.

**bytes / floor** is what the kernel moves over what the task must read and write ("Bytes" among
its facts). It is counted while the interpreter runs: every unmasked lane of every load and store,
with slots, addresses and angles. Caches are not modelled, so what two programs read counts twice.
"""

OTHERS = """\
## Other GPUs

All of it compiles for {others} as well, within their shared memory, and on {clean} without spills;
FP8 not on sm_86, which has none. The slow tests look. What spills, a few registers' worth, so that
it runs and could be faster:

"""

ROOFLINE = """\
## Roofline

What one launch would take at least on an H100, with the shapes of Llama-3.1-8B (H=32, G=8, D=128,
bf16, and L=32 where a launch covers all layers): the floor's bytes at {hbm:.2f} TB/s of HBM, or the
operations at {flops:.0f} TFLOP/s where there are many. **bus** is the time in which the same chunk
crosses a bus of {bus:.0f} GB/s, for kernels that move one between the host and the GPU.
Predictions from formulas, not measurements.
"""


def rows(spec: KernelSpec, ratios: Ratios) -> Iterator[Row]:
    """One row for each variant, dtype and target. Figures that nobody could take are None."""
    from lmc.kernels.aot import DTYPES, TARGETS, compile_variant

    for variant in spec.aot:
        for dtype, name in DTYPES.items():
            ratio = ratios.get(spec.name, {}).get(variant, {}).get(name)
            for target in TARGETS:
                supported = spec.supports(variant, target, name)
                binary = compile_variant(spec, variant, dtype, target) if supported else None
                yield {
                    "kernel": spec.name,
                    "case": variant,
                    "dtype": name,
                    "target": target,
                    "status": "compiled" if supported else "unsupported",
                    "registers": binary and binary.registers,
                    "spills": binary and binary.spills,
                    "shared_bytes": binary and binary.shared,
                    "load_bits": binary and binary.load_bits,
                    "store_bits": binary and binary.store_bits,
                    "bytes_over_floor": ratio and round(ratio, 3),
                }


def roofline(spec: KernelSpec) -> Iterator[Row]:
    """The least time of the bench case in bf16, by tokens; nothing if it has no such axis."""
    from lmc.model.gpus import GPUS

    h100 = GPUS["h100"]
    for T in TOKENS:
        case = spec.sized(T)
        if case is None:
            continue
        nbytes = spec.bytes(case, 2)
        flops = spec.flops(case) if spec.flops else 0
        yield {
            "kernel": spec.name,
            "tokens": T,
            "case": str(case),
            "bytes": nbytes,
            "flops": flops,
            "hbm_ms": 1e3 * nbytes / h100.hbm,
            "compute_ms": 1e3 * flops / h100.flops,
            "bus_ms": 1e3 * spec.bus(case, 2) / h100.bus if spec.bus else None,
            "bound": "compute" if flops / h100.flops > nbytes / h100.hbm else "memory",
        }


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def section(name: str, found: Sequence[Row]) -> str:
    """The part of the page that is one kernel's: its facts, and its rows by variant and dtype."""
    targets = list(dict.fromkeys(row["target"] for row in found))
    cells: dict[tuple[str, str], list[str]] = {}
    for row in found:
        cells.setdefault((row["case"], row["dtype"]), []).append(_cell(row))
    ratios = {(row["case"], row["dtype"]): row["bytes_over_floor"] for row in found}
    body = [
        [f"{variant} {dtype}", *binaries, _figure(ratios[variant, dtype], 3)]
        for (variant, dtype), binaries in cells.items()
    ]
    facts = importlib.import_module(f"lmc.kernels.{name}").__doc__ or ""
    return (
        f"## {name}\n\n```text\n{facts.strip()}\n```\n\n"
        f"{markdown(['variant', *targets, 'bytes / floor'], body)}"
    )


def _cell(row: Row) -> str:
    if row["status"] == "unsupported":
        return "unsupported"
    return " / ".join(str(row[name]) for name in FIGURES)


def _figure(x: float | None, digits: int) -> str:
    return "–" if x is None else f"{x:.{digits}f}"


def _roofline_cells(row: Row) -> list[str]:
    return [
        row["kernel"],
        str(row["tokens"]),
        _figure(row["bytes"] / 2**30, 3),
        _figure(row["flops"] / 1e12 or None, 2),
        _figure(row["hbm_ms"], 3),
        _figure(row["compute_ms"] or None, 3),
        _figure(row["bus_ms"], 2),
        row["bound"],
        row["case"],
    ]


COLUMNS = (
    "variant", "dtype", "target", "registers", "spills", "shared", "load", "store", "/ floor",
)  # fmt: skip
ROOFLINE_HEAD = (
    "kernel", "tokens", "GiB", "TFLOP", "HBM, ms", "compute, ms", "bus, ms", "bound by", "case",
)  # fmt: skip


def readme(specs: Sequence[KernelSpec], sections: Sequence[str]) -> str:
    """The whole page kernels/README.md, of one section a kernel."""
    import triton

    from lmc.model.gpus import GPUS

    h100 = GPUS["h100"]
    predicted = [_roofline_cells(row) for spec in specs for row in roofline(spec)]
    constants = ROOFLINE.format(hbm=h100.hbm / 1e12, flops=h100.flops / 1e12, bus=h100.bus / 1e9)
    return "\n".join(
        [
            HEAD.format(triton=triton.__version__),
            *sections,
            _other_gpus(),
            f"{constants}\n{markdown(ROOFLINE_HEAD, predicted)}",
        ]
    )


def _other_gpus() -> str:
    from lmc.kernels.aot import OTHERS as OTHER_TARGETS
    from lmc.kernels.aot import SPILLS

    spilling = [
        f"- {gpu}, {name}: {', '.join(variants)}.\n"
        for gpu, kernels in SPILLS.items()
        for name, variants in kernels.items()
    ]
    clean = ", ".join(gpu for gpu in OTHER_TARGETS if gpu not in SPILLS)
    return OTHERS.format(others=", ".join(OTHER_TARGETS), clean=clean) + "".join(spilling)


def kernels(
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write kernels/README.md anew.")] = False,
) -> None:
    """Registers, spills, access widths, traffic and roofline of every kernel; needs no GPU.

    For example: lmc kernels --json
    """
    with errors_in_one_line():
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise ValueError("TRITON_INTERPRET=1 replaces the compiler: unset it")
        from lmc.cli.output import print_json
        from lmc.kernels.spec import load
        from lmc.kernels.traffic import measure

        specs, ratios = load(), measure()
        found = {spec.name: list(rows(spec, ratios)) for spec in specs}
        if write:
            README.write_text(readme(specs, [section(*item) for item in found.items()]))
            typer.echo(f"wrote {README}")
        if as_json:
            print_json([row for mine in found.values() for row in mine])
        if write or as_json:
            return
        for name, mine in found.items():
            _print(name, COLUMNS, [_columns(row) for row in mine])
        predicted = [_roofline_cells(row) for spec in specs for row in roofline(spec)]
        # Cases, the last column, are too wide for a terminal.
        _print("At least, on an H100", ROOFLINE_HEAD[:-1], [cells[:-1] for cells in predicted])


def _columns(row: Row) -> list[str]:
    figures = [row[name] for name in FIGURES]
    if row["status"] == "unsupported":
        figures[0] = "unsupported"
    cells = ["–" if x is None else str(x) for x in figures]
    return [row["case"], row["dtype"], row["target"], *cells, _figure(row["bytes_over_floor"], 3)]


def _print(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    from lmc.cli.output import show, table

    shown = table(title, head, left=3 if head == COLUMNS else 1)
    for line in body:
        shown.add_row(*line)
    show(shown)
