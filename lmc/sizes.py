"""Sizes as people write them: `100GiB`, `50k`."""

from __future__ import annotations

import re

SCALE = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
SCALE |= {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
SCALE |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def scaled(text: str) -> float:
    """The number that `text` says, such as `64GiB`; ValueError where it says none."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) *([a-z]*)", text.strip().lower())
    if match is None or match[2] not in SCALE:
        raise ValueError(f"got {text!r}, want a number such as 1000 or 64GiB")
    return float(match[1]) * SCALE[match[2]]


def gib(n: int) -> str:
    """1610612736 -> 1.5 GiB."""
    size = n / 2**30
    return f"{size:,.0f} GiB" if size >= 100 else f"{size:.3g} GiB"


def in_bytes(text: str) -> bool:
    """Whether a size says that it is one of bytes, as `64GiB` and `1TB` do, and `50k` does not."""
    return text.strip().lower().endswith("b")


def parse_bytes(size: int | str) -> int:
    """Bytes, from a number or such as `100GiB`.

    Raises:
        ValueError: anything else, or less than 1.
    """
    value = size if isinstance(size, int) else int(scaled(size))
    if value < 1:
        raise ValueError(f"got {size!r}, want at least 1 byte, as a number or such as 100GiB")
    return value
