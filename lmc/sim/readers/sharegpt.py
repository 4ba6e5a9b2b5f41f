"""Conversations of ShareGPT: one array of all of them, or one a line."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, ClassVar, cast

import ijson

from lmc.sim.readers.chat import message_of
from lmc.sim.readers.records import RecordError, fields_of, json_lines, name_of
from lmc.sim.readers.text import Sessions
from lmc.sim.trace import Request

DEEPEST = 100
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
ROLES |= {"bard": "assistant", "ai": "assistant"}


@dataclass
class ShareGpt(Sessions):
    """Conversations {id, conversations: [{from, value}]}, also with {role, content}.

    Every answer is a request whose prompt is all that was said before it. There are no times, so
    requests arrive a second apart in the order of the file.
    """

    example: ClassVar[str] = (
        '{"id": "a1", "conversations": [{"from": "human", "value": "Hi"}, '
        '{"from": "gpt", "value": "Hello"}]}'
    )

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        if head.startswith(b"["):
            return b'"conversations"' in head
        return bool(keys & {"conversations", "conversation"})

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        start = cast(io.BufferedReader, stream).peek(64).lstrip()
        return enumerate(items(stream), 1) if start.startswith(b"[") else json_lines(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        turns = r.get("conversations", r.get("conversation"))
        if not isinstance(turns, list):
            raise RecordError("conversations: want a list of turns")
        return self.of_conversation(name_of(r, "id"), map(turn_of, turns))


def turn_of(turn: Any) -> tuple[str, str]:
    """(role, text) of a turn, however its fields are called."""
    t = fields_of(turn)
    role, text = message_of(t, *(("from", "value") if "from" in t else ("role", "content")))
    return ROLES.get(role, role), text


def items(stream: IO[bytes]) -> Iterator[Any]:
    """The items of a JSON array, one at a time.

    Not `ijson.items`, which names every level by all levels above it: text nested 100,000 deep
    would take gigabytes.
    """
    builder, depth = ijson.ObjectBuilder(), 0
    # Floats as floats: ijson's C backend dies of integers of thousands of digits otherwise.
    events = ijson.basic_parse(stream, use_float=True)
    if next(events, ("", None))[0] != "start_array":
        raise ijson.JSONError("want an array")
    for event, value in events:
        if depth == 0:
            if event == "end_array":
                return
            builder = ijson.ObjectBuilder()
        depth += event.startswith("start_") - event.startswith("end_")
        if depth > DEEPEST:
            raise ijson.JSONError(f"nested more than {DEEPEST} deep")
        builder.event(event, value)
        if depth == 0:
            yield builder.value
