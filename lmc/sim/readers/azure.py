"""Azure's public LLM inference traces of 2023 and 2024 (Patel et al., Splitwise, ISCA 2024)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import IO, Any, ClassVar

from lmc.sim.readers.records import RecordError, columns_of, csv_rows, fields_of, length
from lmc.sim.trace import Request


@dataclass(frozen=True)
class Azure:
    """CSV of TIMESTAMP,ContextTokens,GeneratedTokens: lengths alone, so it can only be timed."""

    has_text: ClassVar[bool] = False

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return b"ContextTokens" in columns_of(head)

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        return csv_rows(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        text = str(r.get("TIMESTAMP") or "").strip()
        try:
            # Any number of digits of a second; Python 3.10 reads six and no others.
            six = re.sub(r"\.(\d+)", lambda digits: f".{digits[1][:6]:0<6}", text)
            at = datetime.fromisoformat(six)
        except ValueError:
            raise RecordError(f"TIMESTAMP: got {text[:40]!r}, want an ISO date and time") from None
        yield Request(
            timestamp=at.replace(tzinfo=at.tzinfo or timezone.utc).timestamp(),
            session="",
            input_tokens=length(r, "ContextTokens"),
            output_tokens=length(r, "GeneratedTokens"),
        )
