"""What the tests let engines do whose layers have windows, caps, sinks, or no rotation."""

from __future__ import annotations

from typing import Any

from tests.connectors.vllm.scenarios import DOCUMENTS, EPIC, Session, plain, prompt
from tests.connectors.vllm.selective import CACHEBLEND, QUERY


def layers(session: Session) -> dict[str, Any]:
    """Exact and moved reuse out of host memory, in pages full of noise, beside plain vLLM."""
    asked = prompt(2, 0, 1)

    def noisy(*arguments: Any, **options: Any) -> Any:
        """One request, alone, whose pages held something else before."""
        for layer in session.lmc_worker._attention.layers.values():
            layer.kv_cache.normal_(std=3.0)
        return session.fresh(*arguments, **options)

    session.warm()
    results: dict[str, Any] = {"plain": plain(session, asked)}
    for name, blend in (
        ("recompute", "full_recompute"), ("reuse", "full_reuse"), ("epic", EPIC),
        ("cacheblend", CACHEBLEND), ("query", QUERY),
        ("all_by_deviation", "all_by_deviation"), ("all_by_query", "all_by_query"),
    ):  # fmt: skip
        results[name] = noisy(asked, blend, save=False)
    session.ask(asked)
    results["exact"] = noisy(asked)
    results["turn"] = noisy([*asked, results["plain"].tokens, DOCUMENTS[4]])
    results["turn_plain"] = plain(session, [*asked, results["plain"].tokens, DOCUMENTS[4]])
    return results


def refused(session: Session) -> dict[str, Any]:
    """What a request is told in an engine that reuses nothing."""
    first, again = (session.fresh(prompt(2, 0, 1), "full_reuse") for _ in range(2))
    return {"reason": again.report["reason"], "plain": first.tokens == again.tokens}
