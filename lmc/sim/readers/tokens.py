"""Our own interchange: prompts as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, ClassVar

import numpy as np

from lmc.sim.readers.records import (
    RecordError,
    fields_of,
    json_lines,
    length,
    name_of,
    number,
    text_of,
)
from lmc.sim.trace import Request


@dataclass(frozen=True)
class Tokens:
    """JSONL of {session, timestamp (s), output_length, tokens: [ids], segments: [[name, a, b]]}.

    segments, which may be missing, name the parts `[a, b)` of the prompt, in order.
    """

    has_text: ClassVar[bool] = False
    example: ClassVar[str] = (
        '{"session": "a", "timestamp": 1.5, "output_length": 4, "tokens": [7, 8, 9], '
        '"segments": [["question", 1, 3]]}'
    )

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return "tokens" in keys and not keys & {"hash_ids", "messages", "requests"}

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        return json_lines(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        ids = r.get("tokens")
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
            raise RecordError("tokens: want a list of token ids from 0 to 2147483647")
        yield Request(
            timestamp=number(r, "timestamp"),
            session=name_of(r, "session"),
            input_tokens=len(ids),
            output_tokens=length(r, "output_length", 0),
            tokens=np.array(ids, dtype=np.int32),
            segments=_segments(r.get("segments", []), len(ids)),
        )


def _segments(raw: Any, T: int) -> list[tuple[str, int, int]]:
    segments: list[tuple[str, int, int]] = []
    position = 0
    for part in raw if isinstance(raw, list) else [raw]:
        match part:
            case [str(), start, end] if (
                type(start) is type(end) is int and position <= start < end <= T
            ):
                segments.append((text_of(part[0], "segment"), start, end))
                position = end
            case _:
                raise RecordError(
                    f"segments: got {str(part)[:40]}, want [name, start, end], ascending, "
                    f"not empty and inside the {T} tokens"
                )
    return segments
