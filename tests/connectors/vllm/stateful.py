"""What the tests let engines do whose layers keep a state in place of keys."""

from __future__ import annotations

from typing import Any

import torch

from lmc.connectors.vllm import drain
from tests.connectors.vllm.scenarios import Answer, Session, plain, text

HEAD, LEFT, RIGHT, END = text(200, 300), text(201, 200), text(202, 200), text(203, 40)
ASKED, SWAPPED = [HEAD, LEFT, RIGHT, END], [HEAD, RIGHT, LEFT, END]


def noise(session: Session) -> None:
    """Fill all pages, while nothing of them is in use."""
    session.llm.reset_prefix_cache()
    worker = session.lmc_worker
    for pages in (worker._pages, *worker.serving.states.groups):
        for page in pages.k:
            page.copy_(torch.randn(page.shape) * 3)


def fresh(session: Session, *arguments: Any, **options: Any) -> Answer:
    """One request, alone, whose pages held something else before."""
    noise(session)
    return session.ask(*arguments, **options)


def reuse(session: Session) -> dict[str, Any]:
    """Out of host memory: a prompt again, its next turn, its documents in another order, and all of
    them at once with others."""
    results: dict[str, Any] = {
        "block": session.scheduler.block_size,
        "plain": plain(session, ASKED, tokens=300),
        "plain_swapped": plain(session, SWAPPED),
    }
    answered = results["plain"].tokens
    turn = [*ASKED, answered, text(204, 30)]
    results["plain_turn"] = plain(session, turn)
    session.fresh(ASKED, save=False, tokens=300)
    results["local_turn"] = session.ask(turn, save=False)  # out of vLLM's own cache
    results["first"] = fresh(session, ASKED, tokens=300)
    results["again"] = fresh(session, ASKED, tokens=300)
    results["turn"] = fresh(session, turn)
    results["swapped"] = fresh(session, SWAPPED, "full_reuse")
    results["salted"] = fresh(session, ASKED, salt="another")
    noise(session)
    prompts = {"again": (ASKED, 300), "turn": (turn, 12), "new": ([text(205, 350), END], 12)}
    ids = {name: session.add(parts, tokens=n) for name, (parts, n) in prompts.items()}
    answers = session.finish()
    results["together"] = {name: answers[i] for name, i in ids.items()}
    results["local"] = session.ask(ASKED)
    return results


def lost(session: Session) -> dict[str, Any]:
    """A state, or rows, that memory has lost although the index says that they are there; weights
    that change between."""
    results: dict[str, Any] = {"plain": plain(session, ASKED)}
    for what in ("state", "rows"):
        session.fresh(ASKED)
        session.llm.reset_prefix_cache()
        noise(session)
        request_id = session.add(ASKED)
        tracked = next(iter(session.scheduler.connector._scheduler.requests.values()))
        plan = tracked.plan
        slot = (plan.states[1] if what == "state" else plan.found[0]).record.slot
        session.lmc_worker.chunks.memory.release(slot)
        results[what] = session.finish()[request_id]
        results[f"{what} again"] = fresh(session, ASKED)
    session.fresh(ASKED)
    noise(session)
    states = session.lmc_worker.serving.states
    states.write, write = failing, states.write
    results["failing"] = session.ask(ASKED)
    states.write = write
    results["failing again"] = fresh(session, ASKED)
    return results


def failing(*arguments: Any) -> None:
    """What a device without memory does."""
    raise RuntimeError("no memory for states")


def left(session: Session, prompts: int) -> list[Answer]:
    """Requests whose keys and states go to tiers."""
    answers = [session.fresh([text(210 + i, 700), END]) for i in range(prompts)]
    drain(session.llm)
    return answers


def found(session: Session, prompts: int) -> list[Answer]:
    """The same, of an engine that starts with what the tiers have."""
    return [fresh(session, [text(210 + i, 700), END]) for i in range(prompts)]
