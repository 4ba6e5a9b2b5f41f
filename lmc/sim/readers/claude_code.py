"""Session logs of Claude Code, as it writes them below ~/.claude/projects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from lmc.sim.readers.text import END, Sessions, with_end
from lmc.sim.trace import Request


@dataclass
class _Line:
    """One line: what it stands behind, what it says, and of which answer it is."""

    behind: str | None
    said: tuple[str, str] | None = None
    at: float | None = None
    answer: str | None = None


@dataclass
class ClaudeCode(Sessions):
    """JSONL of {type, uuid, parentUuid, sessionId, timestamp (ISO), message: {role, content}}.

    Every answer of the model is a request; its prompt are the messages that lead to it by
    parentUuid, all results of an answer's tool calls among them, so that what was taken back is in
    no later one. A line whose parent is missing stands behind the line before it. An answer
    written in several lines (one message.id), and copied into other files, is one request. The
    system prompt, the tools and images are not in the log, and so in no prompt; nor is what the
    model thought, which is not sent again, nor what Claude Code says itself of errors.
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

    def restart(self) -> None:
        super().restart()
        self._answers: set[str] = set()  # of all files

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        self._lines: dict[str, _Line] = {}
        self._of_answer: dict[str, list[str]] = {}  # lines, and results of its calls
        self._last: dict[str, str] = {}  # line, by who speaks
        self._pending: tuple[str, Request] | None = None
        return with_end(json_lines(stream))

    def requests(self, record: Any) -> Iterable[Request]:
        if record is END:
            yield from self._flushed(None)
            return
        r = fields_of(record)
        if not isinstance(r.get("uuid"), str):
            return  # a summary, a snapshot of files, and the like
        uuid, behind = r["uuid"], r.get("parentUuid")
        who = str(r.get("agentId") or "") if r.get("isSidechain") else ""
        if behind is not None and behind not in self._lines:
            behind = self._last.get(who)
        # First of all, so that what comes behind a wrong line is behind all before it.
        line = self._lines[uuid] = _Line(behind)
        self._last[who] = uuid
        if r.get("type") in ("user", "assistant"):
            message = fields_of(r.get("message"))
            self._say(r, line, message, uuid)
        if "timestamp" in r:
            line.at = moment(r, "timestamp")
        if line.answer is not None and r.get("type") == "assistant":
            yield from self._answered(r, line, who)

    def _say(
        self, r: Mapping[str, Any], line: _Line, message: Mapping[str, Any], uuid: str
    ) -> None:
        """What a line of a person, of tools or of the model says, and of which answer it is."""
        if message.get("model") == "<synthetic>" or r.get("isApiErrorMessage"):
            return
        content = message.get("content")
        if text := content_of(content):
            line.said = (text_of(message.get("role", r["type"]), "role"), text)
        if r["type"] == "assistant":
            line.answer = text_of(message.get("id") or uuid, "message.id")
        elif line.behind is not None and _has_results(content):
            line.answer = self._lines[line.behind].answer
        if line.answer is not None:
            self._of_answer.setdefault(line.answer, []).append(uuid)

    def _answered(self, r: Mapping[str, Any], line: _Line, who: str) -> Iterator[Request]:
        """The request of an answer, once all of its lines are there."""
        assert line.answer is not None
        usage = r["message"].get("usage")
        output = 0
        if isinstance(usage, Mapping) and "output_tokens" in usage:
            output = length(usage, "output_tokens")
        if self._pending is not None and self._pending[0] == line.answer:
            pending = self._pending[1]
            most = max(output, pending.output_tokens)
            self._pending = (line.answer, replace(pending, output_tokens=most))
        elif line.answer not in self._answers:
            yield from self._flushed(line.answer)
            self._answers.add(line.answer)
            prompt, asked = self._branch(line.behind)
            if prompt:
                session = name_of(r, "sessionId") + (f"/{who}" if who else "")
                at = line.at if asked is None else asked
                text = line.said[1] if line.said else ""
                request = self.request(session, prompt, text, at, output or None)
                self._pending = (line.answer, request)

    def _flushed(self, answer: str | None) -> Iterator[Request]:
        if self._pending is not None and self._pending[0] != answer:
            yield self._pending[1]
            self._pending = None

    def _branch(self, last: str | None) -> tuple[list[tuple[str, str]], float | None]:
        """What leads to a line, that line included, and when the last of it was written."""
        path: list[str] = []
        passed: set[str] = set()  # a damaged log may go in circles
        at: float | None = None
        while last in self._lines and last not in passed:
            assert last is not None
            passed.add(last)
            path.append(last)
            last = self._lines[last].behind
        said: list[tuple[str, str]] = []
        told: set[str] = set()
        for uuid in reversed(path):
            answer = self._lines[uuid].answer
            # An answer's calls are told together, and then all of their results.
            for each in self._of_answer[answer] if answer is not None else [uuid]:
                line = self._lines[each]
                if each not in told and line.said is not None:
                    said.append(line.said)
                    at = line.at if line.at is not None else at
                told.add(each)
        return said, at


def _has_results(content: Any) -> bool:
    """Whether a message brings what came of tool calls."""
    blocks = content if isinstance(content, list) else []
    return any(isinstance(b, Mapping) and b.get("type") == "tool_result" for b in blocks)


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
