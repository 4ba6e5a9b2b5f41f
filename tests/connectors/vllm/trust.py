"""What an engine must not believe: its weights, its pages, its clients. Scenarios of one engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

import lmc.connectors.vllm.layouts as layouts
import lmc.connectors.vllm.worker as worker_side
from tests.connectors.vllm import persistent
from tests.connectors.vllm import scenarios as s
from tests.connectors.vllm.audit import audited
from tests.connectors.vllm.changed import weights
from tests.connectors.vllm.grammar import parameters


def trust(session: s.Session, requests: int) -> dict[str, Any]:
    """All of them; the last one leaves who knows what in the store."""
    return {
        "embeds": embeds(session),
        "degraded": degraded(session),
        "given_up": given_up(session),
        "weights": weights(session),
        "fuzz": fuzz(session, requests),
    }


# -- clients -----------------------------------------------------------------------------------


def fuzz(session: s.Session, requests: int) -> dict[str, Any]:
    """Requests of any kind, one after the other; what was wrong of them."""
    session.warm()
    orders = list(permutations(range(4), 2)) + list(permutations(range(5), 3))[::3]
    prompts = [s.prompt(*order) for order in orders]
    plain = [s.plain(session, parts, tokens=2) for parts in prompts]
    counts = persistent.counting(session)
    wrong: list[str] = []
    done = [0, 0]  # all, and those that were blended

    def sent(i: int, params: Any) -> s.Answer | None:
        ids = [token for part in prompts[i] for token in part]
        try:
            sampling = SamplingParams(
                temperature=0, max_tokens=2, ignore_eos=True, detokenize=False, logprobs=1,
                extra_args={"kv_transfer_params": params},
            )  # fmt: skip
        except VLLMValidationError:  # whole numbers that vLLM's own front end sends nobody
            return None
        session._ids += 1
        session.engine.add_request(str(session._ids), {"prompt_token_ids": ids}, sampling)
        return session.finish()[str(session._ids)]

    def check(i: int, params: Any) -> None:
        with audited() as events:
            answer = sent(i, params)
        done[0] += 1
        if answer is None:
            return
        kinds = answer.report["kinds"]
        # Of a union the rows that both choose are counted twice, so that some may be left.
        both = "union" in repr(params) and kinds["recomputed"] > 0
        blended = kinds["moved"] + kinds["local_blended"] > 0 or both
        done[1] += blended
        if events:
            wrong.append(f"{params!r:.200}: {events[:3]}")
        if sum(kinds.values()) != sum(map(len, prompts[i])) or min(kinds.values()) < 0:
            wrong.append(f"{params!r:.200}: {kinds}")
        if not blended and not same(answer, plain[i]):
            wrong.append(f"{params!r:.200}: another answer, {answer.kinds}")
        if done[0] % 20 == 0:
            # What vLLM holds by now serves a request without lmc as if there were none.
            after = session.ask(prompts[i], enabled=False, tokens=2)
            if not same(after, plain[i]):
                wrong.append(f"before request {done[0]}: vLLM serves another answer")
            session.llm.reset_prefix_cache()
        if done[0] % 100 == 0:  # all that they stored is exact by now
            session.scheduler.connector._scheduler.index.clear()
            session.warm()

    def params(i: int) -> st.SearchStrategy[Any]:
        ends = np.cumsum([len(part) for part in prompts[i]]).tolist()
        documents = [list(span) for span in pairwise([0, *ends[:-1]])]
        # vLLM's own front end takes nothing but a mapping.
        return st.tuples(st.just(i), parameters(ends[-1], documents).map(lambda raw: {"lmc": raw}))

    @settings(
        max_examples=requests, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, len(prompts) - 1).flatmap(params))
    def every(request: tuple[int, Any]) -> None:
        check(*request)

    every()
    return {"wrong": wrong, "requests": done[0], "blended": done[1], "counts": dict(counts)}


def embeds(session: s.Session) -> dict[str, Any]:
    """Prompts of token ids and embeddings, whose ids do not tell them apart."""
    mask = [True] * 40 + [False] * 70 + [True] * 20
    ids = [*s.SYSTEM, *([7] * 70), *s.QUESTION]

    def sent(seed: int, lmc: dict[str, Any]) -> s.Answer:
        session.llm.reset_prefix_cache()
        vectors = torch.zeros(len(ids), 128)
        generator = torch.Generator().manual_seed(seed)
        vectors[40:110] = torch.randn(70, 128, generator=generator) * 3
        sampling = SamplingParams(
            temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=1,
            extra_args={"kv_transfer_params": {"lmc": lmc}},
        )  # fmt: skip
        session._ids += 1
        prompt = {
            "prompt_embeds": vectors, "prompt_token_ids": ids, "prompt_is_token_ids": mask,
        }  # fmt: skip
        session.engine.add_request(str(session._ids), prompt, sampling)
        return session.finish()[str(session._ids)]

    plain = sent(2, {"enabled": False})
    other = sent(1, {"blend": "prefix"})
    return {"plain": plain, "other": other, "got": sent(2, {"blend": "prefix"})}


def given_up(session: s.Session) -> dict[str, Any]:
    """Requests for which planning itself fails, before and after they were tainted."""
    session.warm()
    parts = s.prompt(2, 0, 3)
    side = session.scheduler.connector._scheduler
    counts = persistent.counting(session)
    results: dict[str, Any] = {"plain": s.plain(session, parts)}

    class PanicError(BaseException):
        """As a library of another language raises it."""

    def fails(*arguments: Any, **options: Any) -> Any:
        raise PanicError("panic")

    for name, owner, attribute in (
        ("planning", side.planner, "plan"),
        ("waiting", side.planner, "waits"),
        ("keeping", side.keeping, "keep"),
        ("leasing", side.planner, "hold"),
    ):
        session.llm.reset_prefix_cache()
        whole = getattr(owner, attribute)
        setattr(owner, attribute, fails)
        if name == "waiting":  # the plan is made, and has tainted the request
            setattr(owner, attribute, fails)
        results[name] = session.ask(parts, s.EPIC, save=name == "keeping")
        setattr(owner, attribute, whole)
        results[f"{name}_after"] = session.ask(parts, enabled=False)
    return results | {"counts": dict(counts)}


# -- pages and backends ------------------------------------------------------------------------


def degraded(session: s.Session) -> dict[str, Any]:
    """Engines of which something is not known, or not as it seems."""
    worker, side = session.lmc_worker, session.scheduler.connector._scheduler
    model = worker._decoder.model
    parts = s.prompt(2, 0)
    session.warm()
    results: dict[str, Any] = {"plain": s.plain(session, parts)}
    known = layouts.LAYOUTS["CPU_ATTN"]
    caches = [layer.kv_cache for layer in worker._attention.layers.values()]
    first, third = caches[0], caches[2].data_ptr()

    def swapped(cache: torch.Tensor) -> Any:
        k, v = known(cache)
        return v, k

    def shifted(cache: torch.Tensor) -> Any:
        k, v = known(cache)
        return k.roll(1, 1), v  # a copy, one row off

    def one_layer(cache: torch.Tensor) -> Any:
        k, v = known(cache)
        return known(first) if cache.data_ptr() == third else (k, v)

    def no_way(*arguments: Any) -> Any:
        raise ValueError("attention: kernels do not compute the sinks of layer 0")

    spoils: dict[str, Any] = {
        "unknown_backend": replaced(layouts.LAYOUTS, "CPU_ATTN", None),
        "swapped": replaced(layouts.LAYOUTS, "CPU_ATTN", swapped),
        "shifted": replaced(layouts.LAYOUTS, "CPU_ATTN", shifted),
        "one_layer": replaced(layouts.LAYOUTS, "CPU_ATTN", one_layer),
        "cannot_attend": replaced(vars(worker_side), "paged_attention", no_way),
        "no_rope_in_one_layer": unrotated(model.model.layers[1].self_attn),
        "another_loop": another_loop(model),
    }
    for name, spoilt in spoils.items():
        with spoilt:
            started(worker, side, model)
            results[name] = session.fresh(parts, s.EPIC, save=False)
    side._overlaps = True  # as on a GPU, where steps are scheduled ahead
    for name, spoilt in {
        "overlapping": replaced(vars(worker_side), "paged_attention", no_way),
        "overlapping_unrotated": unrotated(model.model.layers[1].self_attn),
    }.items():
        with spoilt:
            started(worker, side, model)
            results[name] = session.fresh(parts, s.EPIC, save=False)
    side._overlaps = False
    started(worker, side, model)
    results["mended"] = session.fresh(parts, s.EPIC, save=False)
    results["refusal"] = (worker.refusal, worker.kv_refusal)
    return results


def refused(session: s.Session) -> dict[str, Any]:
    """An engine that cannot recompute rows still reuses exact prefixes."""
    results = {"plain": s.plain(session, s.prompt(2, 0))}
    session.warm()
    # Not reset: without lmc's own worker that would be all there is to tell of other weights.
    manager = session.scheduler.connector._scheduler.local.manager
    manager.evict_blocks(set(range(manager.block_pool.num_gpu_blocks)))
    results["epic"] = session.ask(s.prompt(2, 0), s.EPIC, save=False)
    return results | {"reset": session.fresh(s.prompt(2, 0), s.EPIC, save=False)}


def started(worker: Any, side: Any, model: Any) -> None:
    """What a worker does at start, once more."""
    worker.refusal = worker.kv_refusal = worker._attention = None
    worker.register()
    worker.take_model(model)
    side.greet([worker.hello()])
    worker.watch.changes = side.namespace.known.get(0, 0)


@contextmanager
def replaced(where: Any, name: str, value: Any) -> Iterator[None]:
    whole = where[name]
    if value is None:
        del where[name]
    else:
        where[name] = value
    try:
        yield
    finally:
        where[name] = whole


@contextmanager
def unrotated(attention: Any) -> Iterator[None]:
    """A layer whose keys have no rotation, as some of SmolLM3's and Llama 4's."""
    forward = attention.rotary_emb.forward
    own = attention.rotary_emb
    attention.rotary_emb = type("NoRope", (torch.nn.Module,), {
        "forward": lambda self, positions, query, key: (query, key)
    })()  # fmt: skip
    try:
        yield
    finally:
        attention.rotary_emb = own
        assert attention.rotary_emb.forward == forward


@contextmanager
def another_loop(model: Any) -> Iterator[None]:
    """A model that does more between its layers than hand on hidden states."""
    inner, forward = model.model, model.model.forward

    def scaled(input_ids: Any, positions: Any, *rest: Any, **options: Any) -> Any:
        return forward(input_ids, positions, *rest, **options) * 1.5

    inner.forward = scaled
    try:
        yield
    finally:
        del inner.forward


def same(got: s.Answer, expected: s.Answer) -> bool:
    close = np.abs(got.logprobs - expected.logprobs).max() < 1e-4
    return got.tokens == expected.tokens and bool(close)
