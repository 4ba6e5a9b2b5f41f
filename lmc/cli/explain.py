"""`lmc explain`: what became of a request's tokens, why, and what it cost and saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.errors import errors_in_one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lmc.sim.explain import Estimate, Report

# One letter a kind, so that the bar can be read without colours.
KINDS = {
    "local": ("L", "white"),
    "local_blended": ("B", "magenta"),
    "exact": ("E", "blue"),
    "moved": ("M", "cyan"),
    "recomputed": ("R", "yellow"),
    "new": ("N", "red"),
}
SECONDS = {
    "plan": "planning, on the scheduler's thread",
    "wait": "from vLLM's first wish to admit it until it was let in",
    "claim": "the worker brought chunks into pages and computed rows",
    "total": "from its arrival to its end, the answer included",
}
MOST_BYTES = 1 << 28  # of a report
SHOWN_RUNS = 30


def explain(
    source: Annotated[
        str,
        typer.Argument(
            help="A response of the server, its report, or a recorded trace (a file or a folder); "
            "- is a response on standard input."
        ),
    ] = "-",
    request: Annotated[
        str | None,
        typer.Option(help="Of a trace: the request's id, or its number from 1 on; else the last."),
    ] = None,
    times: Annotated[
        Path | None,
        typer.Option(help="A time model that `lmc fit` wrote: adds what was saved, estimated."),
    ] = None,
    runs: Annotated[bool, typer.Option("--runs", help="List every run, however many.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the token map into this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the token map of a request: what was reused, from where, and why the rest was not.

    A response has one if its request said "explain": true.

    For example: lmc explain trace.jsonl --request 7 --plot map.png
    """
    with errors_in_one_line("sim"):
        from lmc.cli.output import check_plot, print_json
        from lmc.model.times import load
        from lmc.sim.explain import estimate

        check_plot(plot)
        report, bad = _read(source, request)
        guess = None if times is None else estimate(report, load(times))
        if json:
            print_json(_plain(report, guess))
        else:
            _print(report, guess, runs)
        if bad:
            typer.secho(bad, fg=typer.colors.YELLOW, err=True)
        if plot is not None:
            from lmc.plots import explained

            explained(report).savefig(plot, dpi=150)


def _read(source: str, request: str | None) -> tuple[Report, str | None]:
    """The report, and what is to be said of lines that were left out."""
    import json

    from lmc.sim.explain import Recording, report_in

    if source != "-" and _is_trace(Path(source)):
        recording = Recording(Path(source))
        report = recording.find(request)
        n = recording.bad_count
        return report, f"{n} lines were left out, the first: {recording.bad}" if n else None
    if request is not None:
        raise ValueError("request: goes with a recorded trace, and this is one response")
    if source == "-":
        data = sys.stdin.buffer.read(MOST_BYTES + 1)
    else:
        with Path(source).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    name = "standard input" if source == "-" else source
    if len(data) > MOST_BYTES:
        raise ValueError(f"{name}: more than {MOST_BYTES} bytes, which no report has")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: is not JSON: {error}") from error
    return report_in(raw), None


def _is_trace(path: Path) -> bool:
    from lmc.sim.readers.detect import detect

    if path.is_dir():
        return True
    try:
        return path.exists() and detect(path) == "lmc"
    except ValueError:
        return False


def _plain(report: Report, guess: Estimate | None) -> dict[str, Any]:
    """All of it as plain values; what is estimated stands apart from what was measured."""
    from lmc.blend.tokenmap import tokens_by

    said = report.model_dump(mode="json")
    said["causes"] = tokens_by(report.map, "cause")
    said["tiers"] = report.loaded()
    if guess is not None:
        said["estimated_seconds"] = {
            "full": guess.full,
            "engine": guess.engine,
            "lmc": guess.lmc,
            "saved": guess.saved,
        }
    return said


