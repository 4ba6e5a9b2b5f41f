"""Which format a file is of, from its first bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lmc.sim.readers.files import DAMAGED, files_of, unpacked

LOOKED_AT, LINES, FILES = 1 << 22, 50, 16


def detect(path: Path) -> str:
    """The name of the format. Raises ValueError for a file that is empty, or of none.

    Of a folder the first files are looked at, since one alone may hold no request.
    """
    from lmc.sim.readers import FORMATS

    first, damage = b"", ""
    for file in files_of(path)[:FILES]:
        head, why = _head(file)
        head, damage = head.lstrip(b"\xef\xbb\xbf \r\n\t"), damage or why
        keys = set() if head.startswith(b"[") else _keys(head)
        for name in FORMATS.entries:
            if head and FORMATS.load(name).recognises(head, keys):
                return name
        first = first or head
    if not first:
        raise ValueError(f"{path}: {damage or 'the trace is empty'}")
    raise ValueError(
        f"{path}: cannot tell the format of this trace, which begins with {_begin(first)}; name "
        f"one of {', '.join(FORMATS.names())} (`lmc trace formats` shows a line of each)"
    )


def _begin(head: bytes) -> str:
    """What a file begins with, for people: its first line, or the keys of its first object."""
    line = head.split(b"\n")[0][:200].decode(errors="replace")
    try:
        record = json.loads(head.split(b"\n")[0])
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        return f"an object of {', '.join(map(repr, list(record)[:12])) or 'no keys'}"
    return repr(line[:60])


def _head(file: Path) -> tuple[bytes, str]:
    """The first bytes of a file, as far as they can be unpacked, and why, if they hold no line."""
    parts: list[bytes] = []
    why = ""
    with file.open("rb") as raw:
        try:
            stream = unpacked(raw)
            while sum(map(len, parts)) < LOOKED_AT and (part := stream.read1(1 << 16)):
                parts.append(part)
            if part:
                why = f"its first {LOOKED_AT >> 20} MiB are blank"
        except DAMAGED as e:  # counted when it is read, if anything is
            why = f"it cannot be read: {' '.join(str(e).split()) or type(e).__name__}"
    return b"".join(parts), why


def _keys(head: bytes) -> set[str]:
    """The keys of the first JSON object among the first lines, or those that are named at all."""
    for line in head.split(b"\n")[:LINES]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            return set(record)
    # One object over many lines, or one line longer than what was looked at.
    known = ["requests", "hash_ids", "chat_id", "messages", "tokens", "lmc_trace"]
    known += ["conversations", "history", "trajectory", "type", "payload"]
    return {k for k in known if re.search(rf'"{k}"\s*:'.encode(), head)}
