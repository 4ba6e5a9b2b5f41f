"""What the tests let claims do that are admitted in one step: one pass of the layers for all."""

from __future__ import annotations

from typing import Any

import torch

from tests.connectors.vllm import selective

# By prompt: rows that are known before, that deviation chooses, and that a probe does.
BLENDS: list[Any] = [
    {"name": "epic", "link_tokens": 8},
    selective.CACHEBLEND,
    selective.QUERY,
    {"name": "epic", "link_tokens": 8},
]


def one_pass(
    session: Any, prompts: list[list[list[int]]], front: list[list[int]]
) -> dict[str, Any]:
    """Claims alone, all in one step, and so that one fails or all do.

    front: begins as they all do, so that none has to wait for another to fill a block of it.
    """

    def asked(blends: list[Any]) -> list[Any]:
        session.fresh(front, enabled=False, tokens=1)
        session.together.clear()
        ids = [session.add(p, b, save=False) for p, b in zip(prompts, blends, strict=True)]
        answers = session.finish()
        return [answers[i] for i in ids]

    alone = [session.fresh(p, b, save=False) for p, b in zip(prompts, BLENDS, strict=True)]
    results: dict[str, Any] = {"alone": alone, "together": asked(BLENDS)}
    results["claims"] = list(session.together)
    # Its strategy fails behind the first layer, in the midst of the others.
    failing = [BLENDS[0], "failing", *BLENDS[2:]]
    results["one_fails"] = asked(failing)
    results["tries"] = list(session.together)
    results["plain"] = session.fresh(prompts[1], enabled=False)
    with_short_memory(session.lmc_worker._attention)
    results["none_together"] = asked(BLENDS)
    results["parted"] = list(session.together)
    del session.lmc_worker._attention.attend  # the instance's; the class's own shows again
    return results


def with_short_memory(attention: Any) -> None:
    """The device has no room for rows of more than one claim, from the last layer on."""
    attend, layers = attention.attend, list(attention.layers.values())

    def fails(layer: Any, *arguments: Any) -> Any:
        if layer is layers[-1] and len(arguments[3].parts) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return attend(layer, *arguments)

    attention.attend = fails