def _print(report: Report, guess: Estimate | None, runs: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from lmc.cli.output import show
    from lmc.store.causes import CAUSES

    console = Console()
    name = "" if report.request is None else f" {report.request}"
    facts = [f"{report.prompt_tokens:,} tokens", f"{report.compute_fraction:.1%} of rows computed"]
    facts += [f"strategy {report.strategy}"] if report.strategy else []
    facts += [f"not blended: {report.reason}"] if report.reason else []
    # Text: what a file holds is no markup.
    console.print(Text(f"Request{name}: {', '.join(facts)}"))
    console.print(_bar(report, console.width))
    show(_summary(report))
    for cause in dict.fromkeys(run.cause for run in report.map if run.cause):
        console.print(Text(f"{cause}: {CAUSES[cause]}", "dim"), soft_wrap=True)
    few = len(report.map) <= SHOWN_RUNS
    if runs or few:
        show(_runs(report))
    else:
        console.print(f"{len(report.map):,} runs: --runs lists them.", style="dim")
    _print_seconds(console, report, guess)


def _bar(report: Report, width: int) -> Any:
    """The prompt as one line, each place of the kind that most of its tokens are of."""
    from rich.text import Text

    T = report.prompt_tokens
    places = min(width, T)
    counts: list[dict[str, float]] = [{} for _ in range(places)]
    for start, end, kind, *_ in report.map:
        first, last = start * places // T, (end - 1) * places // T
        for i in range(first, last + 1):
            inside = min(end, (i + 1) * T / places) - max(start, i * T / places)
            counts[i][kind] = counts[i].get(kind, 0) + inside
    bar = Text()
    for count in counts:
        letter, colour = KINDS[max(count, key=lambda kind: count[kind])]
        bar.append(letter, f"{colour} reverse")
    legend = [f"{KINDS[kind][0]} {kind}" for kind in KINDS if report.kinds.get(kind)]
    return bar + Text(f"\n{'  '.join(legend)}   (one letter: {T / places:.3g} tokens)", "dim")


def _summary(report: Report) -> Table:
    """Tokens by kind, tier and cause."""
    from lmc.cli.output import table

    shown = table("What became of them", ["kind", "tier", "cause", "tokens", "share"], left=3)
    alike: dict[tuple[str, str | None, str | None], int] = {}
    for start, end, kind, tier, cause in report.map:
        alike[kind, tier, cause] = alike.get((kind, tier, cause), 0) + end - start
    order = list(KINDS)
    for (kind, tier, cause), n in sorted(
        alike.items(), key=lambda i: (order.index(i[0][0]), -i[1])
    ):
        shown.add_row(
            kind, _cell(tier), cause or "", f"{n:,}", f"{n / report.prompt_tokens:.1%}",
            style=KINDS[kind][1],
        )  # fmt: skip
    return shown


def _runs(report: Report) -> Table:
    from lmc.cli.output import table

    shown = table("Runs", ["kind", "tier", "cause", "from", "to", "tokens"], left=3)
    for start, end, kind, tier, cause in report.map:
        row = (kind, _cell(tier), cause or "", f"{start:,}", f"{end:,}", f"{end - start:,}")
        shown.add_row(*row, style=KINDS[kind][1])
    return shown


def _cell(text: str | None) -> Any:
    from rich.text import Text

    return Text(text or "")


def _print_seconds(console: Console, report: Report, guess: Estimate | None) -> None:
    from rich.text import Text

    if report.seconds:
        console.print("Measured, seconds")
        for name, seconds in report.seconds.items():
            console.print(Text(f"  {seconds:9.4f}  {name:6} {SECONDS.get(name, '')}"))
    if guess is not None:
        console.print("Estimated by the time model, seconds to the first token")
        console.print(Text(f"  of {guess.times}"))
        console.print(f"  {guess.lmc:9.4f}  as it was served")
        console.print(f"  {guess.engine:9.4f}  with the engine's own cache alone")
        console.print(f"  {guess.full:9.4f}  everything computed")
        what = "saved" if guess.saved >= 0 else "lost"
        console.print(f"  {abs(guess.saved):9.4f}  {what} by lmc")
