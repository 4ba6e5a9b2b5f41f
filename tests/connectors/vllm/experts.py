"""An engine of experts that believes to be one of two data-parallel ranks."""

from __future__ import annotations

import copy
from typing import Any

import lmc.connectors.vllm.adapter as adapter
import lmc.connectors.vllm.checks as checks
from tests.connectors.vllm import scenarios as s
from tests.connectors.vllm.trust import replaced, started


def beside_others(session: s.Session) -> dict[str, Any]:
    """What is served alone, and then where a forward of ours would wait for another rank."""
    worker, side = session.lmc_worker, session.scheduler.connector._scheduler
    model, config = worker._decoder.model, worker.vllm_config
    parts = s.prompt(2, 0)
    session.warm()
    results: dict[str, Any] = {
        "plain": s.plain(session, parts),
        "alone": session.fresh(parts, s.EPIC, save=False),
    }
    forwards: list[Any] = []

    def waits(*arguments: Any, **options: Any) -> Any:
        forwards.append(options)
        raise AssertionError("it would never return")

    worker.vllm_config = copy.copy(config)
    worker.vllm_config.parallel_config = copy.copy(config.parallel_config)
    worker.vllm_config.parallel_config.data_parallel_size = 2
    with (
        replaced(vars(adapter), "set_forward_context", waits),
        replaced(vars(checks), "set_forward_context", waits),
    ):
        started(worker, side, model)
        results["refusal"] = (worker.refusal, worker.kv_refusal, worker.hello().computes)
        results["beside"] = session.fresh(parts, s.EPIC, save=False)
        # One that is lost is vLLM's to compute.
        session.llm.reset_prefix_cache()
        request = session.add(parts, s.EPIC, save=False)
        tracked = next(iter(side.requests.values()))
        session.lose_last(tracked)
        results["lost"] = session.finish()[request]
        results["stored"] = session.fresh([*parts, s.text(50, 20)], "prefix", tokens=1)
        results["pending"] = side.isolation.pending
    return results | {"forwards": len(forwards)}
