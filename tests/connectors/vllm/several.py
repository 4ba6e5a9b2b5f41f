"""Several answers to one prompt (`n`): vLLM makes a request of each."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.connectors.vllm.scenarios import EPIC, Session, prompt

N = 3
# vLLM refuses n > 1 at temperature 0; the likeliest token alone is the same.
WAYS: dict[str, dict[str, Any]] = {"likeliest": {"top_k": 1, "seed": 7}, "sampled": {"seed": 11}}


BLENDS: dict[str, Any] = {"prefix": "prefix", "epic": EPIC, "full_recompute": "full_recompute"}


def several(session: Session) -> dict[str, Any]:
    """With moved chunks and without, and what they leave behind."""
    session.warm()
    parts = prompt(2, 0, 3)
    return {"answers": answers(session, parts), "kept": kept(session, parts)}


def answers(session: Session, parts: list[list[int]]) -> dict[str, dict[str, Any]]:
    """Of each blend and way of sampling: all at once, each alone, and each alone without lmc."""
    results: dict[str, dict[str, Any]] = {}
    for blend, spec in BLENDS.items():
        for way, sampling in WAYS.items():
            seeds = range(sampling["seed"], sampling["seed"] + N)
            lmc = {"blend": spec, "save": False}
            together, reports = _sent(session, parts, lmc, n=N, **sampling)
            one_by_one = [_sent(session, parts, lmc, **sampling | {"seed": s}) for s in seeds]
            stock = [
                _sent(session, parts, {"enabled": False}, **sampling | {"seed": s}) for s in seeds
            ]
            results[f"{blend}, {way}"] = {
                "together": together,
                "reports": reports,
                "alone": [tokens[0] for tokens, _ in one_by_one],
                "stock": [tokens[0] for tokens, _ in stock],
            }
    return results


def kept(session: Session, parts: list[list[int]]) -> dict[str, Any]:
    """What answers leave in the store for the next turn, and what is left when all is over."""
    tokens, _ = _sent(session, parts, {"blend": "prefix"}, n=N, **WAYS["sampled"])
    turns = [[*parts, answer] for answer in tokens.values()]
    found = [session.fresh(turn, "prefix", save=False).kinds for turn in turns]
    final = _final(session, parts)
    side, worker = session.scheduler.connector._scheduler, session.lmc_worker
    side.reset()
    session.ask([[9] * 20], enabled=False, tokens=1)  # the workers hear of it
    session.llm.reset_prefix_cache()
    worker.finish_saves()
    pool = side.local.manager.block_pool
    return {
        "found": found,
        "final": final,
        "left": {
            "requests": len(side.requests) + len(side.claims) + len(side.keeping._missing),
            "slots": len(side.index),
            "held": len(worker.chunks.memory._held),
            "bytes": worker.chunks.memory.size,
            "lent": len(side.isolation._lent),
            "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        },
    }


def _final(session: Session, parts: list[list[int]]) -> dict[str, Any]:
    """What comes with answers that are not streamed: of one of them alone."""
    session.llm.reset_prefix_cache()
    ids = [i for part in parts for i in part]
    sampling = SamplingParams(
        n=N, max_tokens=4, ignore_eos=True, detokenize=False, **WAYS["sampled"],
        extra_args={"kv_transfer_params": {"lmc": {"save": False}}},
    )  # fmt: skip
    output = session.llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]
    assert len(output.outputs) == N
    params: dict[str, Any] = output.kv_transfer_params
    return params


def _sent(
    session: Session, parts: list[list[int]], lmc: dict[str, Any], **sampling: Any
) -> tuple[dict[int, list[int]], dict[int, Any]]:
    """Tokens and report of each answer, streamed, from nothing in vLLM's own cache."""
    session.llm.reset_prefix_cache()
    ids = [i for part in parts for i in part]
    lmc = lmc | {"chunks": [[sum(map(len, parts[:i])), sum(map(len, parts[: i + 1]))]
                            for i in range(len(parts))]}  # fmt: skip
    params = SamplingParams(
        max_tokens=24, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": {"lmc": lmc}}, **sampling,
    )  # fmt: skip
    session._ids += 1
    session.engine.add_request(str(session._ids), {"prompt_token_ids": ids}, params)
    tokens: dict[int, list[int]] = {}
    reports: dict[int, Any] = {}
    while session.engine.has_unfinished_requests():
        for output in session.engine.step():
            (answer,) = output.outputs
            tokens.setdefault(answer.index, []).extend(answer.token_ids)
            if answer.finish_reason is not None:
                reports[answer.index] = output.kv_transfer_params["lmc"]
    session.finish()
    return tokens, reports
