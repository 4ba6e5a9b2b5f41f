"""Coding-agent sessions as WEKA publishes them (github.com/callanjfox/kv-cache-tester)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from lmc.sim.readers.records import (
    Broken,
    RecordError,
    fields_of,
    json_lines,
    length,
    name_of,
    number,
)
from lmc.sim.trace import Request


@dataclass(frozen=True)
class Weka:
    """Sessions {id, block_size, hash_id_scope, requests: [{t (s), type, in, out, hash_ids}]}.

    One session a line, one a file, or a folder of such files. Requests of type `subagent` hold
    requests of their own, which share the session's ids. Unless hash_id_scope is `global`, ids
    mean something inside their session alone. All sessions begin at their own t = 0.
    """

    has_text: ClassVar[bool] = False

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        lines = list(json_lines(stream))
        if len(lines) > 1 and isinstance(lines[0][1], Broken):  # one session over many lines
            stream.seek(0)
            try:
                yield 1, json.load(stream)
            except (ValueError, RecursionError) as e:
                yield 1, Broken(f"not JSON: {e}")
        else:
            yield from lines

    def requests(self, record: Any) -> Iterable[Request]:
        session = fields_of(record)
        name = name_of(session, "id")
        block_tokens = length(session, "block_size")
        if not block_tokens:
            raise RecordError("block_size: got 0, want at least 1")
        shared = session.get("hash_id_scope") == "global"
        for r in _flat(session.get("requests")):
            tokens, ids = length(r, "in"), r.get("hash_ids")
            if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                raise RecordError("hash_ids: want a list of integers")
            if len(ids) * block_tokens >= tokens + block_tokens:
                raise RecordError(
                    f"hash_ids: got {len(ids)} of {block_tokens} tokens for {tokens} tokens"
                )
            yield Request(
                timestamp=number(r, "t"),
                session=name,
                input_tokens=tokens,
                output_tokens=length(r, "out", 0),
                blocks=ids if shared else [(name, i) for i in ids],
                block_tokens=block_tokens,
            )


def _flat(requests: Any) -> Iterator[Mapping[str, Any]]:
    """Requests, with those of subagents where their parent stands."""
    if not isinstance(requests, list):
        raise RecordError("requests: want a list")
    todo = list(reversed(requests))
    while todo:
        r = fields_of(todo.pop())
        if r.get("type") == "subagent":
            inner = r.get("requests")
            if not isinstance(inner, list):
                raise RecordError("requests of a subagent: want a list")
            todo += reversed(inner)
        else:
            yield r
