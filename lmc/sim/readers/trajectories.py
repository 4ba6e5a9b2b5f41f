"""Trajectories of agents: what was said and done, without times, one session a record."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, ClassVar, cast

from lmc.sim.readers.claude_code import content_of
from lmc.sim.readers.records import (
    RecordError,
    fields_of,
    json_lines_or_one,
    length,
    moment,
    name_of,
    text_of,
)
from lmc.sim.readers.sharegpt import ROLES, items
from lmc.sim.readers.text import Sessions
from lmc.sim.trace import Request

LISTS = ("messages", "history", "trajectory")
NAMES = ("instance_id", "id", "trajectory_id", "session_id")


@dataclass
class Trajectories(Sessions):
    """Records {messages (or history, or trajectory): [{role, content}]}, perhaps with a name.

    One a line, or one a file (`.traj` of SWE-agent, mini-SWE-agent), or a folder of these. Every
    answer is a request; its prompt is all before it, calls of tools among it. Lines of requests
    that have times are of the format `chat`.
    """

    example: ClassVar[str] = (
        '{"instance_id": "a__b-1", "messages": [{"role": "user", "content": "Fix it."}, '
        '{"role": "assistant", "content": "Done."}]}'
    )

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return bool(keys & set(LISTS)) and not keys & {"timestamp", "hash_ids", "requests"}

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        if cast(io.BufferedReader, stream).peek(64).lstrip().startswith(b"["):
            return enumerate(items(stream), 1)
        return json_lines_or_one(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        turns = next((r[name] for name in LISTS if _has_roles(r.get(name))), None)
        if turns is None:
            raise RecordError(f"{', '.join(LISTS)}: want one that is a list of {{role, content}}")
        session = next((name_of(r, name) for name in NAMES if r.get(name) is not None), "")
        return self.of_conversation(session, map(_turn, turns))


@dataclass
class OpenHands(Sessions):
    """A JSON array of events {source, action, args} and {observation, content}: one session.

    What the agent did is a request; its prompt are all events before it, and its time that of the
    last of them, where events have times (ISO). Actions of one answer of the model
    (`tool_call_metadata.model_response.id`) are one.
    """

    example: ClassVar[str] = (
        '[{"id": 0, "source": "user", "action": "message", "args": {"content": "Fix it."}}, '
        '{"id": 1, "source": "agent", "action": "finish", "args": {"thought": "Done."}}]'
    )

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return head.startswith(b"[") and b'"source"' in head and b'"action"' in head

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        self._said: list[tuple[str, str]] = []
        self._asked: float | None = None
        self._answers: set[Any] = set()
        return enumerate(items(stream), 1)

    def requests(self, record: Any) -> Iterable[Request]:
        event = fields_of(record)
        at = moment(event, "timestamp") if event.get("timestamp") else None
        args = fields_of(event.get("args") or {})
        action = text_of(event.get("action", ""), "action")
        if "observation" in event:
            self._hear("tool", content_of(event.get("content")), at)
        elif action == "system":
            self._hear("system", content_of(args.get("content")), at)
        elif event.get("source") == "user":
            self._hear("user", content_of(args.get("content")), at)
        elif event.get("source") == "agent":
            did = {k: v for k, v in args.items() if isinstance(v, str) and v}
            text = text_of(json.dumps({"action": action, **did}, ensure_ascii=False), "args")
            # Actions of one answer are carried out one by one, with what came of them between.
            answer, output = _answer_of(event)
            if self._said and answer not in self._answers:
                asked = at if self._asked is None else self._asked
                yield self.request("", self._said, text, asked, output)
            self._answers.add(answer)
            self._said.append(("assistant", text))

    def _hear(self, role: str, text: str, at: float | None) -> None:
        """What the next prompt has behind all before it."""
        if text:
            self._said.append((role, text))
            self._asked = at


def _answer_of(event: Mapping[str, Any]) -> tuple[str, int | None]:
    """What names the answer of the model that an action is of, else the event; and its tokens."""
    found: Any = event
    for name in ("tool_call_metadata", "model_response"):
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(found.get("id"), str):
        return f"event {event.get('id')}", None
    usage = found.get("usage")
    known = isinstance(usage, Mapping) and "completion_tokens" in usage
    return found["id"], length(usage, "completion_tokens") if known and usage else None


def _has_roles(turns: Any) -> bool:
    return isinstance(turns, list) and any(isinstance(t, Mapping) and "role" in t for t in turns)


def _turn(turn: Any) -> tuple[str, str]:
    """(role, text), calls of tools as JSON behind it."""
    t = fields_of(turn)
    role = text_of(t.get("role"), "role")
    said = next((t[name] for name in ("content", "text", "system_prompt") if t.get(name)), None)
    text = content_of(said)
    if t.get("tool_calls"):
        text += text_of(json.dumps(t["tool_calls"], ensure_ascii=False), "tool_calls")
    return ROLES.get(role, role), text
