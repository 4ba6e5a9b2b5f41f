"""What all commands print alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lmc.sim.readers import Reading

SHOWN = 5


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
