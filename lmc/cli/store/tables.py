"""What `lmc store` prints: tables, sizes and ages."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmc.cli.output import plain, size, table

if TYPE_CHECKING:
    from rich.table import Table

AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def groups(rows: list[dict[str, Any]]) -> Table:
    """Rows of `inspect.grouped`."""
    names = [name for name in ("namespace", "label", "origin") if name in rows[0]]
    right = ["chunks", "tokens", "KV", "on disk", "age", "hits"]
    shown = table("", [*names, *right], left=len(names))
    above: list[str] = []
    for row in rows:
        group = [
            plain(row[name][:12] if name == "namespace" else row[name]) or "-"
            for name in names[:-1]
        ]
        shown.add_row(
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
    return shown


def records(rows: list[dict[str, Any]]) -> Table:
    """Rows of `Entry.facts`."""
    parts = any(row["heads"][:2] != [0, row["heads"][2]] for row in rows)
    left = ["id", "namespace", "origin", "codec"]
    right = ["tokens", "start", "on disk", "age", "read", "hits", *(["heads"] if parts else [])]
    shown = table("", left + right, left=len(left))
    for row in rows:
        shown.add_row(
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
    return shown


def summary(path: Path, facts: dict[str, Any]) -> Table:
    """`inspect.totals` as a whole."""
    shown = table("", ["store", plain(str(path))], left=2)
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
        shown.add_row(name, value)
    return shown


def codecs(rows: list[dict[str, Any]]) -> Table:
    """Codecs of `inspect.totals`."""
    shown = table("", ["codec", "records", "KV", "stored", "ratio", "rel. RMS error"])
    for row in rows:
        shown.add_row(
            row["codec"],
            f"{row['records']:,}",
            size(row["bytes"]),
            size(row["payload_bytes"]),
            f"{row['ratio']:.2f}",
            f"{row['error']:.2e}" if row["error"] else "0",
        )
    return shown


def layouts(rows: list[dict[str, Any]]) -> Table:
    """Layouts of `inspect.totals`."""
    shown = table("", ["kind", "dtype", "L", "heads", "D", "sections", "KV"], left=2)
    for row in rows:
        numbers = (f"{row[name]:,}" for name in ("L", "heads", "D", "records"))
        shown.add_row(row["kind"], row["dtype"], *numbers, size(row["bytes"]))
    return shown


def count(n: int, what: str) -> str:
    """1, "record" -> 1 record; 2 -> 2 records."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def age(moment: float | None) -> str:
    """How long ago a moment was, in its largest unit: 90 s ago -> 1m."""
    if moment is None:
        return "never"
    seconds = max(0.0, time.time() - moment)
    unit = next((u for u in ("d", "h", "m") if seconds >= AGES[u]), "s")
    return f"{seconds / AGES[unit]:.0f}{unit}"
