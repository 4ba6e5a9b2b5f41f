"""A client that asks why, in an engine that records; a scenario for `engine`."""

from __future__ import annotations

from typing import Any

from tests.connectors.vllm.scenarios import EPIC, Session, prompt


def explained(session: Session) -> dict[str, Any]:
    """Reports by what was asked for; the engine ends as vLLM ends it."""
    session.warm()
    parts = prompt(2, 0, 3)
    asked: dict[str, dict[str, Any]] = {
        "silent": {"blend": EPIC, "save": False},
        "blended": {"blend": EPIC, "explain": True, "save": False},
        "unmoved": {"blend": "prefix", "explain": True, "save": False},
        "other_salt": {"blend": EPIC, "explain": True, "save": False, "salt": "other"},
        "plain": {"enabled": False, "explain": True, "save": False},
        "bad": {"blend": "nope", "explain": True, "save": False},
    }
    results = {name: session.fresh(parts, **options).report for name, options in asked.items()}
    results["lost"] = _lost(session)
    session.llm.llm_engine.engine_core.shutdown()
    return results


def _lost(session: Session) -> dict[str, Any]:
    """A document that the worker does not have any more."""
    session.llm.reset_prefix_cache()
    request_id = session.add(prompt(1, 4), EPIC, explain=True, save=False)
    (tracked,) = session.scheduler.connector._scheduler.requests.values()
    session.lose_last(tracked)
    return session.finish()[request_id].report
