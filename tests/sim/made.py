"""Small synthetic traces, and what is told of a trace."""

from __future__ import annotations

from typing import Any

from lmc.sim.synthetic import GENERATORS
from lmc.sim.trace import Request

SMALL: dict[str, dict[str, Any]] = {
    "agents": {"sessions": 6, "system_tokens": 50, "file_tokens": 40, "files": 5},
    "chat": {"sessions": 8, "system_tokens": 50, "user_tokens": 20, "output_tokens": 20},
    "clock": {"count": 20, "template_tokens": 60, "period": 15.0, "question_tokens": 20},
    "rag": {"count": 20, "documents": 12, "document_tokens": 30, "documents_per_prompt": 3},
    "relay": {"tasks": 5, "role_tokens": 40, "brief_tokens": 40, "report_tokens": 30},
    "skills": {"count": 20, "skills": 9, "skill_tokens": 40, "system_tokens": 50},
    "tools": {"sessions": 6, "tool_tokens": 30, "tools": 9, "tools_per_session": 4},
}


def small(name: str, **fields: Any) -> list[Request]:
    return list(GENERATORS.build({"name": name, **SMALL[name], **fields}).requests())


def facts(requests: list[Request]) -> list[tuple[Any, ...]]:
    return [
        (r.timestamp, r.session, r.output_tokens, r.tokens.tolist(), list(r.segments))
        for r in requests
        if r.tokens is not None
    ]


def parts(r: Request) -> list[tuple[str, tuple[int, ...]]]:
    assert r.tokens is not None
    return [(name, tuple(r.tokens[a:b].tolist())) for name, a, b in r.segments]


def of_sessions(requests: list[Request]) -> dict[str, list[Request]]:
    found: dict[str, list[Request]] = {}
    for r in requests:
        found.setdefault(r.session, []).append(r)
    return found
