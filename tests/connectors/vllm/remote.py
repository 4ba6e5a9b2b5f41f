"""What the tests let engines do that share a server."""

from __future__ import annotations

from typing import Any

from tests.connectors.vllm.families import noise
from tests.connectors.vllm.persistent import counting
from tests.connectors.vllm.scenarios import DOCUMENTS, EPIC, QUESTION, Session, plain, prompt

BLENDED, EXACT = "blended-1", "exactly-1"  # names of prompts that are handed over


def stores(session: Session) -> dict[str, Any]:
    """Documents, by the first engine; and two prompts that it hands over, with their answers."""
    session.warm()
    counts = counting(session)
    parts = prompt(2, 0, 1)
    results: dict[str, Any] = {
        "blended": session.fresh(parts, EPIC, save=False, hand_over=BLENDED),
        "exact": session.fresh(parts, save=False, hand_over=EXACT),
    }
    session.llm.collective_rpc("finish_saves")
    plain(session, parts)  # what is counted is told a step later
    return results | {"counts": dict(counts)}


def is_handed(session: Session) -> dict[str, Any]:
    """What the second engine makes of these prompts, in pages full of noise."""
    parts = prompt(2, 0, 1)
    results: dict[str, Any] = {"plain": plain(session, parts)}
    noise(session)
    results["blended"] = session.fresh(parts, None, spans=False, handed=BLENDED)
    # What vLLM holds of it now is no exact prefix.
    results["not_asked_for"] = session.ask(parts, save=False)
    # And what it holds of it exactly is not what was handed over; what was, it holds then.
    session.fresh(parts, save=False)
    for name in ("again", "held"):
        results[name] = session.ask(parts, None, spans=False, handed=BLENDED)
    session.llm.reset_prefix_cache()
    noise(session)
    results["exact"] = session.fresh(parts, None, spans=False, handed=EXACT)
    for name, said in (
        ("unknown", {"handed": "nobody-1"}), ("other_tenant", {"handed": BLENDED, "salt": "other"}),
    ):  # fmt: skip
        session.scheduler.connector._scheduler.index.clear()
        results[name] = session.fresh(parts, None, spans=False, **said)
    return results


def shares(session: Session, servers: Any) -> dict[str, Any]:
    """What the second engine finds of them, while the server is there and when it is not.

    Args:
        servers: the pid of the server.
    """
    import os
    import signal

    parts = prompt(2, 0, 3)
    counts = counting(session)
    results: dict[str, Any] = {"plain": plain(session, parts)}
    for name, blend in (("recompute", "full_recompute"), ("epic", EPIC), ("exact", "prefix")):
        session.scheduler.connector._scheduler.index.clear()
        results[name] = session.fresh(parts, blend, save=False)
    session.scheduler.connector._scheduler.index.clear()
    others = [DOCUMENTS[4], DOCUMENTS[5], QUESTION]  # that no answer is known of yet
    results["held_plain"] = plain(session, others)
    os.kill(servers, signal.SIGSTOP)
    results["held"] = session.fresh(others, EPIC, save=False)
    os.kill(servers, signal.SIGCONT)
    return results | {"counts": dict(counts)}
