"""`lmc trace`: make a synthetic trace, and say what is in one."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.errors import errors_in_one_line

if TYPE_CHECKING:
    from rich.table import Table

    from lmc.sim.readers import BadLine, Reading

trace_app = typer.Typer(help="Traces: make one, look at one.", no_args_is_help=True)
PERCENTILES = (10, 50, 90, 99)
BAD_LINES_SHOWN = 10


@trace_app.command()
def make(
    generator: Annotated[
        str, typer.Argument(help="agents, chat or rag, with fields: rag:documents=500,seed=1.")
    ],
    out: Annotated[Path, typer.Option(help="The file; one named .gz, .xz or .zst is compressed.")],
) -> None:
    """Write a synthetic trace with token ids, the same for the same fields and seed."""
    with errors_in_one_line("sim"):
        from lmc.sim.generate import GENERATORS, save

        n = save(GENERATORS.build(generator).requests(), out)
        typer.echo(f"{out}: {n:,} requests of {generator}")


@trace_app.command()
def info(
    trace: Annotated[Path, typer.Argument(help="A trace: a file, or a folder of them.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json or its folder, for traces of text.")
    ] = None,
    format: Annotated[str, typer.Option(help="The format, if it is not recognised.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad line.")] = False,
) -> None:
    """Say what a trace holds, what can be asked of it, and which lines cannot be read."""
    with errors_in_one_line("sim"):
        import json

        from rich.console import Console

        from lmc.cli.output import bar_of_bytes
        from lmc.sim.readers import read

        with bar_of_bytes(trace, as_json) as tell:
            reading = read(trace, format, tokenizer=tokenizer, strict=strict, tell=tell)
            facts = _facts(reading)
        if as_json:
            bad = [{"file": b.file, "line": b.line, "reason": b.reason} for b in reading.bad]
            typer.echo(json.dumps({**facts, "bad": bad}))
            return
        console = Console()
        console.print(_summary(trace.name, facts))
        console.print(_lengths(facts))
        if reading.bad:
            console.print(_bad_lines(reading.bad, reading.bad_count))


def _facts(reading: Reading) -> dict[str, Any]:
    """What a trace holds, read once and not kept."""
    import numpy as np

    inputs, outputs, times = [], [], []
    sessions: set[str] = set()
    blocks: set[Hashable] = set()
    has_blocks = has_tokens = True
    for r in reading:
        inputs.append(r.input_tokens)
        outputs.append(r.output_tokens)
        times.append(r.timestamp)
        sessions.add(r.session)
        has_blocks &= r.blocks is not None
        has_tokens &= r.tokens is not None
        blocks.update(r.blocks or ())
    if has_tokens:
        asks = "prefix hit rates, reuse of text at any position"
    else:
        asks = "prefix hit rates" if has_blocks else "timing only"
    return {
        "format": reading.format,
        "requests": reading.count,
        "sessions": len(sessions - {""}) or None,
        "duration_s": max(times) - min(times),
        "asks": asks,
        "unique_blocks": len(blocks) if has_blocks else None,
        "input_tokens": _spread(np.array(inputs)),
        "output_tokens": _spread(np.array(outputs)),
        "bad_count": reading.bad_count,
    }


def _spread(lengths: Any) -> dict[str, float]:
    import numpy as np

    percentiles = np.percentile(lengths, PERCENTILES).tolist()
    return {
        "mean": float(lengths.mean()),
        **{f"p{p}": value for p, value in zip(PERCENTILES, percentiles, strict=True)},
        "max": int(lengths.max()),
        "total": int(lengths.sum()),
    }


def _summary(name: str, facts: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=name, box=box.SIMPLE_HEAD, show_header=False)
    table.add_row("format", facts["format"])
    table.add_row("requests", f"{facts['requests']:,}")
    sessions = facts["sessions"]
    table.add_row("sessions", "not told" if sessions is None else f"{sessions:,}")
    table.add_row("duration", f"{facts['duration_s']:,.1f} s")
    if facts["unique_blocks"] is not None:
        table.add_row("unique blocks", f"{facts['unique_blocks']:,}")
    table.add_row("can be asked for", facts["asks"])
    table.add_row("bad lines", f"{facts['bad_count']:,}")
    return table


def _lengths(facts: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    columns = list(facts["input_tokens"])
    table = Table("tokens", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right")
    for what in ("input", "output"):
        spread = facts[f"{what}_tokens"]
        table.add_row(what, *(f"{spread[column]:,.0f}" for column in columns))
    return table


def _bad_lines(bad: list[BadLine], count: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = bad[:BAD_LINES_SHOWN]
    title = f"Bad lines, left out ({len(shown)} of {count:,})"
    table = Table("line", "reason", title=title, box=box.SIMPLE_HEAD)
    for b in shown:
        # Text: what a file holds is no markup.
        table.add_row(Text(f"{Path(b.file).name}:{b.line}"), Text(b.reason))
    return table
