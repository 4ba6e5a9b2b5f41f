"""`lmc report`: a trace, or what an experiment measured, as one page of HTML."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.errors import errors_in_one_line
from lmc.cli.options import Format, KVDtype, Model, Strict, Times, Tokenizer

if TYPE_CHECKING:
    from lmc.cli.html import Page
    from lmc.sim.readers import Reading


def report(
    what: Annotated[
        Path, typer.Argument(help="A trace, or a folder that `lmc run` wrote.", metavar="PATH")
    ],
    out: Annotated[Path, typer.Option(help="The .html to write.")],
    target: Annotated[
        str, typer.Option(help="Of a trace: share of what can be found, such as 80%.")
    ] = "80%",
    model: Model = "llama-3.1-8b",
    kv_dtype: KVDtype = None,
    tokenizer: Tokenizer = None,
    profile: Times = None,
    chunker: Annotated[
        str, typer.Option(help="Of a trace: cuts what is found anywhere, as in lmc reuse.")
    ] = "cdc:64",
    format: Format = "auto",
    strict: Strict = False,
) -> None:
    """Write one page that needs nothing beside it: what was found, figures, and what to do.

    Of a trace: how much memory finds how much, what moving adds, and which parts of prompts cost
    most. Of results: speed and quality by arm. The page says by which command it was made.

    For example: lmc report chats.jsonl --tokenizer smollm2 --profile h100 --out chats.html
    """
    with errors_in_one_line("sim"):
        from importlib.metadata import version

        from lmc.cli.html import Page
        from lmc.results.rows import ROWS, cpu_name, git_commit

        if out.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"out: got {str(out)!r}, want a file that ends in .html")
        if not out.absolute().parent.is_dir():
            raise ValueError(f"out: got {str(out)!r}, but there is no folder {out.parent}")
        page, reading = Page(what.name), None
        if (what / ROWS).is_file():
            _results(page, what / ROWS)
        else:
            options = (target, model, kv_dtype, tokenizer, profile, chunker, format, strict)
            reading = _trace(page, what, *options)
        page.heading("How this was made")
        page.code(join(["lmc", *sys.argv[1:]]))
        page.paragraph(
            f"lmc {version('lmc-kv')}, commit {git_commit()}, on {cpu_name()}, Python "
            f"{sys.version.split()[0]}.",
            "note",
        )
        out.write_text(str(page), encoding="utf-8")
        typer.echo(out)
        if reading is not None:
            from lmc.cli.output import print_bad_lines

            print_bad_lines(reading)


def _trace(
    page: Page, trace: Path, target: str, model: str, dtype: str | None, tokenizer: str | None,
    profile: str | None, chunker: str, format: str, strict: bool,
) -> Reading:  # fmt: skip
    from lmc import plots
    from lmc.chunking import CHUNKERS
    from lmc.cli.lint import rows_of, sentence, table_of, ways
    from lmc.cli.output import bar_of_bytes
    from lmc.cli.plan import share, tables
    from lmc.model.gpus import times_for
    from lmc.model.shape import shape
    from lmc.sim.breaks import breaks
    from lmc.sim.planning import plan
    from lmc.sim.readers import read
    from lmc.sim.reuse import analyse
    from lmc.store.causes import CAUSES

    times = times_for(profile, shape(model), dtype, model) if profile else None
    cut, spans = CHUNKERS.build(chunker), CHUNKERS.parse(chunker)["name"] == "explicit"
    wanted = share(target)
    with bar_of_bytes(trace, False) as tell:
        reading = read(trace, format, tokenizer=tokenizer, strict=strict, tell=tell)
        requests = sorted(reading, key=lambda r: r.timestamp)
    found = plan(
        requests, target=wanted, model=model, dtype=dtype, chunker=chunker, spans=spans,
        policies=("sieve", "s3fifo", "arc", "belady"), times=times,
    )  # fmt: skip
    page.paragraph(found.sentence(), "lead")
    page.figure(plots.memory_curves(found, trace.name), "What is found against memory.")
    for title, columns, rows in tables(found, trace.name):
        page.heading(title)
        page.table(columns, rows)
    if times is not None:
        page.paragraph(f"Times are of {times.origin}.", "note")
    if found.reach.anywhere is None:
        return reading
    kinds = list(analyse(requests, cut, scope="trace", spans=spans))
    page.heading("Where tokens came from")
    says = "Tokens by kind, request after request, as if nothing were ever evicted."
    page.figure(plots.reuse_over_time(kinds, f"{trace.name}: {found.requests:,} requests"), says)
    places = breaks(requests, times=times)
    page.heading("What keeps a prefix cache from finding what it has")
    page.paragraph(sentence(places, found.reach.tokens))
    if places:
        worst = rows_of(places[:10], found.reach.tokens, reading.decode, times)
        page.table(*table_of(worst))
        page.code("\n".join(ways(worst)))
        for cause in ("other_order", "changed_prefix"):
            page.paragraph(f"{cause}: {CAUSES[cause]}", "note")
        page.heading("What to do")
        page.paragraph(_advice(worst[0], found.reach.moved))
    return reading


def _advice(worst: dict[str, Any], moved: float) -> str:
    """Of the costliest place."""
    at = f"token {worst['at']:,}"
    if worst["changed_prefix"] >= worst["other_order"]:
        first = f"Put what differs at {at} behind what does not"
    else:
        first = f"Keep the parts that follow {at} in one order where that is possible"
    return (
        f"{first}: prompts that part there compute {worst['share']:.1%} of all prompt tokens "
        f"again. Where it cannot be changed, moved reuse finds {moved:.1%} of all prompt tokens."
    )


def _results(page: Page, file: Path) -> None:
    import yaml

    from lmc import plots
    from lmc.cli import tables
    from lmc.results.rows import read_rows
    from lmc.results.summary import summarise

    rows = read_rows(file)
    arms = len({row["arm"] for row in rows})
    prompts = len({row["prompt_id"] for row in rows})
    device = rows[0]["device"]
    page.paragraph(
        f"{len(rows):,} measurements of {arms} arms and {prompts} prompts, on {device}.", "lead"
    )
    if "ttft_s" in rows[0]:
        page.figure(plots.ttft_quality(rows), "Time to first token against quality, by arm.")
        shown = tables.speed_and_quality(summarise(rows))
    else:
        page.figure(plots.pareto(rows), "Quality against what is computed, by arm.")
        shown = [tables.hf_quality(rows)]
    for table in shown:
        page.heading(str(table.title))
        columns = [list(map(str, column.cells)) for column in table.columns]
        cells = [list(line) for line in zip(*columns, strict=True)]
        page.table([str(column.header) for column in table.columns], cells)
        page.paragraph(str(table.caption or ""), "note")
    page.heading("The experiment")
    page.code(yaml.safe_dump(rows[0]["config"], sort_keys=False))
