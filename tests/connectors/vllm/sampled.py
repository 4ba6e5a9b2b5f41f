"""Ways to sample, each of a prompt that is computed in several steps, and again in one."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import StructuredOutputsParams

from tests.connectors.vllm import scenarios as s

SEEDED = {"temperature": 1.0, "seed": 11}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {}, "greedy_seed": {"seed": 3}, "seeded": SEEDED, "min_p": SEEDED | {"min_p": 0.02},
    "top": SEEDED | {"top_k": 20, "top_p": 0.9},
    "wide_seed": SEEDED | {"seed": 2**63 - 1}, "several": SEEDED | {"n": 3},
    "penalties": SEEDED | {
        "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3,
    },
    "bias": SEEDED | {"logit_bias": {5: 4.0, 9: -100.0}},
    "allowed": SEEDED | {"allowed_token_ids": [4, 5, 6, 7]}, "logprobs": SEEDED | {"logprobs": 5},
    "prompt_logprobs": SEEDED | {"prompt_logprobs": 2},
    "min_tokens": SEEDED | {"min_tokens": 4, "ignore_eos": False},
    "structured": SEEDED | {"structured_outputs": StructuredOutputsParams(regex="[ab]{12}")},
}  # fmt: skip


def in_steps(session: s.Session) -> dict[str, Any]:
    """By way to sample: answers with nothing cached, where vLLM has all, alone and all at once."""
    parts = [s.text(60, 300)]
    asked: dict[str, Any] = {"enabled": False, "tokens": 8}
    results: dict[str, Any] = {}
    for name, way in WAYS.items():
        first = session.fresh(parts, sampling=way, **asked)
        results[name] = {"steps": first, "one": session.ask(parts, sampling=way, **asked)}
    session.llm.reset_prefix_cache()
    # Of different beginnings, so that rows join, wait, and leave while others are cut.
    texts = {name: [s.text(61 + i, 150 + 11 * i)] for i, name in enumerate(WAYS)}
    ids = {n: session.add(texts[n], sampling=way, **asked) for n, way in WAYS.items()}
    together = session.finish()
    for name, way in WAYS.items():
        results[name]["together"] = together[ids[name]]
        results[name]["alone"] = session.ask(texts[name], sampling=way, **asked)
    return results
