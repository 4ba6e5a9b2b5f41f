"""What the tests let engines do whose layers have windows, caps, sinks, or no rotation."""

from __future__ import annotations

from typing import Any

from tests.connectors.vllm.across import across
from tests.connectors.vllm.scenarios import DOCUMENTS, EPIC, SYSTEM, Session, plain, prompt
from tests.connectors.vllm.selective import CACHEBLEND, QUERY


def layers(session: Session, beside: bool = True) -> dict[str, Any]:
    """Exact and moved reuse out of host memory, in pages full of noise, beside plain vLLM; and the
    same selections on Hugging Face, if wanted."""
    asked = prompt(2, 0, 1)

    def noisy(*arguments: Any, **options: Any) -> Any:
        """One request, alone, whose pages held something else before."""
        noise(session)
        return session.fresh(*arguments, **options)

    session.warm()
    results: dict[str, Any] = {"plain": plain(session, asked)}
    for name, blend in (
        ("recompute", "full_recompute"), ("reuse", "full_reuse"), ("epic", EPIC),
        ("cacheblend", CACHEBLEND), ("query", QUERY),
        ("all_by_deviation", "all_by_deviation"), ("all_by_query", "all_by_query"),
    ):  # fmt: skip
        results[name] = noisy(asked, blend, save=False)
    if beside:
        some = ("full_reuse", "cacheblend", "query")
        results["across"] = across(session, SYSTEM, DOCUMENTS, asked, some)
    session.fresh(asked)
    results["exact"] = noisy(asked)
    results["turn"] = noisy([*asked, results["plain"].tokens, DOCUMENTS[4]])
    results["turn_plain"] = plain(session, [*asked, results["plain"].tokens, DOCUMENTS[4]])
    return results


def rounded(session: Session) -> dict[str, Any]:
    """In a dtype that rounds much: how far answers lie apart, first that of the same KV computed in
    other batches by vLLM alone."""
    asked = prompt(2, 0, 1)
    session.warm()
    results = {"plain": plain(session, asked)}
    session.llm.reset_prefix_cache()
    session.ask(asked[:2], enabled=False)
    results["plain_in_two"] = session.ask(asked, enabled=False)
    for name, blend in (("recompute", "full_recompute"), ("reuse", "full_reuse"), ("epic", EPIC)):
        noise(session)
        results[name] = session.fresh(asked, blend, save=False)
    session.fresh(asked)
    noise(session)
    results["exact"] = session.fresh(asked)
    return results


def noise(session: Session) -> None:
    """Fill all pages, and what windows are put in, while nothing of them is in use."""
    worker = session.lmc_worker
    session.llm.reset_prefix_cache()
    for layer in worker._attention.layers.values():
        layer.kv_cache.normal_(std=3.0)
    if worker.serving.scratch is not None:
        worker.serving.scratch.place.cache.normal_(std=3.0)
