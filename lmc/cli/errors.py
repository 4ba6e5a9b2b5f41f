"""How the command line tells a user about an input that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """A wrong input is the user's to mend: one red line and exit code 2, no traceback."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as e:
        from pydantic import ValidationError

        from lmc.registry import one_line

        text = one_line(e) if isinstance(e, ValidationError) else " ".join(str(e).split())
        typer.secho(f"lmc: {text}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from e
