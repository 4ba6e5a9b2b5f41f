"""What the engine tests let an engine do. Each scenario returns plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm import SamplingParams

from lmc.connectors.vllm import drain
from tests.connectors.vllm import across, one_pass, persistent, selective


@dataclass
class Answer:
    """One request's outcome."""

    tokens: list[int]
    logprobs: np.ndarray  # of the greedy tokens
    cached: int  # what vLLM counts as cached
    report: dict[str, Any]
    # By layer, what its strategy chose; known only where the worker lives in this process.
    selected: list[list[int]] = field(default_factory=list)

    @property
    def kinds(self) -> dict[str, int]:
        return {kind: n for kind, n in self.report["kinds"].items() if n}


def text(seed: int, T: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 500, T).tolist()


SYSTEM, QUESTION = text(100, 40), text(101, 20)
DOCUMENTS = [text(i, 70) for i in range(6)]
EPIC = {"name": "epic", "link_tokens": 8}


class Session:
    """An engine, and short ways to talk to it."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self._ids = 0
        self.selected: list[list[int]] = []  # of the latest claim, by layer
        self.together: list[int] = []  # claims of each pass through the layers
        selective.record(self)

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler, when the engine runs in this process."""
        return self.engine.engine_core.engine_core.scheduler

    @property
    def lmc_worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    def add(self, parts: list[list[int]], blend: Any = "prefix", *, tokens: int = 12,
            spans: bool = True, salt: str | None = None, logprobs: bool = False,
            lora: Any = None, sampling: dict[str, Any] | None = None,
            **lmc: Any) -> str:  # fmt: skip
        """Queue one request made of `parts`; planning happens now, nothing else does."""
        ids = [i for part in parts for i in part]
        ends = np.cumsum([len(part) for part in parts]).tolist()
        if spans:
            lmc.setdefault("chunks", [list(s) for s in zip([0, *ends], ends, strict=False)])
        if blend is not None:
            lmc["blend"] = blend
        said: dict[str, Any] = {
            "temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False,
            "logprobs": 1, "prompt_logprobs": 1 if logprobs else None,
            "extra_args": {"kv_transfer_params": {"lmc": lmc}},
        }  # fmt: skip
        params = SamplingParams(**said | (sampling or {}))
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if salt:
            prompt["cache_salt"] = salt
        self._ids += 1
        self.engine.add_request(str(self._ids), prompt, params, lora_request=lora)
        return str(self._ids)

    def finish(self) -> dict[str, Answer]:
        """Step until every queued request is answered."""
        answers = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    answers[output.request_id.split("-")[0]] = answer_of(output)
        drain(self.llm)
        return answers

    def ask(self, parts: list[list[int]], blend: Any = "prefix", **options: Any) -> Answer:
        """One request, alone."""
        self.selected = []
        request_id = self.add(parts, blend, **options)
        answer = self.finish()[request_id]
        answer.selected = self.selected
        return answer

    def fresh(self, *arguments: Any, **options: Any) -> Answer:
        """One request, alone, with nothing in vLLM's own cache."""
        self.llm.reset_prefix_cache()
        return self.ask(*arguments, **options)

    def lose_last(self, tracked: Any) -> int:
        """The worker loses the last document that a request's plan has, in how many chunks."""
        found = tracked.plan.found
        start = max(a for a, _ in tracked.options.chunks if a <= found[-1].start)
        slots = [s.record.slot for s in found if s.start >= start]
        for slot in slots:
            self.lmc_worker.chunks.memory.release(slot)
        return len(slots)

    def warm(self, **options: Any) -> None:
        """Every document once, alone behind the system prompt."""
        for document in DOCUMENTS:
            self.ask([SYSTEM, document], tokens=1, **options)


def answer_of(output: Any) -> Answer:
    completion = output.outputs[0]
    logprobs = [next(iter(step.values())).logprob for step in completion.logprobs]
    report = output.kv_transfer_params["lmc"]
    return Answer(list(completion.token_ids), np.array(logprobs), output.num_cached_tokens, report)


def prompt(*order: int) -> list[list[int]]:
    return [SYSTEM, *(DOCUMENTS[i] for i in order), QUESTION]


def plain(session: Session, parts: list[list[int]], **options: Any) -> Answer:
    """The request as vLLM alone serves it, from nothing."""
    return session.fresh(parts, enabled=False, **options)


def across_and_gated(session: Session) -> dict[str, Any]:
    """A replayed selection in two engines, and strategies that the gate lets pass or does not."""
    session.warm()
    parts = prompt(2, 0, 3)
    return {
        "across": across.across(session, SYSTEM, DOCUMENTS, parts),
        "gated": across.gated(session, parts),
    }


