"""Coding-agent sessions as WEKA publishes them (github.com/callanjfox/kv-cache-tester)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from lmc.sim.readers.records import (
    Broken,
    RecordError,
    fields_of,
    json_lines_or_one,
    length,
    name_of,
    number,
)
from lmc.sim.trace import Request


@dataclass(frozen=True)
class _Session:
    name: str
    number: int
    block_tokens: int
    shared: bool


@dataclass
class Weka:
    """Sessions {id, block_size, hash_id_scope, requests: [{t (s), type, in, out, hash_ids}]}.

    One session a line, one a file, or a folder of such files. A bad request costs itself alone.
    All sessions begin at their own t = 0. hash_id_scope is `local` (the default): ids mean
    something inside their session alone, or `global`.

    Requests of type `subagent` hold requests of their own, which share the session's ids. Their
    times count from the subagent's own in some publications and from the session's start in
    others: they are taken as the former where the first of them would else come before it.
    """

    has_text: ClassVar[bool] = False
    example: ClassVar[str] = (
        '{"id": "s1", "block_size": 64, "requests": [{"t": 1.0, "type": "s", "in": 130, "out": 3, '
        '"hash_ids": [1, 2, 3]}]}'
    )

    def __post_init__(self) -> None:
        self._sessions = 0

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return "requests" in keys

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        for line, session in json_lines_or_one(stream):
            self._sessions += 1
            try:
                if isinstance(session, Broken):
                    raise RecordError(session.reason)
                about = _about(fields_of(session), self._sessions)
                for request in _flat(session.get("requests"), 0.0):
                    yield line, (about, *request)
            except RecordError as e:
                yield line, Broken(str(e))

    def requests(self, record: Any) -> Iterable[Request]:
        session, r, begin = record
        block_tokens = session.block_tokens
        tokens, ids = length(r, "in"), r.get("hash_ids")
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise RecordError("hash_ids: want a list of integers")
        # Full blocks only, as published; a partial one would do no harm.
        if len(ids) * block_tokens >= tokens + block_tokens:
            raise RecordError(
                f"hash_ids: got {len(ids)} of {block_tokens} tokens for {tokens} tokens"
            )
        yield Request(
            timestamp=begin + number(r, "t"),
            session=session.name,
            input_tokens=tokens,
            output_tokens=length(r, "out", 0),
            blocks=ids if session.shared else [(session.number, i) for i in ids],
            block_tokens=block_tokens,
        )


def _about(session: Mapping[str, Any], number: int) -> _Session:
    block_tokens, scope = length(session, "block_size"), session.get("hash_id_scope", "local")
    if not block_tokens:
        raise RecordError("block_size: got 0, want at least 1")
    if scope not in ("local", "global"):
        raise RecordError(f"hash_id_scope: got {scope!r:.40}, want local or global")
    name = name_of(session, "id") or f"session {number}"
    return _Session(name, number, block_tokens, scope == "global")


def _flat(requests: Any, begin: float) -> Iterator[tuple[Mapping[str, Any], float]]:
    """(request, what its time counts from), with those of subagents where their parent stands."""
    todo = [iter([(r, begin) for r in _list(requests)])]
    while todo:
        entry = next(todo[-1], None)
        if entry is None:
            todo.pop()
            continue
        r, begin = fields_of(entry[0]), entry[1]
        if r.get("type") != "subagent":
            yield r, begin
            continue
        inner = _list(r.get("requests"))
        at = number(r, "t")
        if inner and number(fields_of(inner[0]), "t") < at - 1:
            begin += at
        todo.append(iter([(x, begin) for x in inner]))


def _list(requests: Any) -> list[Any]:
    if not isinstance(requests, list):
        raise RecordError("requests: want a list")
    return requests
