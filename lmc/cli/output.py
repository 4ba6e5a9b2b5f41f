"""What all commands print alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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
    """One JSON value on standard output, and nothing else; what is not finite is null."""
    from json import dumps

    typer.echo(dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_bad_lines(reading: Reading) -> None:
    """What was assumed of a trace, how many lines were left out, and why the first ones were; on
    standard error."""
    if reading.assumed:
        typer.secho(f"taken for: {reading.assumed}", fg=typer.colors.YELLOW, err=True)
    if not reading.bad_count:
        return
    typer.secho(f"{reading.bad_count} lines were left out:", fg=typer.colors.YELLOW, err=True)
    for bad in reading.bad[:SHOWN]:
        typer.secho(f"  {visible(str(bad))}", fg=typer.colors.YELLOW, err=True)
    if reading.bad_count > SHOWN:
        typer.secho(f"  and {reading.bad_count - SHOWN} more", fg=typer.colors.YELLOW, err=True)


def visible(text: str, keep: str = "") -> str:
    """Of text that a file holds, nothing that a terminal would obey; `keep` stays as it is."""
    return "".join(c if c.isprintable() or c in keep else "?" for c in text)


def plain(text: str) -> str:
    """The same, for a table, which obeys markup, too."""
    from rich.markup import escape

    return escape(visible(text))


def table(title: str, columns: Sequence[str], left: int = 1, caption: str = "") -> Table:
    """An empty table of `left` columns of names, and of numbers behind them."""
    from rich import box
    from rich.table import Table

    made = Table(
        title=title or None, caption=caption or None, title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    return made


def show(*tables: Table, console: Console | None = None) -> None:
    """Print tables whole: one that is wider than the terminal has lines as long as it needs.

    Titles and captions, which a table would wrap to its own width, stand above and below.
    """
    import rich.console

    console = console or rich.console.Console()
    unbounded, usual = console.options.update(max_width=10_000), console.width
    for each in tables:
        title, caption, each.title, each.caption = each.title, each.caption, None, None
        wide = console.measure(each, options=unbounded).maximum
        if title:
            console.print(title, style="bold", soft_wrap=True, markup=False, highlight=False)
        console.width = max(wide, usual)
        console.print(each)
        console.width = usual
        if caption:
            console.print(caption, style="dim", markup=False, highlight=False)
        console.print()


def size(nbytes: int) -> str:
    """1536 -> 1.5 KiB."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def check_plot(path: Path | None) -> None:
    """Raise ValueError, before any work, unless a figure can be written there."""
    if path is None:
        return
    if path.suffix.lower() not in FIGURES:
        raise ValueError(f"plot: got {str(path)!r}, want a file that ends in {', '.join(FIGURES)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"plot: got {str(path)!r}, but there is no folder {path.parent}")
