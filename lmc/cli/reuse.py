"""`lmc reuse`: what of a trace's text could be reused, and by which means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lmc.cli.errors import errors_in_one_line
from lmc.cli.options import AsJson, Format, Strict, Tokenizer, Trace

if TYPE_CHECKING:
    from lmc.sim.reuse import RequestReuse
    from lmc.sim.trace import Request

SHOWN_SESSIONS = 20


def reuse(
    trace: Trace,
    tokenizer: Tokenizer = None,
    chunker: Annotated[
        str,
        typer.Option(
            help="cdc:64 (mean tokens), fixed:256, separator:[198,198], explicit (messages are "
            "chunks), sliding:256 (a fixed grid found at any offset), or module:Class."
        ),
    ] = "cdc:64",
    scope: Annotated[
        Literal["session", "trace"],
        typer.Option(help="What counts as seen before: the session, or the whole trace."),
    ] = "session",
    window: Annotated[int, typer.Option(help="Tokens of the windows of the upper bound.")] = 64,
    format: Format = "auto",
    strict: Strict = False,
    show: Annotated[
        int | None, typer.Option(help="Print the prompt of this request, counted from 1, by kind.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Show what share of a trace's tokens is reusable as prefix, only when moved, or not at all.

    Nothing is ever evicted here: `lmc sim` says what a store of some size keeps of it.

    For example: lmc reuse chats.jsonl --tokenizer tokenizer.json --scope trace
    """
    with errors_in_one_line("sim"):
        from lmc.cli.output import bar_of_bytes, print_bad_lines, print_json
        from lmc.sim.readers import read
        from lmc.sim.reuse import CUTS, analyse

        cut, name = CUTS.build(chunker), CUTS.parse(chunker)["name"]
        with bar_of_bytes(trace, json) as tell:
            reading = read(trace, format, tokenizer=tokenizer, strict=strict, tell=tell)
            requests = sorted(reading, key=lambda r: r.timestamp)
        if show is not None and not 1 <= show <= len(requests):
            raise ValueError(f"show: got {show}, want 1 to {len(requests)}")
        done = list(analyse(requests, cut, scope=scope, window=window, spans=name == "explicit"))
        summary = summarise(done) | {"chunker": chunker, "scope": scope, "window": window}
        if json:
            print_json(summary | {"bad_lines": reading.bad_count})
        else:
            _print(summary, trace)
        print_bad_lines(reading)
        if show is not None and not json:
            _print_map(requests[show - 1], done[show - 1], reading)


def summarise(done: list[RequestReuse]) -> dict[str, Any]:
    """Tokens and shares, overall and by session."""
    sessions: dict[str, list[RequestReuse]] = {}
    for r in done:
        sessions.setdefault(r.session, []).append(r)
    return {**_shares(done), "sessions": {name: _shares(rs) for name, rs in sessions.items()}}


def _shares(done: list[RequestReuse]) -> dict[str, Any]:
    from lmc.sim.kinds import KINDS

    total = sum(len(r.kinds) for r in done)
    found = {kind: sum(r.tokens()[kind] for r in done) for kind in KINDS}
    found["upper_bound"] = sum(r.upper_bound for r in done)
    chunks = sum(r.chunks for r in done)
    causes: dict[str, int] = {}
    for r in done:
        causes = {cause: n + causes.get(cause, 0) for cause, n in r.causes().items()}
    return {
        "requests": len(done),
        "tokens": total,
        **{kind: tokens / total if total else 0.0 for kind, tokens in found.items()},
        "causes": {cause: n / total if total else 0.0 for cause, n in causes.items()},
        "mean_chunk_tokens": total / chunks if chunks else 0.0,
    }


def _print(summary: dict[str, Any], trace: Path) -> None:
    from rich.console import Console

    from lmc.cli.output import plain, show, table

    columns = ("prefix", "moved", "repeated_within", "new", "upper_bound")
    heads = ["session", "requests", "tokens", "prefix", "moved", "repeated", "new", "bound"]
    shown = table(
        f"Reuse in {trace.name}, {summary['chunker']}, seen before in the {summary['scope']}",
        heads,
        caption=f"Shares of all tokens. bound: behind the prefix and in any window of "
        f"{summary['window']} tokens seen before. "
        f"A chunk has {summary['mean_chunk_tokens']:.1f} tokens on average.",
    )

    def add(name: str, row: dict[str, Any], style: str = "") -> None:
        cells = [f"{row[c]:.1%}" for c in columns]
        shown.add_row(name, f"{row['requests']:,}", f"{row['tokens']:,}", *cells, style=style)

    sessions = sorted(summary["sessions"].items(), key=lambda item: -item[1]["tokens"])
    if len(sessions) > 1:
        for name, row in sessions[:SHOWN_SESSIONS]:
            add(plain(name[:32]) or "(none)", row)
        if len(sessions) > SHOWN_SESSIONS:
            shown.add_row(f"and {len(sessions) - SHOWN_SESSIONS} more", style="dim")
    add("all", summary, "bold")
    show(shown)
    console = Console()
    why = ", ".join(f"{cause} {share:.1%}" for cause, share in summary["causes"].items())
    console.print(f"Not reusable: {why} (of all tokens)")
    if summary["scope"] == "session" and all(row["requests"] == 1 for _, row in sessions):
        console.print(
            "Every session has one request, so nothing came before it: --scope trace compares "
            "with all earlier requests.",
            style="yellow",
        )


def _print_map(request: Request, done: RequestReuse, reading: Any) -> None:
    """The prompt, coloured by kind: its text where a tokenizer is at hand, else its lengths."""
    from itertools import pairwise

    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from lmc.cli.output import visible
    from lmc.sim.kinds import KINDS

    colours = ("green", "cyan", "magenta", "default")
    console = Console()
    console.print(
        Text.assemble(
            *((f" {kind} ", f"{c} reverse") for kind, c in zip(KINDS, colours, strict=True))
        )
    )
    assert request.tokens is not None
    borders = [0, *(np.flatnonzero(np.diff(done.kinds)) + 1).tolist(), len(done.kinds)]
    decode = reading.decode
    text = Text()
    for start, end in pairwise(borders):
        kind = int(done.kinds[start])
        part = f"[{KINDS[kind]} {start}-{end}] "
        if decode is not None:
            part = visible(decode(request.tokens[start:end]), keep="\n\t")
        text.append(part, colours[kind])
    console.print(text)
