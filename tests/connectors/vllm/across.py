"""One prompt in two engines, and strategies at the quality gate; part of `scenarios`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from lmc.blend import STRATEGIES
from lmc.connectors.hf import HFModel, HFStore, run_blend

STRATEGIES_ACROSS = {
    "full_reuse": {"name": "full_reuse"},
    "epic": {"name": "epic", "link_tokens": 8},
    "cacheblend": {"name": "cacheblend", "ratio": 0.2},
    "query": {"name": "query", "ratio": 0.1},
    "lmc": {"name": "lmc", "compute": 0.4},
}
GATED = {
    "known": {"name": "epic", "link_tokens": 16},
    "below": {"name": "epic", "link_tokens": 4},
    "unknown": {"name": "cacheblend", "ratio": 0.2},
    "auto": {"name": "auto", "strategy": "epic", "min_recovery": 0.54},
    "out_of_reach": {"name": "auto", "strategy": "epic", "min_recovery": 0.9},
    "control": {"name": "full_recompute"},
    "prefix": {"name": "prefix"},
}


def gated(session: Any, parts: list[list[int]]) -> dict[str, Any]:
    """What becomes of a reordered prompt under each of them."""
    return {name: session.fresh(parts, blend, save=False) for name, blend in GATED.items()}


def across(
    session: Any,
    system: list[int],
    documents: list[list[int]],
    parts: list[list[int]],
    names: Sequence[str] = tuple(STRATEGIES_ACROSS),
) -> dict[str, Any]:
    """By strategy: vLLM's answer to a replayed selection, and Hugging Face's own log-probabilities.

    The documents are stored by both behind the system prompt, and the selection is made by the
    Hugging Face connector.
    """
    model = HFModel(AutoModelForCausalLM.from_pretrained(session.llm.model_config.model).eval())
    store = HFStore(model)
    store.add_chunks("anchored", system, documents)
    tokens = [token for part in parts for token in part]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    spans = list(zip([0, *ends[:-2]], ends[:-1], strict=True))
    results = {}
    for name in names:
        strategy = STRATEGIES.build(STRATEGIES_ACROSS[name])
        chosen = run_blend(store, tokens, spans, strategy)
        replay = {"name": "replay", "by_layer": chosen.selection}
        served = session.fresh(parts, replay, save=False)
        forced = run_blend(store, tokens, spans, strategy, answers=(served.tokens,))
        logprobs = forced.logits[0].double().log_softmax(-1).numpy()
        results[name] = {
            "vllm": served.logprobs,
            "hf": logprobs[np.arange(len(served.tokens)), served.tokens],
            "tokens": (served.tokens, logprobs.argmax(-1).tolist()),
            "selected": len(chosen.selection[-1]),
            "kinds": (served.kinds, chosen.plan.kinds()),
        }
    return results
