"""`lmc lint`: which parts of prompts keep a prefix cache from finding what it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.errors import errors_in_one_line
from lmc.cli.options import AsJson, Format, KVDtype, Model, Strict, Times, Tokenizer, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmc.model.times import TTFTModel
    from lmc.sim.breaks import Break


def lint(
    trace: Trace,
    tokenizer: Tokenizer = None,
    profile: Times = None,
    model: Model = "llama-3.1-8b",
    kv_dtype: KVDtype = None,
    top: Annotated[int, typer.Option(min=1, help="How many places to show.")] = 10,
    window: Annotated[int, typer.Option(help="Tokens that must agree to count as seen.")] = 64,
    format: Format = "auto",
    strict: Strict = False,
    json: AsJson = False,
) -> None:
    """Name the places where prompts part from earlier ones although text behind them is the same.

    A prefix cache computes that text again. What stands there, a clock, a name, a list of tools,
    often can be put further back; where it cannot, moved reuse finds what is behind it.

    For example: lmc lint chats.jsonl --tokenizer tokenizer.json --profile h100
    """
    with errors_in_one_line("sim"):
        from lmc.cli.output import bar_of_bytes, print_bad_lines, print_json
        from lmc.model.gpus import times_for
        from lmc.model.shape import shape
        from lmc.sim.breaks import breaks
        from lmc.sim.readers import read

        times = times_for(profile, shape(model), kv_dtype, model) if profile else None
        with bar_of_bytes(trace, json) as tell:
            reading = read(trace, format, tokenizer=tokenizer, strict=strict, tell=tell)
            requests = sorted(reading, key=lambda r: r.timestamp)
        found = breaks(requests, times=times, window=window)
        total = max(1, sum(r.input_tokens for r in requests))
        rows = rows_of(found[:top], total, reading.decode, times)
        if json:
            said = {"trace": trace.name, "requests": len(requests), "prompt_tokens": total}
            again = sum(b.tokens.total() for b in found)
            said["times"] = times.origin if times is not None else None
            print_json(said | {"again": again / total, "places": len(found), "breaks": rows})
        else:
            _print(trace.name, found, rows, total)
            if times is not None:
                typer.echo(f"Seconds are of {times.origin}.")
        print_bad_lines(reading)


def rows_of(
    found: Sequence[Break],
    total: int,
    decode: Callable[[Sequence[int]], str] | None,
    times: TTFTModel | None,
) -> list[dict[str, Any]]:
    """Places as plain values; ids as text where a tokenizer is at hand."""
    text = decode or (lambda ids: " ".join(map(str, ids)))
    rows = []
    for b in found:
        row: dict[str, Any] = {
            "at": b.at,
            "part": b.part,
            "requests": b.requests,
            **{cause: b.tokens[cause] for cause in ("other_order", "changed_prefix")},
            "share": b.tokens.total() / total,
        }
        if times is not None:
            row |= {"seconds": b.seconds, "gpu_seconds": b.seconds * times.gpus}
        rows.append(row | {"before": text(b.before), "examples": list(map(text, b.examples))})
    return rows


def _print(name: str, found: Sequence[Break], rows: Sequence[dict[str, Any]], total: int) -> None:
    from lmc.cli.output import plain, show, table
    from lmc.store.causes import CAUSES

    typer.echo(sentence(found, total))
    if not rows:
        return
    columns, cells = table_of(rows)
    shown = table(f"Where prompts of {name} part from earlier ones", columns, left=2)
    for line in cells:
        shown.add_row(line[0], plain(line[1][:40]), *line[2:])
    show(shown)
    for text in ways(rows):
        typer.echo(text)
    for cause in ("other_order", "changed_prefix"):
        if any(row[cause] for row in rows):
            typer.echo(f"{cause}: {CAUSES[cause]}")


def sentence(found: Sequence[Break], total: int) -> str:
    """What all places of a trace of `total` prompt tokens cost."""
    again = sum(b.tokens.total() for b in found)
    return (
        f"{again / total:.1%} of {total:,} prompt tokens had been in earlier prompts, and a prefix "
        f"cache computes them again; prompts part so in {len(found):,} places."
    )


def table_of(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, a line a place."""
    columns = ["#", "part", "at token", "requests", "other_order", "changed_prefix", "of all"]
    timed = "seconds" in rows[0]
    cells = []
    for i, row in enumerate(rows, 1):
        tokens = [f"{row[k]:,}" for k in ("at", "requests", "other_order", "changed_prefix")]
        seconds = [f"{row[k]:,.3g}" for k in ("seconds", "gpu_seconds")] if timed else []
        cells.append([str(i), row["part"], *tokens, f"{row['share']:.1%}", *seconds])
    return [*columns, *(["seconds", "GPU seconds"] if timed else [])], cells


def ways(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What stands in front of each place, and some of what comes behind it."""
    return [
        f"{i}  behind {row['before']!r} come {' | '.join(map(repr, row['examples']))}"
        for i, row in enumerate(rows, 1)
    ]
