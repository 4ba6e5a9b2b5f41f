"""Session logs of Claude Code, as it writes them below ~/.claude/projects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from lmc.sim.readers.records import (
    RecordError,
    fields_of,
    json_lines,
    length,
    moment,
    name_of,
    text_of,
)
from lmc.sim.readers.text import Sessions
from lmc.sim.trace import Request

DEEPEST = 100_000  # lines of one branch of a session


@dataclass
class ClaudeCode(Sessions):
    """JSONL of {type, uuid, parentUuid, sessionId, timestamp (ISO), message: {role, content}}.

    Every answer of the model is a request; its prompt are the messages that lead to it by
    parentUuid, tool calls and results among them, so that what was taken back is in no later one.
    An answer written in several lines (one message.id) is one request. The system prompt, the
    tools and images are not in the log, and so in no prompt; nor is what the model thought, which
    is not sent again.
    """

    example: ClassVar[str] = (
        '{"type": "user", "uuid": "u1", "parentUuid": null, "sessionId": "s", "timestamp": '
        '"2026-01-01T00:00:00Z", "message": {"role": "user", "content": "Fix the test."}}\n'
        '{"type": "assistant", "uuid": "a1", "parentUuid": "u1", "sessionId": "s", "timestamp": '
        '"2026-01-01T00:00:09Z", "message": {"id": "m1", "role": "assistant", "content": "Done."}}'
    )

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return "type" in keys and re.search(rb'"parentUuid"\s*:', head) is not None

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        self.restart()
        # By uuid: what it stands behind, and (role, text), None for what is no message.
        self._lines: dict[str, tuple[str | None, tuple[str, str] | None, float | None]] = {}
        self._answers: set[str] = set()
        return json_lines(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        if not isinstance(r.get("uuid"), str):
            return  # a summary, a snapshot of files, and the like
        behind = r.get("parentUuid")
        if behind is not None and not isinstance(behind, str):
            raise RecordError("parentUuid: want text or null")
        at = None if "timestamp" not in r else moment(r, "timestamp")
        message = r.get("message")
        said = None
        if r.get("type") in ("user", "assistant"):
            m = fields_of(message)
            said = (text_of(m.get("role", r["type"]), "role"), content_of(m.get("content")))
            answer = text_of(m.get("id") or r["uuid"], "message.id")
            if r["type"] == "assistant" and answer not in self._answers:
                self._answers.add(answer)
                prompt, asked = self._branch(behind)
                if prompt:
                    session = name_of(r, "sessionId")
                    if r.get("isSidechain"):
                        session += f"/{name_of(r, 'agentId')}"
                    usage = m.get("usage")
                    known = isinstance(usage, Mapping) and "output_tokens" in usage
                    output = length(usage, "output_tokens") if known and usage else None
                    yield self.request(
                        session, prompt, said[1], at if asked is None else asked, output
                    )
        self._lines[r["uuid"]] = (behind, said, at)

    def _branch(self, last: str | None) -> tuple[list[tuple[str, str]], float | None]:
        """What leads to a line, that line included, and when it was written."""
        at = self._lines[last][2] if last in self._lines else None
        said: list[tuple[str, str]] = []
        for _ in range(DEEPEST):
            if last is None or last not in self._lines:
                break
            last, message, _ = self._lines[last]
            if message is not None:
                said.append(message)
        return said[::-1], at


def content_of(content: Any) -> str:
    """The text of a message's content: as it is, or of its blocks, calls and results as JSON."""
    if content is None:
        return ""
    if isinstance(content, str):
        return text_of(content, "content")
    if not isinstance(content, list):
        raise RecordError("content: want text or a list of blocks")
    parts = []
    for block in map(fields_of, content):
        match block.get("type"):
            case "text" | "input_text" | "output_text":
                parts.append(text_of(block.get("text"), "text"))
            case "tool_use":
                call = {"name": block.get("name"), "input": block.get("input")}
                parts.append(text_of(json.dumps(call, ensure_ascii=False), "tool_use"))
            case "tool_result":
                parts.append(content_of(block.get("content")))
    return "\n".join(parts)
