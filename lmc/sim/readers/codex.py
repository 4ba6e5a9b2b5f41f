"""Session logs of Codex, as it writes them below ~/.codex/sessions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any, ClassVar

from lmc.sim.readers.claude_code import content_of
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

# Items that the model wrote, by their type; messages are its own where their role says so.
CALLS = ("function_call", "custom_tool_call", "local_shell_call", "web_search_call", "reasoning")
RESULTS = ("function_call_output", "custom_tool_call_output")


@dataclass
class Codex(Sessions):
    """JSONL of {timestamp (ISO), type, payload}; one file is one session.

    What the model wrote between what it was sent, messages, calls and reasoning, is one request,
    whose prompt are all items before it. Where the history was compacted, prompts begin with what
    took its place, or with what users had said and the summary where the log does not have that.
    Reasoning is encrypted and in no prompt; instructions are, as far as the log has them; tools
    are not.
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
        self._session = ""
        self._said: list[tuple[str, str]] = []
        self._asked: float | None = None
        self._pending: Request | None = None  # until the answer is whole
        return with_end(json_lines(stream))

    def requests(self, record: Any) -> Iterable[Request]:
        if record is END:
            yield from self._flushed()
            return
        r = fields_of(record)
        kind, payload = r.get("type"), r.get("payload")
        if kind == "session_meta" and not self._session:  # a fork has that of its parent, too
            self._begin(fields_of(payload))
        elif kind == "compacted":
            yield from self._flushed()
            self._compact(fields_of(payload))
        elif kind == "event_msg":
            self._count(fields_of(payload))
        if kind != "response_item":
            return
        at = None if "timestamp" not in r else moment(r, "timestamp")
        role, text = _said(fields_of(payload))
        if role != "assistant":
            yield from self._flushed()
            self._asked = at
        elif self._pending is None and self._said:
            asked = at if self._asked is None else self._asked
            self._pending = self.request(self._session, self._said, text, asked)
        elif self._pending is not None and text:
            more = self.tokens_of(text)
            whole = self._pending.output_tokens + more
            self._pending = replace(self._pending, output_tokens=whole)
        if text:
            self._said.append((role, text))

    def _flushed(self) -> Iterator[Request]:
        if self._pending is not None:
            yield self._pending
            self._pending = None

    def _begin(self, about: Mapping[str, Any]) -> None:
        self._session = name_of(about, "id")
        for name in ("instructions", "base_instructions"):
            text = about.get(name)
            text = text.get("text") if isinstance(text, Mapping) else text
            if text:
                self._said.append(("system", text_of(text, name)))

    def _compact(self, payload: Mapping[str, Any]) -> None:
        """What is said before the log's own replacement, or the user's messages and the summary."""
        history = payload.get("replacement_history")
        if isinstance(history, list):
            said = [_said(fields_of(item)) for item in history]
            system = [each for each in self._said if each[0] == "system"]
            self._said = [*system, *(each for each in said if each[1])]
            return
        summary = text_of(payload.get("message") or "", "message")
        kept = [said for said in self._said if said[0] in ("system", "developer", "user")]
        self._said = [*kept, ("user", summary)] if summary else kept

    def _count(self, event: Mapping[str, Any]) -> None:
        """Tokens of the last answer, as the log counts them: reasoning, which is hidden, too."""
        info = event.get("info")
        last = info.get("last_token_usage") if isinstance(info, Mapping) else None
        if self._pending is not None and isinstance(last, Mapping) and "output_tokens" in last:
            output = length(last, "output_tokens")
            self._pending = replace(self._pending, output_tokens=output)


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
