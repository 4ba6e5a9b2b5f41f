"""`lmc store`: see what a folder of the disk tier holds, check it, tidy it, move chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lmc.cli.errors import errors_in_one_line
from lmc.cli.output import print_json, show, size
from lmc.cli.store import tables
from lmc.cli.store.tables import AGES, count
from lmc.sizes import parse_bytes

if TYPE_CHECKING:
    from lmc.store.disk.folder import Folder

store_app = typer.Typer(
    help="Stores on disk: what is in one, whether it is sound, what may go; chunks out and in.",
    no_args_is_help=True,
)


By = Literal["namespace", "label", "origin", "none"]
# As `lmc.store.record.Origin` has them; that module is not imported for help.
Kind = Literal["exact", "isolated", "anchored", "blended"]
Store = Annotated[Path, typer.Argument(metavar="PATH", help="The folder of a disk tier.")]
Namespace = Annotated[
    str | None,
    typer.Option(metavar="HEX", help="Only the namespace whose digest begins so, as ls prints it."),
]
OfOrigin = Annotated[Kind | None, typer.Option(help="Only chunks of this origin.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@store_app.command()
def ls(
    path: Store,
    namespace: Namespace = None,
    origin: OfOrigin = None,
    by: Annotated[By, typer.Option(help="A row for each; none: for each record.")] = "namespace",
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many rows; of records, the latest.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what a store holds: by namespace (model and tenant), or record by record.

    For example: lmc store ls kv --by none --limit 20
    """
    with _opened(path) as folder:
        from lmc.cli.store.inspect import entries, grouped

        found = entries(folder, namespace, origin)
        if by == "none":
            rows = [entry.facts() for entry in sorted(found, key=lambda e: -e.header.seq)]
        else:
            rows = grouped(found, by)
        shown = rows[:limit]
        if as_json:
            print_json(shown)
        elif not rows:
            typer.echo("no records" if namespace is None and origin is None else "no such records")
        else:
            show(tables.records(shown) if by == "none" else tables.groups(shown))
            if len(shown) < len(rows):
                typer.echo(f"{len(shown):,} of {len(rows):,} rows")
        _warn(path, folder)


@store_app.command()
def stat(path: Store, as_json: AsJson = False) -> None:
    """Say how large a store is, how much of it is dead, how well it compresses, at what error.

    For example: lmc store stat kv
    """
    with _opened(path) as folder:
        from lmc.cli.store.inspect import totals

        facts = totals(folder)
        if as_json:
            print_json(facts)
            return
        show(tables.summary(path, facts))
        if facts["records"]:
            show(tables.codecs(facts["codecs"]))
            show(tables.layouts(facts["layouts"]))
        _warn(path, folder)


@store_app.command()
def verify(path: Store, as_json: AsJson = False) -> None:
    """Read every record past the page cache. Exit code 1: some are damaged, and quarantined.

    For example: lmc store verify kv
    """
    with _opened(path) as folder:
        from dataclasses import asdict

        from lmc.cli.store.inspect import LOST, opening
        from lmc.cli.store.upkeep import verify_all

        with _progress(folder) as done:
            found = verify_all(folder, done)
        met = opening(folder)
        if as_json:
            faults = [{**asdict(fault), "id": fault.id.hex()} for fault in found.faults]
            print_json({**asdict(found), "faults": faults, "opening": met})
        else:
            for fault in found.faults:
                left = "" if fault.quarantined else ", not quarantined"
                typer.echo(
                    f"{fault.id.hex()[:12]} in segment {fault.segment}: {fault.reason}{left}"
                )
            quarantined = sum(fault.quarantined for fault in found.faults)
            typer.echo(
                f"{count(found.records, 'sound record')} ({size(found.bytes)}), "
                f"{len(found.faults):,} damaged"
                + (f", {quarantined:,} of them quarantined" if found.faults else "")
                + (f", {found.gone:,} evicted meanwhile" if found.gone else "")
            )
        _warn(path, folder, sum(fault.reason == "index" for fault in found.faults))
        if found.faults or any(kind in met for kind in LOST):
            raise typer.Exit(1)


@store_app.command()
def gc(
    path: Store,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE", help="Forget what was neither stored nor read for 12h, 7d, ..."
        ),
    ] = None,
    namespace: Namespace = None,
    origin: OfOrigin = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Forget, the least recently used first, until the store has 10GiB, 500MiB, ...",
        ),
    ] = None,
    quarantined: Annotated[
        bool, typer.Option("--quarantined", help="Forget what was quarantined, and why.")
    ] = False,
) -> None:
    """Give back the space of what is dead; before that, forget what all options together name.

    For example: lmc store gc kv --older-than 7d
    """
    with _opened(path, to_write=True) as folder:
        from lmc.cli.store.inspect import entries
        from lmc.cli.store.upkeep import compact, forget, forget_quarantined, to_forget

        most = None if to is None else parse_bytes(to)
        until = None if older_than is None else time.time() - _seconds(older_than)
        before = _file_bytes(folder)
        forgotten = 0
        if not (older_than is namespace is origin is to is None):
            found = entries(folder, namespace, origin)
            if until is not None:
                found = (entry for entry in found if entry.used < until)
            forgotten = forget(folder, to_forget(folder, found, most))
        known = forget_quarantined(folder) if quarantined else 0
        compact(folder)
        after = _file_bytes(folder)
        what = f"{count(forgotten, 'record')} forgotten" + (
            f", {known:,} quarantined" if known else ""
        )
        typer.echo(
            f"{what}; {size(before)} before, {size(after)} after, {size(before - after)} given back"
        )
        _warn(path, folder)