def reuse(session: Session) -> dict[str, Any]:
    """Each strategy on a reordered prompt, beside what vLLM alone answers."""
    session.warm()
    parts = prompt(2, 0, 3)
    results = {
        "plain": plain(session, parts),
        "full_recompute": session.fresh(parts, "full_recompute", save=False),
        "epic": session.fresh(parts, EPIC, save=False),
        "epic_again": session.ask(parts, EPIC, save=False),
        "full_reuse": session.fresh(parts, "full_reuse", save=False),
        "norotate": session.fresh(parts, {"name": "full_reuse", "rotate": False}, save=False),
        "prefix": session.fresh(parts, "prefix", save=False),
        "cdc": session.fresh(parts, "full_recompute", spans=False, save=False),
        "other_tenant": session.fresh(parts, "full_recompute", salt="other", save=False),
        "nothing_moved": session.fresh(prompt(1), EPIC, save=False),
        "nothing_moved_plain": plain(session, prompt(1)),
        "unaligned": session.fresh([text(7, 13), *prompt(1, 4)], "full_recompute", save=False),
        "unaligned_plain": plain(session, [text(7, 13), *prompt(1, 4)]),
        "little_gain": session.fresh([text(8, 90), DOCUMENTS[0]], EPIC, save=False),
        **selective.arms(session, parts, gap=text(14, 9), suffix=text(15, 160)),
    }
    # Saved twice in two contexts, the second is exact there: the key scheme of prefix caching.
    session.fresh(parts, "prefix")
    results["exact_later"] = session.fresh([*parts, text(9, 30)], EPIC, save=False)
    return results


def persist(session: Session) -> dict[str, Any]:
    """Documents that are stored, and answers out of host memory."""
    session.warm()
    results = persistent.arms(session, prompt(2, 0, 3))
    session.llm.collective_rpc("finish_saves")
    return results


def persist_elsewhere(session: Session) -> None:
    """Documents that are stored by workers in processes of their own."""
    session.warm()
    session.llm.collective_rpc("finish_saves")


def restarted(session: Session) -> dict[str, Any]:
    """What a new engine on the same folder answers."""
    parts = prompt(2, 0, 3)
    counts = persistent.counting(session)
    results = persistent.from_disk(session, parts)
    results["plain"] = plain(session, parts)
    persistent.forget_memory(session)
    results["other_tenant"] = session.fresh(parts, "full_recompute", salt="other", save=False)
    return results | {"counts": counts}


def restarted_elsewhere(session: Session) -> dict[str, Any]:
    """The same in engines whose workers are processes of their own."""
    parts = prompt(2, 0, 3)
    return {"epic": session.fresh(parts, EPIC, save=False), "plain": plain(session, parts)}


def slow_disk(session: Session) -> dict[str, Any]:
    """A disk that hangs, before others and alone."""
    parts = prompt(2, 0, 3)
    results = persistent.slow_disk(session, parts)
    results["other"], results["waits"] = answer_of(results["other"]), answer_of(results["waits"])
    return results | {"plain": plain(session, parts)}


def poison(session: Session, *, tainted: bool = True) -> dict[str, Any]:
    """The control: blended requests, then the same prompts without reuse."""
    import lmc.connectors.vllm.admission as admission

    if not tainted:
        admission.rechain = lambda *arguments: None
    session.warm()
    orders = [(2, 0, 3), (5, 1, 4), (3, 2, 1)]
    before = [plain(session, prompt(*order)) for order in orders]
    session.llm.reset_prefix_cache()
    blends = ["full_reuse", selective.CACHEBLEND, selective.QUERY]
    blended = [
        session.ask(prompt(*order), blend, save=False)
        for order, blend in zip(orders, blends, strict=True)
    ]
    after = [session.ask(prompt(*order), enabled=False) for order in orders]
    return {"before": before, "blended": blended, "after": after}


def poison_untainted(session: Session) -> dict[str, Any]:
    return poison(session, tainted=False)


