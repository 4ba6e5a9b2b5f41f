"""What all commands print alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lmc.sim.readers import Reading

SHOWN = 5


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
