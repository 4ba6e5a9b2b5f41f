"""An engine with a disk tier that is paused, put to sleep and reset while it stores."""

from __future__ import annotations

import time
from typing import Any

from lmc.connectors.vllm.worker_cls import LMCWorker, _side
from tests.connectors.vllm import scenarios as s

BEFORE = [s.SYSTEM, s.DOCUMENTS[0], s.text(591, 20)]  # stored long before
OTHER = [s.text(590, 250)]


class SlowWorker(LMCWorker):
    """Copies chunks out of pages as slowly as it is told to."""

    def slow(self, seconds: float) -> None:
        copies = _side().copies
        vars(copies).pop("_stored", None)
        stored = copies._stored

        def slowly(*arguments: Any) -> Any:
            time.sleep(seconds)
            return stored(*arguments)

        if seconds:
            copies._stored = slowly

    def finished_before_discard(self) -> bool:
        """Whether copies out of pages are over before vLLM lets go of them."""
        copies, over = _side().copies, []
        finish = copies.finish

        def noticed() -> None:
            finish()
            over.append(True)

        copies.finish = noticed
        try:
            self.discard(("kv_cache",))
        except RuntimeError:  # there is no such thing on a CPU
            return bool(over)
        finally:
            del copies.finish
        return bool(over)


def asleep(session: s.Session) -> dict[str, Any]:
    """What each does to a running request and its saves, and what is found on disk afterwards."""
    llm, core = session.llm, session.engine.engine_core

    def paused(mode: str, clear: bool) -> Any:
        def pause() -> None:
            core.call_utility("pause_scheduler", mode, clear)

        return pause, lambda: core.call_utility("resume_scheduler")

    ways: dict[str, Any] = {
        "pause, abort": paused("abort", True),
        "pause, wait": paused("wait", True),
        "pause, keep": paused("keep", False),
        "pause, keep, clear": paused("keep", True),
        "sleep, abort": (lambda: llm.sleep(1), llm.wake_up),
        "sleep, keep": (lambda: llm.sleep(1, "keep"), llm.wake_up),
        "reset": (lambda: core.reset_prefix_cache(True, True), lambda: None),
    }
    session.ask(BEFORE, "prefix", tokens=1)
    results = {name: _met(session, i, *way) for i, (name, way) in enumerate(ways.items())}
    return {
        "ways": results,
        "plain_before": s.plain(session, BEFORE),
        "plain_other": s.plain(session, OTHER, tokens=4),
        "discard": llm.collective_rpc("finished_before_discard"),
    }


def _met(session: s.Session, i: int, pause: Any, resume: Any) -> dict[str, Any]:
    parts = [s.SYSTEM, s.text(500 + i, 70), s.text(530 + i, 70), s.QUESTION]
    session.llm.reset_prefix_cache()
    session.llm.collective_rpc("slow", args=(0.02,))
    request = session.add(parts, "prefix")
    outputs: dict[str, Any] = {}

    def stepped() -> None:
        for output in session.engine.step():
            outputs[output.request_id.split("-")[0]] = output

    while len(outputs[request].outputs[0].token_ids if request in outputs else ()) < 4:
        stepped()
    pause()
    resume()
    # Its pages are others' at once.
    other = session.add(OTHER, enabled=False, tokens=4)
    while session.engine.has_unfinished_requests():
        stepped()
    session.llm.collective_rpc("slow", args=(0,))
    session.llm.collective_rpc("finish_saves")
    return {
        "tokens": list(outputs[request].outputs[0].token_ids),
        "reason": outputs[request].outputs[0].finish_reason,
        "other": list(outputs[other].outputs[0].token_ids),
        "found_before": _from_disk(session, BEFORE, "prefix"),
        "found": _from_disk(session, parts, "prefix"),
        "plain": _from_disk(session, parts, enabled=False),
    }


def _from_disk(session: s.Session, *arguments: Any, **options: Any) -> s.Answer:
    """One request that stores nothing, alone, with nothing in memory."""
    session.llm.reset_prefix_cache(reset_connector=True)
    session.add(*arguments, save=False, **options)
    while session.engine.has_unfinished_requests():
        for output in session.engine.step():
            if output.finished:
                answer = s.answer_of(output)
    return answer
