"""Raw chat requests, one a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from lmc.sim.readers.records import (
    RecordError,
    fields_of,
    json_lines,
    length,
    name_of,
    number,
    text_of,
)
from lmc.sim.readers.text import TextFormat
from lmc.sim.trace import Request


@dataclass
class Chat(TextFormat):
    """JSONL of {session, timestamp (s), messages: [{role, content}]}; a line is one request.

    Its prompt is all its messages. Content is text, or a list of parts of which those of type
    text count. output_length is 0 where the line does not say.
    """

    example: ClassVar[str] = (
        '{"session": "a", "timestamp": 1.5, "messages": [{"role": "user", "content": "Hi"}]}'
    )

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        # Without times a line is a whole conversation, of the format `trajectories`.
        timed = "timestamp" in keys or b'"timestamp"' in head[:2000]
        return timed and "messages" in keys and not keys & {"hash_ids", "requests"}

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        return json_lines(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        timestamp, session = number(r, "timestamp"), name_of(r, "session")
        output = length(r, "output_length", 0)
        messages = r.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RecordError("messages: want a list of at least one message")
        tokens, segments = self._tokenizer.prompt(message_of(m) for m in messages)
        yield Request(
            timestamp=timestamp,
            session=session,
            input_tokens=len(tokens),
            output_tokens=output,
            tokens=tokens,
            segments=segments,
        )


def message_of(message: Any, role: str = "role", content: str = "content") -> tuple[str, str]:
    """(role, text) of a message. Raises RecordError, also for parts that are not text."""
    m = fields_of(message)
    said = m.get(content)
    if isinstance(said, list):
        return text_of(m.get(role), role), "".join(_part(part) for part in said)
    # An assistant that only calls tools says nothing.
    return text_of(m.get(role), role), "" if said is None else text_of(said, content)


def _part(part: Any) -> str:
    p = fields_of(part)
    if p.get("type") != "text":
        raise RecordError(f"content: got a part of type {p.get('type')!r:.40}, want text alone")
    return text_of(p.get("text"), "text")
