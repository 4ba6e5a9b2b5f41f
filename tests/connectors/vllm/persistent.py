"""What the engine tests let an engine with a disk tier do."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.connectors.vllm.scenarios import Session

BLENDS: dict[str, Any] = {
    "prefix": "prefix",
    "full_reuse": "full_reuse",
    "epic": {"name": "epic", "link_tokens": 8},
    "cacheblend": {"name": "cacheblend", "ratio": 0.3},
    "full_recompute": "full_recompute",
}


def arms(session: Session, parts: list[list[int]]) -> dict[str, Any]:
    """Each blend on one prompt; nothing of it is stored, and host memory is left as it is found."""
    return {name: session.fresh(parts, blend, save=False) for name, blend in BLENDS.items()} | {
        "plain": session.fresh(parts, enabled=False)
    }


def from_disk(session: Session, parts: list[list[int]]) -> dict[str, Any]:
    """The same arms, each with nothing in host memory: every chunk comes from the tier behind."""
    answers = {}
    for name, blend in BLENDS.items():
        forget_memory(session)
        answers[name] = session.fresh(parts, blend, save=False)
    return answers


def forget_memory(session: Session) -> None:
    """As after a restart; in an engine in this process."""
    session.scheduler.connector._scheduler.index.clear()


def counting(session: Session, worker: bool = True) -> Counter[str]:
    """All that both sides will count; each step's counters go to vLLM's logger and are gone.

    worker: whether it is in this process.
    """
    counts: Counter[str] = Counter()
    sides = [session.scheduler.connector._scheduler, *([session.lmc_worker] if worker else [])]
    for side in sides:
        take = side.take_stats

        def taken(take: Any = take) -> Any:
            stats = take()
            counts.update(stats.data.get("counts", {}))
            return stats

        side.take_stats = taken
    return counts


def cancelled(session: Session, parts: list[list[int]]) -> dict[str, Any]:
    """A request that is given up while its chunks are on their way; another one runs."""
    side, worker = session.scheduler.connector._scheduler, session.lmc_worker
    disk = worker.chunks.tiers[0].tier
    get, begun, over = disk.get, threading.Event(), threading.Event()

    def hangs(*arguments: Any, **options: Any) -> Any:
        begun.set()
        over.wait(60)
        return get(*arguments, **options)

    disk.get = hangs
    forget_memory(session)
    session.llm.reset_prefix_cache()
    other = session.add(parts[:2], enabled=False, tokens=30)
    session.engine.step()
    waits = session.add(parts, "full_recompute", save=False)
    tracked = list(side.requests.values())[-1]
    while not begun.wait(0.01):
        session.engine.step()
    session.engine.abort_request([tracked.request.request_id], internal=True)
    over.set()
    answers = session.finish()
    disk.get = get
    for breaker in (*side.planner.directory.breakers, *worker.chunks._breakers):
        breaker.back()
    left = len(side.requests) + len(side.claims) + side.planner._kept + len(tracked.leased)
    alone = session.fresh(parts[:2], enabled=False, tokens=30)
    cancelled = {"gone": answers.get(waits), "left": left}
    return cancelled | {"beside": answers[other], "beside_alone": alone}


def slow_disk(session: Session, parts: list[list[int]]) -> dict[str, Any]:
    """A disk that hangs: what is asked of it is computed, and others go on meanwhile."""
    gone = cancelled(session, parts)
    counts = counting(session)
    side = session.scheduler.connector._scheduler
    disk = session.lmc_worker.chunks.tiers[0].tier
    get, hung, back = disk.get, [], []

    def hangs(*arguments: Any, **options: Any) -> Any:
        hung.append(time.monotonic())
        time.sleep(2.0)
        try:
            return get(*arguments, **options)
        finally:
            back.append(time.monotonic())

    disk.get = hangs
    forget_memory(session)
    results: dict[str, Any] = gone | {"alone": session.fresh(parts, "full_recompute", save=False)}
    results["rests"] = not side.planner.directory.breakers[0].closed
    results["at_rest"] = session.fresh(parts, "full_recompute", save=False)
    results["gets"] = len(hung)
    while len(back) < len(hung):  # until the threads that hung are back
        time.sleep(0.01)
    side.planner.directory.breakers[0].back()
    session.lmc_worker.chunks._breakers[0].back()
    forget_memory(session)
    session.llm.reset_prefix_cache()
    other = session.add(parts[:2], enabled=False, tokens=60)
    session.engine.step()
    waits = session.add(parts, "full_recompute", save=False)
    steps, first = 0, None
    outputs: dict[str, Any] = {}
    while session.engine.has_unfinished_requests():
        steps += 1
        for output in session.engine.step():
            request = output.request_id.split("-")[0]
            if request == waits and first is None:
                first = steps
            outputs[request] = output
    disk.get = get
    results["other"], results["waits"] = outputs[other], outputs[waits]
    return results | {"steps_before_it": first, "counts": counts}
