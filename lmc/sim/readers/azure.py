"""Azure's public LLM inference traces of 2023 and 2024 (Patel et al., Splitwise, ISCA 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from lmc.sim.readers.records import columns_of, csv_rows, fields_of, length, moment
from lmc.sim.trace import Request


@dataclass(frozen=True)
class Azure:
    """CSV of TIMESTAMP,ContextTokens,GeneratedTokens: lengths alone, nothing of a cache."""

    has_text: ClassVar[bool] = False
    example: ClassVar[str] = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44"
    )

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return b"ContextTokens" in columns_of(head)

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        return csv_rows(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        yield Request(
            timestamp=moment(r, "TIMESTAMP"),
            session="",
            input_tokens=length(r, "ContextTokens"),
            output_tokens=length(r, "GeneratedTokens"),
        )
