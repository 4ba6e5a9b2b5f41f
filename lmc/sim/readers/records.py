"""Records of a file, and their fields, checked."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

MOST_TOKENS = 1 << 31  # of one prompt; more is a broken number, not a trace


class RecordError(ValueError):
    """Why a record is no request."""


@dataclass(frozen=True)
class Broken:
    """Stands for a line that could not even be parsed."""

    reason: str


def json_lines(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """(line, JSON value) of each line that is not blank."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError as e:
            record = Broken(f"not UTF-8 at byte {e.start} of the line")
        except (ValueError, RecursionError) as e:
            record = Broken(f"not JSON: {e}")
        yield number, record


def csv_rows(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """(line, row as a dict) of a CSV file with a header."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
    lines = csv.DictReader(text, restkey="more", restval="")
    while True:
        try:
            row: Any = next(lines, None)
        except csv.Error as e:
            row = Broken(f"not CSV: {e}")
        if row is None:
            return
        yield lines.line_num, row


def fields_of(record: Any) -> Mapping[str, Any]:
    """The record as an object. Raises RecordError if it is none."""
    if not isinstance(record, Mapping):
        raise RecordError(f"got {_shown(record)}, want a JSON object")
    return record


def number(record: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A finite number, which CSV gives as text. Raises RecordError."""
    value = record.get(name, default)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RecordError(f"{name}: got {_shown(value)}, want a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        what = "nothing" if name not in record else _shown(value)
        raise RecordError(f"{name}: got {what}, want a number")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise RecordError(f"{name}: got {value}, want a finite number")
    return value


def length(record: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A number of tokens, 0 or more. Raises RecordError."""
    value = number(record, name, default)
    if value != int(value) or not 0 <= value < MOST_TOKENS:
        raise RecordError(f"{name}: got {value:g}, want a whole number from 0 to {MOST_TOKENS - 1}")
    return int(value)


def name_of(record: Mapping[str, Any], name: str) -> str:
    """A name that may be text or a number, "" if it is missing. Raises RecordError."""
    value = record.get(name, "")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RecordError(f"{name}: got {_shown(value)}, want text or a number")
    return str(value)


def hash_ids(record: Mapping[str, Any], tokens: int, block_tokens: int) -> list[int]:
    """Block ids, one for each block of a prompt, the last perhaps partial. Raises RecordError."""
    ids = record.get("hash_ids")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise RecordError(f"hash_ids: got {_shown(ids)}, want a list of integers")
    full, partial = divmod(tokens, block_tokens)
    if len(ids) not in {full, full + bool(partial)}:
        raise RecordError(
            f"hash_ids: got {len(ids)} for {tokens} tokens, want {full + bool(partial)} "
            f"of {block_tokens} each"
        )
    return ids


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
