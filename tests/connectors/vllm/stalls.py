"""What a request that waits, or is over, takes from others: nothing; and that no save is late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lmc.connectors.vllm import drain
from tests.connectors.vllm import persistent
from tests.connectors.vllm import scenarios as s

ROWS = 100  # that blending may compute in a step of this engine
LONG = [s.text(300 + i, 290) for i in range(7)]


def stalls(session: s.Session) -> dict[str, Any]:
    side = session.scheduler.connector._scheduler
    counts = persistent.counting(session)
    steps = watched(side)
    results: dict[str, Any] = {
        "over": over(session),
        "reused": blocks_reused(session, steps),
        "asleep": asleep(session),
        "backlog": backlog(session),
        "queue": queue(session),
        "rows": rows(session, steps),
    }
    pool = side.local.manager.block_pool
    results["free"] = (session.llm.reset_prefix_cache(), pool.get_num_free_blocks())
    results["blocks"] = pool.num_gpu_blocks - 1
    held = session.lmc_worker.chunks.memory._held
    results["agree"] = (set(held), set(side.index._entries))
    results["leases"] = sum(entry.leases for entry in side.index._entries.values())
    results["kept"] = side.planner._kept
    results["counts"] = dict(counts)
    return results


def watched(side: Any) -> list[Any]:
    """The metadata of every step to come."""
    steps: list[Any] = []
    step = side.step

    def kept(scheduler_output: Any) -> Any:
        steps.append(step(scheduler_output))
        return steps[-1]

    side.step = kept
    return steps


@contextmanager
def slow_copies(session: s.Session, seconds: float) -> Iterator[None]:
    """Chunks are copied out of the pages that much later."""
    copies = session.lmc_worker.copies
    stored = copies._stored

    def late(*arguments: Any) -> Any:
        time.sleep(seconds)
        return stored(*arguments)

    copies._stored = late
    try:
        yield
    finally:
        del copies._stored


def answered(session: s.Session) -> dict[str, s.Answer]:
    """As `Session.finish`, but no step more than it takes."""
    answers = {}
    while session.engine.has_unfinished_requests():
        for output in session.engine.step():
            if output.finished:
                answers[output.request_id.split("-")[0]] = s.answer_of(output)
    return answers


def over(session: s.Session) -> list[bool]:
    """Whether vLLM can reset its cache at once: behind answers, aborts, and in a pause."""
    core = session.engine.engine_core.engine_core
    done = []
    with slow_copies(session, 0.05):
        for i, steps in enumerate((0, 2, 4)):
            parts = [s.text(400 + i, 90), s.text(410 + i, 60)]
            request = session.add(parts, tokens=50 if steps else 1)
            if steps:
                for _ in range(steps):
                    session.engine.step()
                session.engine.abort_request([request])
            else:
                answered(session)
            done.append(session.llm.reset_prefix_cache())
        request = session.add([s.text(420, 90)], tokens=50)
        for _ in range(3):
            session.engine.step()
        core.pause_scheduler("abort", True)  # raises where blocks are still held
        session.engine.abort_request([request])  # of which the front end has not heard
        core.resume_scheduler()
        session.llm.reset_prefix_cache(reset_connector=True)
    drain(session.llm)
    return done


def blocks_reused(session: s.Session, steps: list[Any]) -> dict[str, Any]:
    """Prompts behind each other in a pool of a few, while what they leave is copied late."""
    steps.clear()
    with slow_copies(session, 0.02):
        for document in LONG:
            session.add([document], tokens=3)
            answered(session)
        drain(session.llm)
    waited = sum(metadata.reused for metadata in steps)
    early = sum(len(metadata.leaving) for metadata in steps)
    got = [session.fresh([document, s.QUESTION], save=False) for document in LONG]
    plain = [s.plain(session, [document, s.QUESTION]) for document in LONG]
    return {"waited": waited, "early": early, "got": got, "plain": plain}


def asleep(session: s.Session) -> dict[str, Any]:
    """An engine sleeps between the end of a request and the step that would copy its last chunk."""
    parts = [s.text(430, 100)]
    request = session.add(parts, tokens=40)
    answer = answered(session)[request]
    session.llm.collective_rpc("sleep", args=(1,))
    session.llm.reset_prefix_cache()
    pages = session.lmc_worker._pages
    generator = torch.Generator().manual_seed(1)
    for page in (*pages.k, *pages.v):  # what a GPU's pages hold when it wakes up
        page.copy_(torch.randn(page.shape, generator=generator))
    drain(session.llm)
    turn = [*parts, answer.tokens, s.text(431, 30)]
    got = session.fresh(turn, save=False, spans=False)
    return {"got": got, "plain": s.plain(session, turn)}


def backlog(session: s.Session) -> dict[str, Any]:
    """A request that waits behind the one that stores its documents, and one just behind it."""
    first = [s.SYSTEM, s.DOCUMENTS[0], s.DOCUMENTS[1], s.QUESTION]
    second = [s.SYSTEM, s.DOCUMENTS[1], s.DOCUMENTS[0], s.QUESTION]
    session.llm.reset_prefix_cache()
    seats, session.scheduler.max_num_active_reqs = session.scheduler.max_num_active_reqs, 1
    _, b = (session.add(parts, "full_reuse", tokens=4) for parts in (first, second))
    behind = session.finish()[b]
    session.scheduler.max_num_active_reqs = seats
    afterwards = session.fresh([*second[:-1], s.text(432, 20)], "full_reuse", save=False)
    # A queue for want of pages: vLLM asks for the second one at every step of the first.
    long = [s.text(436 + i, 300) for i in range(2)]
    session.llm.reset_prefix_cache()
    session.add([s.text(438, 40), *long, s.text(439, 20)], "full_reuse", tokens=120)
    other = [s.text(440, 40), *reversed(long), s.text(441, 20)]
    b = session.add(other, "full_reuse", tokens=4, save=False)
    for_pages = session.finish()[b]
    # Sent as soon as the first is answered, when its chunks are still being copied.
    with slow_copies(session, 0.01):
        third = [s.SYSTEM, s.text(433, 80), s.text(434, 90), s.QUESTION]
        session.add(third, tokens=1)
        answered(session)
        request = session.add(third, tokens=4, save=False)
        session.llm.reset_prefix_cache()
        at_once = answered(session)[request]
    drain(session.llm)
    return {
        "behind": behind, "afterwards": afterwards, "at_once": at_once, "for_pages": for_pages,
        "plain": s.plain(session, third, tokens=4),
    }  # fmt: skip


def queue(session: s.Session) -> dict[str, Any]:
    """Many requests that wait: what is kept for them in memory, and whether all are answered."""
    side = session.scheduler.connector._scheduler
    session.warm()
    session.llm.reset_prefix_cache()
    orders = [(i % 6, (i + 1 + i // 6) % 6, (i + 3) % 6) for i in range(24)]
    ids = [session.add(s.prompt(*order), "full_recompute", tokens=3) for order in orders]
    waiting = sum(entry.leases for entry in side.index._entries.values())
    most, answers = 0, {}
    while session.engine.has_unfinished_requests():
        for output in session.engine.step():
            if output.finished:
                answers[output.request_id.split("-")[0]] = s.answer_of(output)
        most = max(most, side.planner._kept)
    drain(session.llm)
    plain = {order: s.plain(session, s.prompt(*order), tokens=3) for order in set(orders[:4])}
    compared = [(answers[i], plain[o]) for i, o in zip(ids, orders, strict=True) if o in plain]
    return {"waiting": waiting, "most": most, "answers": len(answers), "compared": compared}


def rows(session: s.Session, steps: list[Any]) -> dict[str, Any]:
    """Claims in one step: how many rows of them are computed."""
    session.llm.reset_prefix_cache()
    steps.clear()
    orders = [(2, 0, 3), (5, 1, 4), (3, 2, 1)]
    blends = ["full_recompute", "all_by_deviation", "full_recompute"]
    ids = [
        session.add(s.prompt(*order), blend, save=False)
        for order, blend in zip(orders, blends, strict=True)
    ]
    answers = session.finish()
    return {
        "claims": [len(metadata.claims) for metadata in steps if metadata.claims],
        "got": [answers[i] for i in ids],
        "plain": [s.plain(session, s.prompt(*order)) for order in orders],
    }
