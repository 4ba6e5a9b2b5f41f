"""What all commands print alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lmc.sim.readers import Reading

SHOWN = 5
FIGURES = (".pdf", ".png", ".svg")


@contextmanager
def bar_of_bytes(trace: Path, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """What a reading tells its bytes to, shown as a bar where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if quiet or not console.is_terminal or not trace.exists():
        yield None
        return
    from lmc.sim.readers.files import files_of

    with Progress(console=console, transient=True) as bar:
        total = sum(file.stat().st_size for file in files_of(trace))
        yield partial(bar.advance, bar.add_task(f"reading {trace.name}", total=total))


def print_json(value: Any) -> None:
    """One JSON value on standard output, and nothing else."""
    from json import dumps

    typer.echo(dumps(value, indent=1))


def print_bad_lines(reading: Reading) -> None:
    """How many lines were left out, and why the first ones were; on standard error."""
    if not reading.bad_count:
        return
    typer.secho(f"{reading.bad_count} lines were left out:", fg=typer.colors.YELLOW, err=True)
    for bad in reading.bad[:SHOWN]:
        typer.secho(f"  {bad}", fg=typer.colors.YELLOW, err=True)
    if reading.bad_count > SHOWN:
        typer.secho(f"  and {reading.bad_count - SHOWN} more", fg=typer.colors.YELLOW, err=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is names and whose others are numbers, none of which is cut.

    Where it is wider than the terminal, or standard output none, lines are as long as they need.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    wide = console.measure(table, options=console.options.update(max_width=1000)).maximum
    typer.echo(title)
    Console(width=max(wide, console.width)).print(table)


def check_plot(path: Path | None) -> None:
    """Raise ValueError, before any work, unless a figure can be written there."""
    if path is None:
        return
    if path.suffix.lower() not in FIGURES:
        raise ValueError(f"plot: got {str(path)!r}, want a file that ends in {', '.join(FIGURES)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"plot: got {str(path)!r}, but there is no folder {path.parent}")
