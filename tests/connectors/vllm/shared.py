"""Scenarios that one engine goes through, one after the other."""

from __future__ import annotations

from typing import Any

from lmc.connectors.vllm.taint import ChainMap
from tests.connectors.vllm.scenarios import (
    DOCUMENTS,
    QUESTION,
    SYSTEM,
    Session,
    adapter,
    bad_requests,
    in_one_pass,
    next_turn,
    plain,
    poison,
    poison_untainted,
    preempted,
    reuse,
    text,
    together,
)


def replanned(session: Session) -> dict[str, Any]:
    """A request of which vLLM holds blended blocks loses a chunk behind them before its turn."""
    session.warm()
    short = text(60, 30)
    session.ask([SYSTEM, short], tokens=1)
    before = [SYSTEM, DOCUMENTS[2], short, DOCUMENTS[0]]
    asked = [*before, DOCUMENTS[3], QUESTION]
    session.fresh([*before, QUESTION], "full_reuse", save=False)
    side = session.scheduler.connector._scheduler
    side.local.chains = ChainMap()  # as if the first one still ran
    request_id = session.add(asked, "full_reuse")
    (tracked,) = side.requests.values()
    lost = [s.record.slot for s in tracked.plan.found if s.start >= 210]
    for slot in lost:
        side.index.drop(slot)
    results: dict[str, Any] = {"first": session.finish()[request_id], "lost": len(lost)}
    return results | {"again": session.fresh(asked), "plain": plain(session, asked)}


SHARED = (
    reuse,
    replanned,
    poison,
    together,
    next_turn,
    bad_requests,
    in_one_pass,
    preempted,
    adapter,
    poison_untainted,
)


def in_one_engine(session: Session) -> dict[str, Any]:
    """All of `SHARED`, each on an engine that has forgotten what it was told before."""
    results = {}
    for scenario in SHARED:
        results[scenario.__name__] = scenario(session)
        session.llm.reset_prefix_cache()
        session.scheduler.connector._scheduler.reset()
    return results