def together(session: Session) -> dict[str, Any]:
    """Requests of every sort in the same steps, and each alone."""
    session.warm()
    requests: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
        # First, so that the others find its system prompt in pages it has yet to fill.
        "plain": ([SYSTEM, text(12, 60)], {"enabled": False}),
        "blended": (prompt(2, 0, 3), {"blend": EPIC}),
        "selective": (prompt(5, 0, 3), {"blend": selective.CACHEBLEND}),
        "exact": ([SYSTEM, DOCUMENTS[5], text(11, 15)], {"blend": "prefix"}),
        "lost": (prompt(4, 1), {"blend": "full_recompute"}),
    }
    arguments: dict[str, Any] = {"save": False, "tokens": 20}
    alone = {
        name: session.fresh(parts, **options, **arguments)
        for name, (parts, options) in requests.items()
    }
    alone["lost"] = plain(session, requests["lost"][0], tokens=20)
    session.llm.reset_prefix_cache()
    ids = {
        name: session.add(parts, **options, **arguments)
        for name, (parts, options) in requests.items()
    }
    side = session.scheduler.connector._scheduler
    counts: Counter[str] = Counter()
    take_stats = side.take_stats

    def counted() -> Any:
        # Each step's go to vLLM's logger and are gone.
        counts.update(side.counts + side.admission.counts)
        return take_stats()

    side.take_stats = counted
    # Planned, not yet loaded: the workers lose a chunk that the plan counts on.
    lost = next(t for t in side.requests.values() if t.request.request_id.startswith(ids["lost"]))
    gone = session.lose_last(lost)
    answers = session.finish()
    # The same where the strategy would not have computed its rows anyway.
    session.llm.reset_prefix_cache()
    lossy = session.add(prompt(5, 3), "full_reuse", save=False)
    gone += session.lose_last(next(iter(side.requests.values())))
    lossy_answer = session.finish()[lossy]
    lossy_plain = plain(session, prompt(5, 3))
    selective_lossy, more = selective.lost_chunks(session, prompt(5, 2, 0), prompt(2, 4))
    # Planned, then forgotten by the scheduler itself.
    session.llm.reset_prefix_cache()
    forgotten = session.add(prompt(2, 0, 3), "full_recompute", save=False, tokens=20)
    side.reset()
    results = {
        "alone": alone,
        "together": {name: answers[i] for name, i in ids.items()},
        "lossy": lossy_answer,
        "lossy_plain": lossy_plain,
        "selective_lossy": selective_lossy,
        "forgotten": session.finish()[forgotten],
        "forgotten_plain": plain(session, prompt(2, 0, 3), tokens=20),
        "counts": counts + side.counts + side.admission.counts,
        "gone": gone + more,
        "held": len(side.index),
    }
    return results


def preempted(session: Session) -> dict[str, Any]:
    """Two blended requests that together outgrow the pages, so that one must start over."""
    session.warm()
    requests = [prompt(2, 0, 3), prompt(5, 1, 4)]
    arguments: dict[str, Any] = {"tokens": 420}
    alone = [session.fresh(parts, "full_recompute", **arguments) for parts in requests]
    session.llm.reset_prefix_cache()
    preemptions = []
    preempt = session.scheduler._preempt_request

    def counted(request: Any, *rest: Any, **options: Any) -> None:
        preemptions.append(request.request_id)
        preempt(request, *rest, **options)

    session.scheduler._preempt_request = counted
    ids = [session.add(parts, "full_recompute", **arguments) for parts in requests]
    answers = session.finish()
    return {
        "alone": alone,
        "together": [answers[i] for i in ids],
        "preemptions": preemptions,
        "after": plain(session, requests[0], tokens=20),
    }


def next_turn(session: Session) -> dict[str, Any]:
    """A second turn over a blended first one finds its blocks, decoded ones included."""
    session.warm()
    parts = prompt(2, 0, 3)
    session.llm.reset_prefix_cache()
    first = session.ask(parts, "full_recompute", tokens=60)
    second = [*parts, first.tokens, text(13, 25)]
    turn = session.ask(second, "full_recompute")
    return {
        "turn": turn,
        "plain": plain(session, second),
        "stored_decode": session.fresh(second, "full_recompute", save=False),
    }


def bad_requests(session: Session) -> dict[str, Any]:
    """Requests that cannot be blended, and the same without lmc."""
    session.warm()
    parts = prompt(2, 0)
    held = len(session.scheduler.connector._scheduler.index)
    nested: dict[str, Any] = {"name": "epic"}
    for _ in range(300):
        nested = {"name": "union", "first": nested}
    results = {
        "plain": plain(session, parts),
        "unknown_strategy": session.fresh(parts, "cachblend"),
        "unknown_layer": session.fresh(parts, {"name": "query", "layers": [7]}),
        "unknown_key": session.fresh(parts, chunk=[]),
        "deep_text": session.fresh(parts, "epic:" + "[" * 3000),
        "deep_mapping": session.fresh(parts, nested),
        "long_name": session.fresh(parts, "x" * 100_000),
        "overlap": session.fresh(parts, chunks=[[0, 50], [40, 60]]),
        "beyond": session.fresh(parts, chunks=[[0, 5000]]),
        "prompt_logprobs": session.fresh(parts, EPIC, logprobs=True),
    }
    results["stored"] = len(session.scheduler.connector._scheduler.index) - held
    return results


def adapter(session: Session) -> dict[str, Any]:
    """The selective forward by itself, in pages that no request owns."""
    tokens, other = np.array(text(20, 230)), np.array(text(20, 230))
    other[150:] = text(21, 80)
    return selective.by_itself(session, tokens, other)


def in_one_pass(session: Session) -> dict[str, Any]:
    """Claims that go through the layers together, and what fails of them."""
    session.warm()
    prompts = [prompt(2, 0, 3), prompt(4, 2), prompt(5, 0, 3), prompt(1, 4)]
    return one_pass.one_pass(session, prompts, [SYSTEM, text(12, 20)])


# What default engines are asked, one after the other; the last one takes the taint away for good.
