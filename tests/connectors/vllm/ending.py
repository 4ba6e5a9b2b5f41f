"""What the tests let steps do that are for claims alone: rows go on to the end of the prompt."""

from __future__ import annotations

from typing import Any

import torch

from tests.connectors.vllm import one_pass, persistent, selective
from tests.connectors.vllm import scenarios as s

REST = "rows_computed_to_the_end"
MORE = s.text(16, 45)


def to_the_end(session: s.Session) -> dict[str, Any]:
    """By case, answers and rows that went to the end: as it comes, and where none may."""
    session.warm()
    counts = persistent.counting(session)
    serving = session.lmc_worker.serving
    parts = s.prompt(2, 0, 3)
    results: dict[str, Any] = {"plain": s.plain(session, parts)}

    def both(ask: Any) -> list[tuple[Any, int]]:
        pair = []
        for ends in ({}, None):
            serving.ends, before = ends, counts[REST]
            session.llm.reset_prefix_cache()
            pair.append((ask(), counts[REST] - before))
        serving.ends = {}
        return pair

    def asked(blend: Any, parts: Any = parts, **options: Any) -> Any:
        return both(lambda: session.ask(parts, blend, save=False, **options))

    for blend in one_pass.BLENDS[:3]:
        results[blend["name"]] = asked(blend)
    results["full_recompute"] = asked("full_recompute")
    results["prefix"] = asked("prefix")
    results["failing"] = asked("failing")
    results["taken_back"] = asked(selective.NONE)
    results["long"] = asked(s.EPIC, [*s.prompt(2, 0, 3), s.text(15, 160)])
    results["one_token"] = asked(s.EPIC, [*s.prompt(2, 0)[:-1], [77]])
    results["sampled"] = asked(s.EPIC, sampling={"temperature": 1.0, "seed": 7})

    def several(*others: Any) -> Any:
        asked = [(parts, s.EPIC), *others]
        ids = [session.add(*one, save=False) for one in asked]
        answers = session.finish()
        return [answers[i] for i in ids]

    # `front` is in vLLM's cache, so that neither waits for the other to fill a block of it.
    def in_a_step(*others: Any) -> Any:
        session.ask([s.SYSTEM, s.text(12, 20)], None, enabled=False, tokens=1)
        return several(*others)

    results["two_claims"] = both(lambda: in_a_step((s.prompt(5, 1), s.EPIC)))
    results["beside_plain"] = both(lambda: in_a_step(([s.text(40, 50)], "prefix")))

    own = session.lmc_worker._decoder.end

    def fails(state: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    session.lmc_worker._decoder.end = fails
    results["no_memory"] = asked(s.EPIC)
    session.lmc_worker._decoder.end = own
    # What vLLM's cache has of rows behind the claim serves the next turn.
    results["next_turn"] = both(
        lambda: [session.ask(p, s.EPIC, save=False) for p in (parts, [*parts, MORE])]
    )
    request_id = session.add(parts, "full_recompute", save=False)
    (tracked,) = session.scheduler.connector._scheduler.requests.values()
    session.lose_last(tracked)
    before = counts[REST]
    results["lost"] = session.finish()[request_id], counts[REST] - before
    return results


def beside_another(session: s.Session) -> dict[str, Any]:
    """How often another connector is asked about a layer, in a step that is for a claim alone."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from lmc.connectors.vllm import LMCConnector

    both = get_kv_transfer_group()._connectors
    ours = next(one for one in both if isinstance(one, LMCConnector))
    other = next(one for one in both if one is not ours)
    calls = {"save_kv_layer": 0, "wait_for_layer_load": 0}

    def counted(name: str) -> None:
        own = getattr(other, name)

        def asked(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return own(*arguments, **named)

        setattr(other, name, asked)

    for document in s.DOCUMENTS[:4]:
        session.ask([s.SYSTEM, document], None, tokens=1)
    ours._worker.finish_saves()
    for name in calls:
        counted(name)
    session.llm.reset_prefix_cache()
    got = session.ask(s.prompt(2, 0, 3), s.EPIC, tokens=1)
    layers = session.llm.llm_engine.vllm_config.model_config.hf_config.num_hidden_layers
    sides = session.scheduler.connector._connectors
    side = next(one._scheduler for one in sides if isinstance(one, LMCConnector))
    return {"got": got, "calls": calls, "layers": layers, "known": len(side.requests)}
