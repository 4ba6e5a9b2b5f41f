"""What `lmc store` prints: tables, sizes and ages."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def show(table: Table) -> None:
    """Print a table: as wide as the terminal, and not cut at 80 columns where there is none."""
    import sys

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    if console.width >= 100:
        table.padding = (0, 1, 0, 0)
    console.print(table)


def _table(names: str, right: str) -> Table:
    """A table with columns of these names, and behind them some that are aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in names.split(","):
        table.add_column(name, overflow="fold", no_wrap=name in ("id", "namespace"), min_width=8)
    for name in right.split(",") if right else ():
        table.add_column(name, justify="right", no_wrap=True)
    return table


def groups(rows: list[dict[str, Any]]) -> Table:
    """Rows of `inspect.grouped`."""
    names = [name for name in ("namespace", "label", "origin") if name in rows[0]]
    table = _table(",".join(names), "chunks,tokens,KV,on disk,age,hits")
    above: list[str] = []
    for row in rows:
        group = [
            _plain(row[name][:12] if name == "namespace" else row[name]) for name in names[:-1]
        ]
        table.add_row(
            *(group if group != above else [""] * len(group)),  # said once
            row["origin"],
            f"{row['chunks']:,}",
            f"{row['tokens']:,}",
            size(row["bytes"]),
            size(row["stored_bytes"]),
            " - ".join(dict.fromkeys((age(row["newest"]), age(row["oldest"])))),
            f"{row['hits']:,}",
        )
        above = group
    return table


def records(rows: list[dict[str, Any]]) -> Table:
    """Rows of `Entry.facts`."""
    parts = any(row["heads"][:2] != [0, row["heads"][2]] for row in rows)
    right = "tokens,start,on disk,age,read,hits" + (",heads" if parts else "")
    table = _table("id,namespace,origin,codec", right)
    for row in rows:
        table.add_row(
            row["id"][:12],
            row["namespace"][:12],
            row["origin"] + (" tail" if row["tail"] else ""),
            row["codec"],
            f"{row['tokens']:,}",
            f"{row['start']:,}",
            size(row["stored_bytes"]),
            age(row["created"]),
            age(row["last_read"]),
            f"{row['hits']:,}",
            *(["{}-{} of {}".format(*row["heads"])] if parts else []),
        )
    return table


def summary(path: Path, facts: dict[str, Any]) -> Table:
    """`inspect.totals` as a whole."""
    from rich.text import Text

    table = _table("store", "")
    table.add_column(Text(str(path)))
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
    table = _table("kind,dtype", "L,heads,D,sections,KV")
    for row in rows:
        numbers = (f"{row[name]:,}" for name in ("L", "heads", "D", "records"))
        table.add_row(row["kind"], row["dtype"], *numbers, size(row["bytes"]))
    return table


def _plain(label: str) -> str:
    """Of a label, which is a file's, nothing that a terminal would obey."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "?" for c in label)) or "-"


def count(n: int, what: str) -> str:
    """1, "record" -> 1 record; 2 -> 2 records."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def size(nbytes: int) -> str:
    """1536 -> 1.5 KiB."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def age(moment: float | None) -> str:
    """How long ago a moment was, in its largest unit: 90 s ago -> 1m."""
    if moment is None:
        return "never"
    seconds = max(0.0, time.time() - moment)
    unit = next((u for u in ("d", "h", "m") if seconds >= AGES[u]), "s")
    return f"{seconds / AGES[unit]:.0f}{unit}"
