"""Qwen-Bailian usage traces (Wang et al., "KVCache in the wild", ATC 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from lmc.sim.readers.records import fields_of, hash_ids, json_lines, length, number, whole
from lmc.sim.trace import Request


@dataclass
class Bailian:
    """JSONL of {chat_id, parent_chat_id, timestamp (s), input_length, output_length, hash_ids}.

    A session is named by the root of its chain of parents; a parent that the file does not hold
    is a root. block_tokens: tokens of one of the prefix-chained hash_ids.
    """

    has_text: ClassVar[bool] = False
    example: ClassVar[str] = (
        '{"chat_id": 159, "parent_chat_id": 55, "timestamp": 61.1, "input_length": 30, '
        '"output_length": 132, "type": "text", "turn": 2, "hash_ids": [1089, 1090]}'
    )
    block_tokens: int = 16

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ValueError(f"got block_tokens {self.block_tokens}, want at least 1")
        self._roots: dict[int, int] = {}

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return {"hash_ids", "chat_id"} <= keys and "requests" not in keys

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        self._roots.clear()
        return json_lines(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        tokens = length(r, "input_length")
        blocks = hash_ids(r, tokens, self.block_tokens)
        timestamp, output = number(r, "timestamp"), length(r, "output_length")
        chat, parent = whole(r, "chat_id"), whole(r, "parent_chat_id", -1)
        root = self._roots[chat] = chat if parent == -1 else self._roots.get(parent, parent)
        yield Request(
            timestamp=timestamp,
            session=str(root),
            input_tokens=tokens,
            output_tokens=output,
            blocks=blocks,
            block_tokens=self.block_tokens,
        )
