"""`lmc trace`: make a synthetic trace, and say what is in one."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.errors import errors_in_one_line
from lmc.cli.options import AsJson, Format, Strict, Tokenizer, Trace

if TYPE_CHECKING:
    from rich.table import Table

    from lmc.sim.readers import Reading

trace_app = typer.Typer(help="Traces: make one, look at one.", no_args_is_help=True)
PERCENTILES = (10, 50, 90, 99)


@trace_app.command()
def make(
    generator: Annotated[
        str,
        typer.Argument(
            help="agents, chat, clock, rag, relay, skills or tools, with fields: "
            "rag:documents=500,seed=1."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file; one named .gz, .xz or .zst is compressed.")],
) -> None:
    """Write a synthetic trace with token ids, the same for the same fields and seed.

    For example: lmc trace make rag:count=300,seed=1 --out rag.jsonl.gz
    """
    with errors_in_one_line("sim"):
        from lmc.sim.synthetic import GENERATORS, Truth
        from lmc.sim.writing import save

        truth = Truth()
        n = save(truth.watch(GENERATORS.build(generator).requests()), out)
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in truth.shares.items())
        typer.echo(f"{out}: {n:,} requests of {generator}")
        typer.echo(f"of {truth.tokens.total():,} prompt tokens, as it was made: {shares}")


@trace_app.command()
def info(
    trace: Trace,
    tokenizer: Tokenizer = None,
    format: Format = "auto",
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Say what a trace holds, what can be asked of it, and which lines cannot be read.

    For example: lmc trace info rag.jsonl.gz
    """
    with errors_in_one_line("sim"):
        from lmc.cli.output import bar_of_bytes, print_bad_lines, print_json, show
        from lmc.sim.readers import read

        with bar_of_bytes(trace, as_json) as tell:
            reading = read(trace, format, tokenizer=tokenizer, strict=strict, tell=tell)
            facts = _facts(reading)
        if as_json:
            bad = [{"file": b.file, "line": b.line, "reason": b.reason} for b in reading.bad]
            print_json({**facts, "bad": bad})
        else:
            show(_summary(trace.name, facts), _lengths(facts))
        print_bad_lines(reading)


@trace_app.command()
def export(
    trace: Trace,
    out: Annotated[Path, typer.Option(help="The file; one named .gz, .xz or .zst is compressed.")],
    chunker: Annotated[str, typer.Option(help="Cuts prompts, as in lmc reuse.")] = "cdc:64",
    tokenizer: Tokenizer = None,
    format: Format = "auto",
    strict: Strict = False,
) -> None:
    """Write a trace for others: hashes of chunks, lengths and times; no text and no token ids.

    The hashes are salted, and the salt is kept nowhere.

    For example: lmc trace export chats.jsonl --tokenizer smollm2 --out chats-hashed.jsonl.zst
    """
    with errors_in_one_line("sim"):
        from lmc.chunking import CHUNKERS
        from lmc.cli.output import bar_of_bytes, print_bad_lines
        from lmc.sim.readers import read
        from lmc.sim.writing import save_hashed

        cut, spans = CHUNKERS.build(chunker), CHUNKERS.parse(chunker)["name"] == "explicit"
        with bar_of_bytes(trace, False) as tell:
            reading = read(trace, format, tokenizer=tokenizer, strict=strict, tell=tell)
            n = save_hashed(reading, out, cut, spans=spans)
        typer.echo(f"{out}: {n:,} requests, hashed; lmc reads it as format lmc")
        print_bad_lines(reading)


@trace_app.command()
def formats() -> None:
    """Print a page with a line of each format that is read.

    For example: lmc trace formats
    """
    with errors_in_one_line("sim"):
        from lmc.sim.readers.page import page

        typer.echo(page(), nl=False)


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
        asks = "prefix hit rates" if has_blocks else "lengths and times alone"
    return {
        "format": reading.format,
        "assumed": reading.assumed,
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
    from lmc.cli.output import table

    sessions = facts["sessions"]
    rows = {
        "format": facts["format"],
        "requests": f"{facts['requests']:,}",
        "sessions": "not told" if sessions is None else f"{sessions:,}",
        "duration": f"{facts['duration_s']:,.1f} s",
    }
    if facts["assumed"]:
        rows["taken for"] = facts["assumed"]
    if facts["unique_blocks"] is not None:
        rows["unique blocks"] = f"{facts['unique_blocks']:,}"
    rows["can be asked for"] = facts["asks"]
    rows["bad lines"] = f"{facts['bad_count']:,}"
    shown = table(name, ["", ""], left=2)
    shown.show_header = False
    for row in rows.items():
        shown.add_row(*row)
    return shown


def _lengths(facts: dict[str, Any]) -> Table:
    from lmc.cli.output import table

    columns = list(facts["input_tokens"])
    shown = table("", ["tokens", *columns])
    for what in ("input", "output"):
        spread = facts[f"{what}_tokens"]
        shown.add_row(what, *(f"{spread[column]:,.0f}" for column in columns))
    return shown
