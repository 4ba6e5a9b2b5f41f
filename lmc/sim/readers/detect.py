"""Which format a file is of, from its first bytes."""

from __future__ import annotations

import json
from pathlib import Path

from lmc.sim.readers.files import DAMAGED, files_of, unpacked

LOOKED_AT = 1 << 22


def detect(path: Path) -> str:
    """The name of the format. Raises ValueError for a file that is of none."""
    from lmc.sim.readers import FORMATS

    file = files_of(path)[0]
    with file.open("rb") as raw:
        try:
            head = unpacked(raw).read(LOOKED_AT)
        except DAMAGED:
            head = b""
    found = _of(head.lstrip(b"\xef\xbb\xbf \r\n\t"))
    if found is None:
        raise ValueError(
            f"{path}: cannot tell the format of this trace; name one of "
            f"{', '.join(FORMATS.names())}"
        )
    return found


def _of(head: bytes) -> str | None:
    first = head.partition(b"\n")[0]
    if head.startswith(b"["):
        return "sharegpt" if b'"conversations"' in head else None
    if not head.startswith(b"{"):
        columns = [c.strip() for c in first.split(b",")]
        if b"ContextTokens" in columns:
            return "azure"
        return "burstgpt" if b"Request tokens" in columns else None
    try:
        keys = set(json.loads(first))
    except (ValueError, RecursionError):
        # One object over many lines, or one line longer than what was looked at.
        keys = {k for k in ("hash_id_scope", "messages", "tokens", "hash_ids") if _names(head, k)}
        keys |= {"requests"} if "hash_id_scope" in keys else set()
    if "requests" in keys:
        return "weka"
    if "hash_ids" in keys:
        return "bailian" if "chat_id" in keys else "mooncake"
    if "messages" in keys:
        return "chat"
    return "tokens" if "tokens" in keys else None


def _names(head: bytes, key: str) -> bool:
    return f'"{key}":'.encode() in head.replace(b'" :', b'":')