@store_app.command(name="export")
def export_(
    path: Store,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors to write.")],
    namespace: Namespace = None,
    limit_bytes: Annotated[
        str | None, typer.Option(metavar="BYTES", help="The latest chunks, up to 2GiB of KV, ...")
    ] = None,
) -> None:
    """Write chunks, decoded, to a safetensors file. Exit code 1: damaged ones were left out.

    For example: lmc store export kv chunks.safetensors
    """
    with _opened(path) as folder:
        from lmc.cli.store.transfer import export_chunks

        limit = None if limit_bytes is None else parse_bytes(limit_bytes)
        found = export_chunks(folder, out, namespace, limit)
        typer.echo(f"{out}: {count(found.records, 'record')}, {size(found.bytes)} of KV")
        if found.gone:
            typer.echo(f"{found.gone:,} were evicted meanwhile", err=True)
        _warn(path, folder)
        if found.damaged:
            typer.secho(
                f"{found.damaged:,} are damaged and were left out: see `lmc store verify {path}`",
                fg=typer.colors.YELLOW,
                err=True,
            )
            raise typer.Exit(1)


@store_app.command(name="import")
def import_(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="The folder of a disk tier, made when missing.")
    ],
    source: Annotated[Path, typer.Argument(metavar="FILE", help="What `export` wrote.")],
    capacity: Annotated[
        str, typer.Option(metavar="BYTES", help="What the folder may take; nothing is evicted.")
    ] = "10GiB",
) -> None:
    """Put the chunks of a file into a store, once all of it is checked.

    For example: lmc store import kv chunks.safetensors
    """
    with errors_in_one_line("store"):
        from lmc.cli.store.transfer import import_chunks

        found = import_chunks(path, source, parse_bytes(capacity))
        known = f"; {found.known:,} add nothing to what is there" if found.known else ""
        typer.echo(f"{path}: {count(found.records, 'record')}, {size(found.bytes)} of KV{known}")
        if found.failed:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in found.failed.items())
            typer.secho(f"not put: {kinds}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1)


@contextmanager
def _opened(path: Path, to_write: bool = False) -> Iterator[Folder]:
    """The store in `path`, and what goes wrong with it in one line."""
    with errors_in_one_line("store"):
        import lmdb

        from lmc.cli.store.inspect import existing
        from lmc.store.disk.header import HeaderError

        folder = existing(path, to_write)
        try:
            yield folder
        except (lmdb.Error, HeaderError) as e:
            raise OSError(f"the index fails ({e}): {_REMEDY.format(path=path)}") from e
        finally:
            folder.close()


_REMEDY = "delete {path}/index while nobody uses the store, and it is made again"


def _warn(path: Path, folder: Folder, index_faults: int = 0) -> None:
    """Say, on standard error, what of a store cannot be shown."""
    from lmc.cli.store.inspect import opening

    met = opening(folder)
    lines = []
    if met:
        kinds = {
            "records_torn": "torn record",
            "headers_unreadable": "unreadable header",
            "segments_unreadable": "unreadable file",
        }
        left = [count(met[kind], what) for kind, what in kinds.items() if kind in met]
        without = f", without {', '.join(left)}" if left else ""
        lines.append(f"the index was made again from the segment files{without}")
    if index_faults := index_faults + folder.counts["index_entries_damaged"]:
        lines.append(f"{count(index_faults, 'index fault')}: {_REMEDY}")
    for line in lines:
        typer.secho(line.format(path=path), fg=typer.colors.YELLOW, err=True)


@contextmanager
def _progress(folder: Folder) -> Iterator[Any]:
    """Called with bytes as they are done; a bar on a terminal."""
    import sys

    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        *Progress.get_default_columns()[:2],
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        live = sum(use.live for use in folder.catalog.segments().values())
        task = bar.add_task("verify", total=live)
        yield lambda nbytes: bar.advance(task, nbytes)


def _seconds(age: str) -> float:
    """The inverse: 7d -> 604800."""
    number, unit = age[:-1], age[-1:]
    if unit not in AGES or not number.isdecimal():
        raise ValueError(f"--older-than: got {age!r}, want a number and one of s, m, h, d: 7d")
    return float(int(number) * AGES[unit])


def _file_bytes(folder: Folder) -> int:
    return sum(use.end for use in folder.catalog.segments().values())
