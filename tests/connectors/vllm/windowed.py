"""What the tests let engines do that keep windows apart: claims behind what vLLM holds, prompts of
many steps, losses, and more than there is room for."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.connectors.vllm.families import noise
from tests.connectors.vllm.persistent import counting
from tests.connectors.vllm.scenarios import (
    DOCUMENTS,
    EPIC,
    QUESTION,
    SYSTEM,
    Session,
    plain,
    prompt,
    text,
)


def local_in_front(session: Session) -> dict[str, Any]:
    """Claims behind blocks that vLLM holds itself, of which windows reach into the claim."""
    session.warm()
    head = [SYSTEM, DOCUMENTS[0]]
    asked = [*head, DOCUMENTS[3], DOCUMENTS[1], QUESTION]
    results: dict[str, Any] = {"plain": plain(session, asked)}
    for name, blend in (("recompute", "full_recompute"), ("epic", EPIC), ("exact", "prefix")):
        noise(session)
        session.fresh(head, tokens=1, save=False)
        results[name] = session.ask(asked, blend, save=False)
        noise(session)
        results[f"{name}_alone"] = session.fresh(asked, blend, save=False)
    free = session.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return results | {"free": free}


def long_prompts(session: Session) -> dict[str, Any]:
    """Prompts of many steps: chunks that a window leaves behind before they are whole."""
    parts = [SYSTEM, *(text(200 + i, 90) for i in range(6)), QUESTION]
    counts = counting(session)
    stored = session.ask(parts, tokens=60)
    noise(session)
    again = session.fresh(parts)
    turn = [*parts, stored.tokens, text(300, 20)]
    return {
        "plain": plain(session, parts),
        "again": again,
        "turn": session.fresh(turn),
        "turn_plain": plain(session, turn),
        "counts": counts,
        "free": session.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
    }


def losses(session: Session) -> dict[str, Any]:
    """Chunks that are not there when they are loaded, one of them or all."""
    session.warm()
    asked = prompt(2, 0, 1)
    results: dict[str, Any] = {"plain": plain(session, asked)}
    session.ask(asked)
    for name, lost in (("one", 1), ("all", 100)):
        session.llm.reset_prefix_cache()
        noise(session)
        request_id = session.add(asked)
        tracked = next(iter(session.scheduler.connector._scheduler.requests.values()))
        for found in tracked.plan.found[-lost:]:
            session.lmc_worker.chunks.memory.release(found.record.slot)
        results[name] = session.finish()[request_id]
        session.ask(asked)
    # All of a claim, although what its rows see has not room at once.
    session.llm.reset_prefix_cache()
    noise(session)
    worker = session.lmc_worker
    worker.serving._place, kept = fails, worker.serving._place
    for name, pages in (("whole", worker.serving.scratch.pages), ("in_parts", 7)):
        session.llm.reset_prefix_cache()
        noise(session)
        worker.serving.scratch.pages = pages
        results[name] = session.ask(asked, save=False)
    # Of two claims of one step neither has pages that the other needs.
    noise(session)
    worker.serving.scratch.pages = 8
    both = [session.add(parts, save=False) for parts in (prompt(2), asked)]
    answers = session.finish()
    worker.serving._place = kept
    results |= {"together_plain": plain(session, prompt(2)), "together": answers[both[0]]}
    return results | {"beside": answers[both[1]]}


def small_pool(session: Session) -> dict[str, Any]:
    """No more pages than the longest prompt takes: what lmc keeps of them must not be missed."""
    local, moved, long = text(500, 512), text(501, 105), text(502, 620)
    results: dict[str, Any] = {}
    for name, parts in (("long", [long]), ("claim", [local, moved, text(503, 60)])):
        results[f"{name}_plain"] = plain(session, parts)
    results["long"] = session.fresh([long])
    session.fresh([SYSTEM, moved], tokens=1)
    session.fresh([local], tokens=1)
    results["claim"] = session.ask([local, moved, text(503, 60)], "full_recompute")
    held = session.scheduler.connector._scheduler.index
    before = len(held)
    session.ask([local, moved], tokens=1)  # vLLM has its windows no more
    results["evicted"] = before - len(held)
    pool = session.scheduler.kv_cache_manager.block_pool
    return results | {"lost": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()}


def churn(session: Session, rounds: int) -> dict[str, Any]:
    """Many at once, more than there are pages for, all of them exact; what was wrong of them."""
    rng = np.random.default_rng(0)
    counts = counting(session)
    answers: dict[tuple[int, ...], Any] = {}
    wrong: list[str] = []
    preempted = 0
    for number in range(rounds):
        if number % 3 == 0:
            noise(session)
        asked: dict[str, tuple[int, ...]] = {}
        for _ in range(int(rng.integers(2, 7))):
            order = tuple(rng.permutation(5)[: rng.integers(1, 5)].tolist())
            blend = ("prefix", "full_recompute")[int(rng.integers(2))]
            asked[session.add(prompt(*order), blend, tokens=40)] = order
        requests = dict(session.scheduler.requests)
        for request_id, answer in session.finish().items():
            order = asked[request_id]
            if order not in answers:
                answers[order] = plain(session, prompt(*order), tokens=40)
            if not same(answer, answers[order]):
                wrong.append(f"round {number}: {order} {answer.kinds}")
        preempted += sum(request.num_preemptions for request in requests.values())
    pool = session.scheduler.kv_cache_manager.block_pool
    return {
        "wrong": wrong, "preempted": preempted, "counts": dict(counts),
        "lost": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
    }  # fmt: skip


def windows(session: Session, rounds: int) -> dict[str, Any]:
    """All of it, in one engine."""
    return {
        "local": local_in_front(session),
        "long": long_prompts(session),
        "losses": losses(session),
        "churn": churn(session, rounds),
    }


def far_back(session: Session) -> dict[str, Any]:
    """8,192 tokens that are exact, and moved with no row computed: bytes loaded of each."""
    documents, head = [text(400 + i, 1364) for i in range(6)], text(399, 8)
    counts = counting(session)
    results: dict[str, Any] = {}
    for name, order in (("exact", (0, 1, 2, 3, 4, 5)), ("moved", (0, 3, 2, 5, 1, 4))):
        asked = [head, *(documents[i] for i in order)]
        if name == "exact":
            results["plain"] = session.ask(asked)
        noise(session)
        before = counts["bytes_loaded:host"]
        results[name] = session.ask(asked, "full_reuse", save=False)
        results[f"{name}_bytes"] = counts["bytes_loaded:host"] - before
    return results | {"bytes_per_token": session.lmc_worker.layout.bytes_per_token}


def same(one: Any, other: Any) -> bool:
    near = bool(np.abs(one.logprobs - other.logprobs).max() < 1e-4)
    return one.tokens == other.tokens and near


def fails(*_: Any) -> Any:
    raise RuntimeError("nothing can be loaded")
