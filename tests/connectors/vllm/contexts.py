"""Engines under a context policy: what they compute alone, and what another's text may do."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from vllm import SamplingParams

from lmc.connectors.vllm import drain
from lmc.connectors.vllm.messages import WorkerHello
from tests.connectors.vllm import persistent
from tests.connectors.vllm import scenarios as s

EVIL = s.text(200, 90)
LONG = s.text(201, 300)  # longer than a step of the engine


def isolated(session: s.Session) -> dict[str, Any]:
    """Documents that come in prompts, in other orders, and from somebody who means harm."""
    side = session.scheduler.connector._scheduler
    counts = persistent.counting(session, worker=False)
    results: dict[str, Any] = {}
    reordered = [s.SYSTEM, s.DOCUMENTS[1], s.DOCUMENTS[0], s.text(202, 20)]
    # As they come in prompts, and as documents that a client sends alone.
    session.fresh([s.SYSTEM, s.DOCUMENTS[0], s.DOCUMENTS[1], s.QUESTION], s.EPIC, salt="in prompts")
    results["counts"] = dict(counts)
    results["in_prompts"] = session.fresh(reordered, s.EPIC, salt="in prompts", save=False)
    for part in (s.SYSTEM, s.DOCUMENTS[0], s.DOCUMENTS[1]):
        session.fresh([part], "prefix", tokens=1, salt="alone")
    results["alone"] = session.fresh(reordered, s.EPIC, salt="alone", save=False)
    # Once is enough.
    before = counts["tokens_computed_alone"]
    session.fresh(reordered, s.EPIC, salt="in prompts")
    results["again"] = counts["tokens_computed_alone"] - before
    session.fresh([s.SYSTEM, LONG, s.QUESTION], s.EPIC, salt="long")
    results["long"] = session.fresh([s.QUESTION, LONG, s.SYSTEM], s.EPIC, salt="long", save=False)
    # A later turn, in which nobody says where the text begins.
    turn = [s.QUESTION, LONG, s.SYSTEM, s.text(205, 20)]
    results["unsaid"] = session.fresh(turn, s.EPIC, salt="long", spans=False, save=False)
    results["long_plain"] = s.plain(session, [s.QUESTION, LONG, s.SYSTEM])
    results["attacked"] = attacked(session)
    results["said"] = said(session)
    side.index.clear()
    results["pending"] = side.isolation.pending
    results["reset"] = session.llm.reset_prefix_cache()
    pool = side.local.manager.block_pool
    results["free"] = (pool.get_num_free_blocks(), pool.num_gpu_blocks)
    return results


def said(session: s.Session) -> list[str]:
    """What vLLM's log says when an engine starts, by policy."""
    side = session.scheduler.connector._scheduler
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("vllm.lmc.connectors.vllm.startup")
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    for context in ("any", "shared_prefix", "isolated"):
        side.config = side.config.model_copy(update={"context": context})
        side.greet([WorkerHello(None, None, True, True)])
    log.removeHandler(handler)
    log.setLevel(level)
    return lines


def attacked(session: s.Session) -> dict[str, Any]:
    """The same document stored behind a text that means harm, and read by somebody else."""
    side = session.scheduler.connector._scheduler
    reader = [s.SYSTEM, s.text(203, 33), s.DOCUMENTS[4], s.text(204, 20)]
    results: dict[str, Any] = {}
    for policy in ("any", "shared_prefix", "isolated"):
        config = side.config.model_copy(update={"context": policy})
        side.planner._config = config
        side.isolation._policy, side.isolation._rate = policy, 0 if policy == "any" else 512
        session.fresh([EVIL, s.DOCUMENTS[4], s.QUESTION], s.EPIC, salt=f"attacked, {policy}")
        session.fresh([s.DOCUMENTS[4]], "prefix", tokens=1, salt=f"unharmed, {policy}")
        for name in ("attacked", "unharmed"):
            session.fresh([s.SYSTEM], "prefix", tokens=1, salt=f"{name}, {policy}")
            answer = session.fresh(reader, s.EPIC, salt=f"{name}, {policy}", save=False)
            results[f"{policy} {name}"] = answer
    side.planner._config = side.config
    return results | {"plain": s.plain(session, reader)}


# -- a real model ------------------------------------------------------------------------------


def real_attack(session: s.Session, prompts: dict[str, list[list[int]]]) -> dict[str, float]:
    """KL of a reader's answer to that of full prefill, by policy, nats a token; and what it cost.

    Args:
        prompts: the `reader`'s, the `evil` one's and the document `alone`, in parts.
    """
    from lmc.experiment.vllm.forcing import STEPS

    side = session.scheduler.connector._scheduler
    counts = persistent.counting(session)

    def answered(parts: list[list[int]], salt: str, forced: list[int], **lmc: Any) -> Any:
        session.llm.reset_prefix_cache()
        STEPS.clear()
        ends = np.cumsum([len(part) for part in parts]).tolist()
        lmc["chunks"] = [list(span) for span in zip([0, *ends], ends, strict=False)]
        sampling = SamplingParams(
            temperature=0, max_tokens=16, ignore_eos=True, detokenize=False,
            extra_args={"forced": forced, "kv_transfer_params": {"lmc": lmc}},
        )  # fmt: skip
        prompt = {"prompt_token_ids": [i for part in parts for i in part], "cache_salt": salt}
        output = session.llm.generate([prompt], sampling, use_tqdm=False)[0]
        drain(session.llm)
        tokens = list(output.outputs[0].token_ids)
        return tokens, np.stack([step.numpy() for step in STEPS.values()]), output

    reader = prompts["reader"]
    tokens, full, _ = answered(reader, "full", [], enabled=False)
    results: dict[str, float] = {}
    for policy in ("any", "isolated"):
        side.planner._config = side.config.model_copy(update={"context": policy})
        side.isolation._policy, side.isolation._rate = policy, 0 if policy == "any" else 512
        before = counts["tokens_computed_alone"]
        answered(prompts["evil"], policy, [])
        results[f"{policy} cost"] = counts["tokens_computed_alone"] - before
        _, got, output = answered(reader, policy, tokens, save=False)
        results[policy] = float((np.exp(full) * (full - got)).sum(-1).mean())
        results[f"{policy} moved"] = output.kv_transfer_params["lmc"]["kinds"]["moved"]
    return results
