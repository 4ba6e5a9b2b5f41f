"""What the tests let an engine do that drafts tokens out of the text (`method: ngram`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.connectors.vllm import scenarios as s

TOKENS = 90  # of an answer; a small random model soon repeats itself, so that drafts are accepted


def drafted(session: s.Session) -> dict[str, Any]:
    """Reuse beside drafts, each answer beside that of vLLM alone with the same drafts."""
    steps = watched(session)
    session.warm()
    parts = s.prompt(2, 0, 3)
    asked = {"save": False, "tokens": TOKENS}
    results: dict[str, Any] = {"plain": s.plain(session, parts, tokens=TOKENS)}
    for blend in ("prefix", "full_recompute", "full_reuse"):
        results[blend] = session.fresh(parts, blend, **asked)
    results["epic"] = session.fresh(parts, s.EPIC, **asked)
    requests = {"epic": (parts, s.EPIC), "prefix": (s.prompt(0, 1), "prefix")}
    results["prefix_alone"] = session.fresh(s.prompt(0, 1), "prefix", **asked)
    session.llm.reset_prefix_cache()
    ids = {name: session.add(*request, **asked) for name, request in requests.items()}
    answers = session.finish()
    results["together"] = {name: answers[i] for name, i in ids.items()}
    results["stored"] = stored(session, parts)
    return results | {"steps": steps}


def watched(session: s.Session) -> list[tuple[int, int]]:
    """All that will be drafted in a step and accepted of it."""
    scheduler, steps = session.scheduler, []
    make = scheduler.make_spec_decoding_stats

    def made(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, **rest: Any) -> Any:
        steps.append((num_draft_tokens, num_accepted_tokens))
        return make(stats, num_draft_tokens, num_accepted_tokens, **rest)

    scheduler.make_spec_decoding_stats = made
    return steps


def stored(session: s.Session, parts: list[list[int]]) -> list[dict[str, Any]]:
    """What answers of many lengths leave behind, which end in the midst of drafts."""
    side = session.scheduler.connector._scheduler
    turns = []
    for tokens in range(TOKENS - 4, TOKENS):
        salt = f"stored {tokens}"
        first = session.fresh(parts, "prefix", tokens=tokens, salt=salt)
        ids = [i for part in parts for i in part] + first.tokens
        turn = [*parts, first.tokens, s.text(13, 25)]
        again = session.fresh(turn, "prefix", save=False, salt=salt)
        records = [
            e.record
            for e in side.index._entries.values()
            if e.record.namespace.endswith(salt.encode())
        ]
        turns.append({
            "turn": again, "plain": s.plain(session, turn), "said": len(ids),
            "kept": [np.frombuffer(r.tokens, "<i8").tolist() for r in records], "ids": ids,
        })  # fmt: skip
    return turns
