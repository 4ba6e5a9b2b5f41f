"""The fields of a record, checked: ValueError says what was got and what is wanted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any, NoReturn

# Lengths and ids are int32 in what engines take; anything larger is a broken file.
LIMIT = 2**31


def json_object(text: bytes) -> dict[str, Any]:
    """The JSON object that UTF-8 bytes hold."""
    try:
        value = json.loads(text.decode(), parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    return an_object(value)


def an_object(value: Any) -> dict[str, Any]:
    """The value, if it is a JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"got {short(value)}, want a JSON object")
    return value


def count(record: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A number of tokens: an integer of at least 0."""
    value = record.get(name, default)
    if type(value) is not int or not 0 <= value < LIMIT:
        _refuse(record, name, f"an integer from 0 to {LIMIT - 1}")
    return value


def integer(record: Mapping[str, Any], name: str) -> int:
    """Any integer."""
    value = record.get(name)
    if type(value) is not int:
        _refuse(record, name, "an integer")
    return value


def seconds(record: Mapping[str, Any], name: str) -> float:
    """A finite number."""
    value = record.get(name)
    # Beyond this, adding a microsecond is lost in a float64; no clock counts so far.
    if type(value) not in (int, float) or not abs(value) < 2**53:
        _refuse(record, name, "a finite number")
    return float(value)


def label(record: Mapping[str, Any], name: str) -> str:
    """A text or an integer, as text; "" for none."""
    value = record.get(name)
    if value is None:
        return ""
    if type(value) not in (str, int):
        _refuse(record, name, "a text")
    return str(value)


def integers(record: Mapping[str, Any], name: str) -> list[int]:
    """A list of integers."""
    value = record.get(name)
    if type(value) is not list or not set(map(type, value)) <= {int}:
        _refuse(record, name, "a list of integers")
    return value


def blocks(record: Mapping[str, Any], name: str, tokens: int, block_tokens: int) -> list[int]:
    """Ids of all blocks of a prompt of so many tokens, the last of them partial perhaps."""
    ids = integers(record, name)
    wanted = math.ceil(tokens / block_tokens)
    if len(ids) != wanted:
        raise ValueError(
            f"{name}: got {len(ids)} ids, want {wanted} for {tokens} tokens "
            f"in blocks of {block_tokens}"
        )
    return ids


def _refuse(record: Mapping[str, Any], name: str, wanted: str) -> NoReturn:
    got = short(record[name]) if name in record else "no such field"
    raise ValueError(f"{name}: got {got}, want {wanted}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"broken JSON: got {name}, which JSON has not")
