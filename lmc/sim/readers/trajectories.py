"""Trajectories of agents: what was said and done, without times, one session a record."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, ClassVar, cast

from lmc.sim.readers.claude_code import content_of
from lmc.sim.readers.records import Broken, RecordError, fields_of, json_lines, name_of, text_of
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
        self.restart()
        start = cast(io.BufferedReader, stream).peek(64).split(b"\n")[0].strip()
        if start.startswith(b"["):
            return enumerate(items(stream), 1)
        return _whole(stream) if start == b"{" else json_lines(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        turns = next((r[name] for name in LISTS if _has_roles(r.get(name))), None)
        if turns is None:
            raise RecordError(f"{', '.join(LISTS)}: want one that is a list of {{role, content}}")
        session = next((name_of(r, name) for name in NAMES if name in r), "")
        return self.of_conversation(session, map(_turn, turns))


@dataclass
class OpenHands(Sessions):
    """A JSON array of events {source, action, args} and {observation, content}: one session.

    What the agent did is a request; its prompt are all events before it. Actions of one answer of
    the model (`tool_call_metadata.model_response.id`) are one.
    """

    example: ClassVar[str] = (
        '[{"id": 0, "source": "user", "action": "message", "args": {"content": "Fix it."}}, '
        '{"id": 1, "source": "agent", "action": "finish", "args": {"thought": "Done."}}]'
    )

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return head.startswith(b"[") and b'"source"' in head and b'"action"' in head

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        self.restart()
        self._said: list[tuple[str, str]] = []
        self._answer: Any = None
        return enumerate(items(stream), 1)

    def requests(self, record: Any) -> Iterable[Request]:
        event = fields_of(record)
        if "observation" in event:
            if text := content_of(event.get("content")):
                self._said.append(("tool", text))
                self._answer = None
            return
        args = fields_of(event.get("args") or {})
        action = text_of(event.get("action", ""), "action")
        if action == "system":
            self._said.append(("system", content_of(args.get("content"))))
        elif event.get("source") == "user":
            if text := content_of(args.get("content")):
                self._said.append(("user", text))
                self._answer = None
        elif event.get("source") == "agent":
            did = {k: v for k, v in args.items() if isinstance(v, str) and v}
            text = text_of(json.dumps({"action": action, **did}, ensure_ascii=False), "args")
            answer = _answer_of(event)
            if self._said and (self._answer is None or answer != self._answer):
                yield self.request("", self._said, text)
            self._answer = answer
            self._said.append(("assistant", text))


def _answer_of(event: Mapping[str, Any]) -> Any:
    """What names the answer of the model that an action is of; the event where nothing does."""
    found: Any = event
    for name in ("tool_call_metadata", "model_response", "id"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if found is not None else ("event", event.get("id"))


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


def _whole(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    try:
        yield 1, json.load(stream)
    except (ValueError, RecursionError) as e:
        yield 1, Broken(f"not JSON: {e}")
