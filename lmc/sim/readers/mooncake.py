"""Traces of Mooncake (Qin et al., FAST 2025), and what others call timed_trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from lmc.sim.readers.records import fields_of, hash_ids, json_lines, length, name_of, number
from lmc.sim.trace import Request


@dataclass(frozen=True)
class Mooncake:
    """JSONL of {timestamp (ms), input_length, output_length, hash_ids, perhaps session_id}.

    block_tokens: tokens that one of the prefix-chained hash_ids stands for.
    """

    has_text: ClassVar[bool] = False
    block_tokens: int = 512

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ValueError(f"got block_tokens {self.block_tokens}, want at least 1")

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return "hash_ids" in keys and not keys & {"chat_id", "requests"}

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        return json_lines(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        tokens = length(r, "input_length")
        yield Request(
            timestamp=number(r, "timestamp") / 1000,
            session=name_of(r, "session_id"),
            input_tokens=tokens,
            output_tokens=length(r, "output_length"),
            blocks=hash_ids(r, tokens, self.block_tokens),
            block_tokens=self.block_tokens,
        )
