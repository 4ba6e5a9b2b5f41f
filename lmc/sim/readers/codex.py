"""Session logs of Codex, as it writes them below ~/.codex/sessions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from lmc.sim.readers.claude_code import content_of
from lmc.sim.readers.records import RecordError, fields_of, json_lines, moment, name_of, text_of
from lmc.sim.readers.text import Sessions
from lmc.sim.trace import Request

# Items that the model wrote, by their type; messages are its own where their role says so.
CALLS = ("function_call", "custom_tool_call", "local_shell_call", "web_search_call", "reasoning")
RESULTS = ("function_call_output", "custom_tool_call_output")


@dataclass
class Codex(Sessions):
    """JSONL of {timestamp (ISO), type, payload}; one file is one session.

    What the model wrote between what it was sent, messages, calls and reasoning, is one request,
    whose prompt are all items before it. Where the history was compacted, prompts begin with what
    took its place. Reasoning is encrypted and in no prompt; instructions are, as far as the log
    has them; tools are not.
    """

    example: ClassVar[str] = (
        '{"timestamp": "2026-01-01T00:00:00Z", "type": "response_item", "payload": {"type": '
        '"message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]}}\n'
        '{"timestamp": "2026-01-01T00:00:09Z", "type": "response_item", "payload": {"type": '
        '"message", "role": "assistant", "content": [{"type": "output_text", "text": "Done."}]}}'
    )

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return {"type", "payload"} <= keys

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        self.restart()
        self._session, self._writes = "", False
        self._said: list[tuple[str, str]] = []
        self._asked: float | None = None
        return json_lines(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        kind, payload = r.get("type"), r.get("payload")
        if kind == "session_meta":
            about = fields_of(payload)
            self._session = name_of(about, "id")
            for name in ("instructions", "base_instructions"):
                text = about.get(name)
                text = text.get("text") if isinstance(text, Mapping) else text
                if text:
                    self._said.append(("system", text_of(text, name)))
        elif kind == "compacted":
            summary = fields_of(payload).get("message") or ""
            kept = [said for said in self._said if said[0] in ("system", "developer")]
            self._said, self._writes = [*kept, ("user", text_of(summary, "message"))], False
        if kind != "response_item":
            return
        item = fields_of(payload)
        at = None if "timestamp" not in r else moment(r, "timestamp")
        role, text = _said(item)
        if role == "assistant":
            if not self._writes and self._said:
                yield self.request(self._session, self._said, text, self._asked or at)
            self._writes = True
        else:
            self._writes, self._asked = False, at
        if text:
            self._said.append((role, text))


def _said(item: Mapping[str, Any]) -> tuple[str, str]:
    """(role, text) of an item; a call or a result as JSON or text."""
    kind = item.get("type")
    if kind == "message":
        return text_of(item.get("role"), "role"), content_of(item.get("content"))
    if kind in RESULTS:
        output = item.get("output")
        if isinstance(output, Mapping):
            output = output.get("content")
        return "tool", content_of(output)
    if kind not in CALLS:
        raise RecordError(f"payload: got an item of type {kind!r:.40}")
    call = {k: item[k] for k in ("name", "arguments", "input", "action") if k in item}
    return "assistant", text_of(json.dumps(call, ensure_ascii=False), "call") if call else ""
