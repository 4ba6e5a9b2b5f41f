"""BurstGPT (Wang et al., "BurstGPT: a real-world workload dataset", KDD 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from lmc.sim.readers.records import columns_of, csv_rows, fields_of, length, name_of, number
from lmc.sim.trace import Request


@dataclass(frozen=True)
class BurstGpt:
    """CSV of Timestamp (s),Model,Request tokens,Response tokens,...: lengths alone.

    A later edition has Session ID as well. Failed requests, with 0 response tokens, are kept:
    their prompts arrived.
    """

    has_text: ClassVar[bool] = False
    example: ClassVar[str] = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log"
    )

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return b"Request tokens" in columns_of(head)

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        return csv_rows(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        yield Request(
            timestamp=number(r, "Timestamp"),
            session=name_of(r, "Session ID"),
            input_tokens=length(r, "Request tokens"),
            output_tokens=length(r, "Response tokens"),
        )
