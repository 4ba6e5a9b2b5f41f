"""Mixed traffic for as long as it is wanted, and what it leaves behind."""

from __future__ import annotations

import gc
import os
import random
import time
from typing import Any

import numpy as np

from lmc.connectors.vllm import drain
from lmc.store.disk.config import DiskConfig
from tests.connectors.vllm import persistent
from tests.connectors.vllm import scenarios as s

DOCUMENTS = [s.text(5000 + i, 25 + i * 3) for i in range(40)]
BLENDS: list[Any] = ["prefix", "full_recompute", "full_reuse", s.EPIC, "all_by_deviation", "lmc"]
LOSSLESS = ("prefix", "full_recompute", "all_by_deviation")
HANGS_S, RATE = 3.0, 0.01


class Hung(DiskConfig):
    """A disk of which a few reads and writes take seconds."""

    def open(self, layout: Any, **options: Any) -> Any:
        tier = super().open(layout, **options)
        rng = random.Random(0)
        for call in ("get", "put"):
            setattr(tier, call, self._hung(getattr(tier, call), rng))
        return tier

    @staticmethod
    def _hung(call: Any, rng: random.Random) -> Any:
        def hung(*arguments: Any, **options: Any) -> Any:
            if rng.random() < RATE:
                time.sleep(HANGS_S)
            return call(*arguments, **options)

        return hung


def soak(session: s.Session, seconds: float, seed: int) -> dict[str, Any]:
    """Prompts with repeated text, with spans and without, aborted, evicted, fetched in vain."""
    side, worker = session.scheduler.connector._scheduler, session.lmc_worker
    counts = persistent.counting(session)
    side.local.chains.limit = 2000  # it is bounded, and full after hours only
    rng = random.Random(seed)
    compared: list[tuple[s.Answer, Any]] = []
    samples: list[dict[str, float]] = []
    running: dict[str, tuple[list[list[int]], Any, dict[str, Any]]] = {}
    asked = aborted = 0
    begun = time.monotonic()
    sampled = 0.0
    while (now := time.monotonic() - begun) < seconds:
        if now > sampled + seconds / 60:
            sampled = now
            gc.collect()
            samples.append({"s": now, "rss": rss(), "asked": asked, "records": len(side.index)})
        while len(running) < 6 and rng.random() < 0.7:
            parts, blend, options = asks(rng)
            running[session.add(parts, blend, **options)] = (parts, blend, options)
            asked += 1
        if running and rng.random() < 0.02:
            victim = rng.choice(list(running))
            session.engine.abort_request([victim])
            del running[victim]
            aborted += 1
        for output in session.engine.step():
            if output.finished:
                parts, blend, options = running.pop(output.request_id.split("-")[0], (None,) * 3)
                if parts and blend in LOSSLESS and rng.random() < 0.02:
                    compared.append((s.answer_of(output), (parts, options)))
        if not running and rng.random() < 0.2:
            session.llm.reset_prefix_cache()
    session.finish()
    drain(session.llm)
    time.sleep(HANGS_S + 1)
    drain(session.llm)
    wrong = [got for got, (parts, options) in compared if not right(session, got, parts, options)]
    held = set(worker.chunks.memory._held)
    pool = side.local.manager.block_pool
    return {
        "asked": asked, "aborted": aborted, "compared": len(compared), "wrong": len(wrong),
        "samples": samples, "agree": held == set(side.index._entries),
        "sizes": (worker.chunks.memory.size, side.index.size),
        "leases": sum(entry.leases for entry in side.index._entries.values()),
        "left": (len(side.requests), side.planner._kept, side.keeping.pending, len(side.claims)),
        "free": (session.llm.reset_prefix_cache(), pool.get_num_free_blocks()),
        "blocks": pool.num_gpu_blocks - 1, "counts": dict(counts),
    }  # fmt: skip


def asks(rng: random.Random) -> tuple[list[list[int]], Any, dict[str, Any]]:
    """A prompt of a few documents, some of them more than once, and how it is sent."""
    parts = [DOCUMENTS[int(rng.random() ** 2 * 40)] for _ in range(rng.randint(1, 6))]
    if rng.random() < 0.5:
        parts += [rng.choice(parts)] * rng.randint(1, 2)
    parts.append(s.text(rng.randrange(1 << 30), rng.randint(3, 40)))
    options = {
        "tokens": rng.randint(1, 20), "spans": rng.random() < 0.6, "save": rng.random() < 0.9,
        "salt": rng.choice([None, None, "a", "b"]),
    }  # fmt: skip
    return parts, rng.choice(BLENDS), options


def right(session: s.Session, got: s.Answer, parts: Any, options: dict[str, Any]) -> bool:
    plain = s.plain(session, parts, tokens=options["tokens"])
    return bool(got.tokens == plain.tokens and np.allclose(got.logprobs, plain.logprobs, atol=1e-4))


def rss() -> float:
    """Memory of this process, bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
