"""Conversations of ShareGPT: one array of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import IO, Any

import ijson

from lmc.sim.readers.chat import message_of
from lmc.sim.readers.records import RecordError, fields_of, name_of
from lmc.sim.readers.text import TextFormat
from lmc.sim.trace import Request

DEEPEST = 100
ROLES = {"human": "user", "gpt": "assistant"}
ANSWERS = ("gpt", "assistant", "chatgpt", "bing", "bard")


@dataclass
class ShareGpt(TextFormat):
    """A JSON array of {id, conversations: [{from, value}]}.

    Every answer is a request whose prompt is all that was said before it. There are no times, so
    requests arrive a second apart in the order of the file.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._arrivals = count()

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return head.startswith(b"[") and b'"conversations"' in head

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        self._arrivals = count()
        return enumerate(_items(stream), 1)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        turns = r.get("conversations")
        if not isinstance(turns, list):
            raise RecordError("conversations: want a list of turns")
        session = name_of(r, "id")
        said: list[tuple[str, str]] = []
        for turn in turns:
            role, text = message_of(turn, "from", "value")
            if role in ANSWERS and said:
                tokens, segments = self._tokenizer.prompt(said)
                answer, _ = self._tokenizer.prompt([("assistant", text)])
                yield Request(
                    timestamp=float(next(self._arrivals)),
                    session=session,
                    input_tokens=len(tokens),
                    output_tokens=len(answer),
                    tokens=tokens,
                    segments=segments,
                )
            said.append((ROLES.get(role, role), text))


def _items(stream: IO[bytes]) -> Iterator[Any]:
    """The items of a JSON array, one at a time.

    Not `ijson.items`, which names every level by all levels above it: text nested 100,000 deep
    would take gigabytes.
    """
    builder, depth = ijson.ObjectBuilder(), 0
    # Floats as floats: ijson's C backend dies of integers of thousands of digits otherwise.
    events = ijson.basic_parse(stream, use_float=True)
    if next(events, ("", None))[0] != "start_array":
        raise ijson.JSONError("want an array of conversations")
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
