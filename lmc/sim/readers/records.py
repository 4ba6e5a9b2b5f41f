"""Records of a file, and their fields, checked."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import IO, Any, cast

FLOAT = re.compile(r"[+-]?((\d+\.\d*|\.\d+)(e[+-]?\d+)?|\d+e[+-]?\d+)", re.I)
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


def json_lines_or_one(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """The same, or one value over many lines, where the first of them is a lone {."""
    if cast(io.BufferedReader, stream).peek(64).split(b"\n")[0].strip() != b"{":
        yield from json_lines(stream)
        return
    try:
        yield 1, json.load(stream)
    except UnicodeDecodeError as e:
        yield 1, Broken(f"not UTF-8 at byte {e.start}")
    except (ValueError, RecursionError) as e:
        yield 1, Broken(f"not JSON: {e}")


def csv_rows(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """(line, row as a dict) of a CSV file with a header; numbers are numbers.

    Lines stand alone: no field goes on in the next line, so that a stray quotation mark costs its
    own line only.
    """
    header: list[str] = []
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            fields = next(csv.reader([line.decode()]))
        except UnicodeDecodeError as e:
            yield number, Broken(f"not UTF-8 at byte {e.start} of the line")
            continue
        except csv.Error as e:
            yield number, Broken(f"not CSV: {e}")
            continue
        if not header:
            header = [field.strip() for field in fields]
        elif len(fields) != len(header):
            yield number, Broken(f"got {len(fields)} columns, want {len(header)}")
        else:
            yield number, {k: _value(v.strip()) for k, v in zip(header, fields, strict=True)}


def _value(text: str) -> int | float | str:
    """What a CSV field says: a number if it is written as one."""
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    return float(text) if FLOAT.fullmatch(text) else text


def fields_of(record: Any) -> Mapping[str, Any]:
    """The record as an object. Raises RecordError if it is none."""
    if not isinstance(record, Mapping):
        raise RecordError(f"got {_shown(record)}, want a JSON object")
    return record


def number(record: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A finite number. Raises RecordError."""
    value = record.get(name, default)
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


def moment(record: Mapping[str, Any], name: str) -> float:
    """Seconds since 1970, of an ISO date and time, in UTC where it names no zone. Raises
    RecordError."""
    text = str(record.get(name) or "").strip()
    try:
        # Any number of digits of a second, and a Z; Python 3.10 reads six, and none.
        six = re.sub(r"\.(\d+)", lambda digits: f".{digits[1][:6]:0<6}", text)
        at = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", six))
    except ValueError:
        raise RecordError(f"{name}: got {text[:40]!r}, want an ISO date and time") from None
    return at.replace(tzinfo=at.tzinfo or timezone.utc).timestamp()


def whole(record: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """An integer of any size. Raises RecordError."""
    value = record.get(name, default)
    if type(value) is not int:
        what = "nothing" if name not in record else _shown(value)
        raise RecordError(f"{name}: got {what}, want an integer")
    return value


def length(record: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A number of tokens, 0 or more. Raises RecordError."""
    value = number(record, name, default)
    if value != int(value) or not 0 <= value < MOST_TOKENS:
        raise RecordError(f"{name}: got {value:g}, want 0 to {MOST_TOKENS - 1}")
    return int(value)


def name_of(record: Mapping[str, Any], name: str) -> str:
    """A name that may be text or a number, "" if it is missing or null. Raises RecordError."""
    value = record.get(name)
    if value is None:
        return ""
    if type(value) is float and value.is_integer():  # as pandas writes a column with gaps
        value = int(value)
    return str(value) if type(value) is int else text_of(value, name)


def text_of(value: Any, name: str) -> str:
    """Text that can be written as UTF-8. Raises RecordError."""
    if not isinstance(value, str):
        raise RecordError(f"{name}: got {_shown(value)}, want text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecordError(f"{name}: has half of a surrogate pair") from None
    return value


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


def columns_of(head: bytes) -> list[bytes]:
    """The first line of a file, as the names of columns."""
    return [column.strip() for column in head.partition(b"\n")[0].replace(b'"', b"").split(b",")]
