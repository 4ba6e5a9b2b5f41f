"""What `lmc store` prints: tables, sizes and ages."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def show(table: Table) -> None:
    """Print a table."""
    from rich.console import Console

    Console().print(table)


def _table(names: str, right: str) -> Table:
    """A table with columns of these names, and behind them some that are aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in names.split(","):
        table.add_column(name, overflow="fold")
    for name in right.split(","):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def groups(rows: list[dict[str, Any]]) -> Table:
    """Rows of `inspect.grouped`."""
    names = [name for name in ("namespace", "label", "origin") if name in rows[0]]
    table = _table(",".join(names), "chunks,tokens,KV,on disk,oldest,newest,hits")
    for row in rows:
        table.add_row(
            *(_shown(name, row[name]) for name in names),
            f"{row['chunks']:,}",
            f"{row['tokens']:,}",
            size(row["bytes"]),
            size(row["stored_bytes"]),
            age(row["oldest"]),
            age(row["newest"]),
            f"{row['hits']:,}",
        )
    return table


def records(rows: list[dict[str, Any]]) -> Table:
    """Rows of `Entry.facts`."""
    names = ("id", "namespace", "origin", "codec")
    table = _table(",".join(names), "tokens,start,on disk,stored,read,hits,rank")
    for row in rows:
        table.add_row(
            *(_shown(name, row[name]) for name in names[:2]),
            row["origin"] + (" tail" if row["tail"] else ""),
            row["codec"],
            f"{row['tokens']:,}",
            f"{row['start']:,}",
            size(row["stored_bytes"]),
            age(row["created"]),
            age(row["last_read"]),
            f"{row['hits']:,}",
            f"{row['shard']}/{row['shards']}",
        )
    return table


def summary(path: Path, facts: dict[str, Any]) -> Table:
    """`inspect.totals` as a whole."""
    from rich.text import Text

    table = _table("store", "")
    table.columns[1].header = Text(str(path))
    sizes = {
        "format": str(facts["format"]),
        "records": f"{facts['records']:,}",
        "segment files": f"{facts['segments']:,}, {size(facts['file_bytes'])}",
        "live": size(facts["live_bytes"]),
        "dead": size(facts["dead_bytes"]),
        "index": size(facts["index_bytes"]),
        "quarantined": ", ".join(f"{n:,} {why}" for why, n in facts["quarantined"].items()) or "0",
    }
    for name, value in sizes.items():
        table.add_row(name, value)
    return table


def codecs(rows: list[dict[str, Any]]) -> Table:
    """Codecs of `inspect.totals`."""
    table = _table("codec", "records,KV,stored,ratio,rel. RMS error")
    for row in rows:
        table.add_row(
            row["codec"],
            f"{row['records']:,}",
            size(row["bytes"]),
            size(row["payload_bytes"]),
            f"{row['ratio']:.2f}",
            f"{row['error']:.2e}" if row["error"] else "0",
        )
    return table


def layouts(rows: list[dict[str, Any]]) -> Table:
    """Layouts of `inspect.totals`."""
    table = _table("dtype", "L,S,G,D,ranks,records,KV")
    for row in rows:
        numbers = (f"{row[name]:,}" for name in ("L", "S", "G", "D", "ranks", "records"))
        table.add_row(row["dtype"], *numbers, size(row["bytes"]))
    return table


def _shown(name: str, value: str) -> str:
    """Digests cut short; of a label, which a file says, nothing that a terminal would obey."""
    if name in ("id", "namespace"):
        return value[:12]
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "?" for c in value)) or "-"


def size(nbytes: int) -> str:
    """1536 -> 1.5 KiB."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.1f} {unit}" if unit != "B" else f"{nbytes} B"
        value /= 1024
    return f"{value:,.1f} TiB"


def age(moment: float | None) -> str:
    """How long ago a moment was, in its largest unit: 90 s ago -> 1m."""
    if moment is None:
        return "never"
    seconds = max(0.0, time.time() - moment)
    unit = next((u for u in ("d", "h", "m") if seconds >= AGES[u]), "s")
    return f"{seconds / AGES[unit]:.0f}{unit}"
