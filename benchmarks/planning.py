"""What lmc's side of the scheduler costs for one request, beside vLLM's own hashing of it.

    python benchmarks/planning.py

No model and no engine: vLLM's block pool and requests, and lmc's scheduler side as an engine makes
it, in one process. A store is filled with documents of half the prompt's length each time in
another order: `prefix` finds nothing that could be moved, `epic` moves nearly all, `again` finds
all of an exact prefix, `new` finds nothing. Times are of the processor, the least of a few runs,
since all of it is on one thread; `slope` is that of log time over log tokens from 8k on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.messages import WorkerHello, WorkerReport
from lmc.connectors.vllm.scheduler import SchedulerSide
from lmc.results.rows import git_commit

OUT = Path(__file__).parent / "results" / "planning.jsonl"
P, DOCUMENT, SYSTEM, QUESTION, VOCABULARY = 16, 1000, 200, 64, 128_000
ARMS = ("new", "again", "prefix", "epic", "spans")


class Bench:
    """A scheduler side over a pool of vLLM's blocks, and requests that pass through it."""

    def __init__(
        self, longest: int, memory_bytes: int = 1 << 42, tiers: Sequence[Any] = ()
    ) -> None:
        text = LlamaConfig(
            hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=VOCABULARY,
            max_position_embeddings=1 << 18,
        )  # fmt: skip
        spec = FullAttentionSpec(block_size=P, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
        group = KVCacheGroupSpec([f"layers.{i}" for i in range(32)], spec)
        pages = KVCacheConfig(num_blocks=longest // P * 2, kv_cache_tensors=[],
                              kv_cache_groups=[group])  # fmt: skip
        engine = SimpleNamespace(
            model_config=SimpleNamespace(hf_text_config=text, model="model", dtype=torch.bfloat16,
                                         get_total_num_kv_heads=lambda: 8,
                                         quantization=None),
            load_config=SimpleNamespace(load_format="dummy"),
            cache_config=SimpleNamespace(enable_prefix_caching=True),
            kv_events_config=None,
            kv_transfer_config=SimpleNamespace(kv_load_failure_policy="recompute"),
            parallel_config=SimpleNamespace(world_size=1, rank=0, tensor_parallel_size=1),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=8192, async_scheduling=False),
        )  # fmt: skip
        config = LMCConfig(
            memory_bytes=memory_bytes, min_recovery=None, context="any", tiers=tuple(tiers),
            hand_over=True,
        )  # fmt: skip
        self.side = SchedulerSide(engine, pages, config)
        self.side.greet([WorkerHello(None, watched=True, computes=True)])
        self.manager = KVCacheManager(pages, longest + 2 * P, P, P)
        self.side.local.manager = self.manager
        hashing = get_hash_fn_by_name("sha256")
        init_none_hash(hashing)
        self.hasher = get_request_block_hasher(P, hashing)
        self.requests = 0
        self.seconds: dict[str, float] = {}

    def ask(self, tokens: list[int], lmc: dict[str, Any]) -> dict[str, float]:
        """One request from its arrival to its end; seconds of each part."""
        self.seconds = {}
        request = self.arrive(tokens, lmc)
        self.answered(request)
        claimed = self.admit(request)
        assert claimed is not None
        self.finish(request)
        assert self.manager.reset_prefix_cache()
        return self.seconds | {"claimed": claimed}

    def arrive(self, tokens: list[int], lmc: dict[str, Any]) -> Request:
        """A request comes, and waits."""
        self.requests += 1
        sampling = SamplingParams(max_tokens=8, extra_args={"kv_transfer_params": {"lmc": lmc}})
        request = self.timed("vllm", lambda: Request(
            f"{self.requests}", tokens, sampling, None, block_hasher=self.hasher))  # fmt: skip
        self.timed("plan", lambda: self.side.on_new_request(request))
        return request

    def answered(self, request: Request) -> None:
        """The tiers have said what they have of it."""
        lookup = self.side.requests[request.request_id].lookup
        if lookup is not None:
            lookup.wait(time.monotonic() + 60)
            assert lookup.over

    def admit(self, request: Request) -> int | None:
        """vLLM wants to admit it: what is claimed, or None if it must wait."""
        side, manager = self.side, self.manager
        blocks, local, *_ = manager.get_computed_blocks(request)
        claimed: int | None = self.timed("plan", lambda: side.matched_tokens(request, local))
        if claimed is None:
            return None
        rest = request.num_tokens - local - claimed
        assert manager.allocate_slots(
            request, rest, num_new_computed_tokens=local, new_computed_blocks=blocks,
            num_external_computed_tokens=claimed,
        )  # fmt: skip
        own = [list(ids) for ids in manager.get_block_ids(request.request_id)]
        self.timed("plan", lambda: side.allocated(request, own, claimed))
        request.num_computed_tokens = local + claimed
        self.step(request, rest)
        request.num_computed_tokens = request.num_tokens
        return claimed

    def finish(self, request: Request) -> None:
        """Its prompt is computed, and it ends."""
        own = [list(ids) for ids in self.manager.get_block_ids(request.request_id)]
        self.timed("keep", lambda: self.side.finish(request, own))
        self.manager.free(request)
        self.step()

    def step(self, request: Request | None = None, scheduled: int = 0) -> None:
        """A step of the engine, whose workers do all that they are told."""
        numbers = {request.request_id: scheduled} if request else {}
        output = SimpleNamespace(
            num_scheduled_tokens=numbers, scheduled_spec_decode_tokens={}, preempted_req_ids=set(),
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(new_block_ids=[], num_output_tokens=[]),
        )  # fmt: skip
        metadata = self.timed("keep", lambda: self.side.step(output))
        saves = [*metadata.leaving, *metadata.saves]
        report = WorkerReport(saved=[(save.record.slot, 0) for save in saves])
        self.timed("keep", lambda: self.side.heard(report))

    def timed(self, part: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = call()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - start
        return result


def measured(T: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each part by arm, for prompts of T tokens."""
    rng = np.random.default_rng(T)

    def text(n: int) -> list[int]:
        return rng.integers(0, VOCABULARY, n).tolist()  # type: ignore[no-any-return]

    bench = Bench(T + SYSTEM + QUESTION)
    system, size = text(SYSTEM), min(DOCUMENT, T // 2)
    documents = [text(size) for _ in range(T // size)]
    whole = system + joined(documents)
    for document in documents:
        bench.ask(system + document, {"blend": "prefix"})
    bench.ask(whole, {"blend": "prefix"})
    least: dict[str, dict[str, float]] = {}
    for _ in range(repeats):
        rng.shuffle(documents)
        shuffled = system + joined(documents) + text(QUESTION)
        spans = [[a, a + size] for a in range(SYSTEM, SYSTEM + size * len(documents), size)]
        asked = {
            "new": (text(len(shuffled)), {"save": True}),
            "again": (whole + text(QUESTION), {"save": False}),
            "prefix": (shuffled, {"blend": "prefix", "save": False}),
            "epic": (shuffled, {"blend": "epic", "save": True}),
            "spans": (shuffled, {"blend": "epic", "save": True, "chunks": spans}),
        }
        for arm in ARMS:
            seconds = bench.ask(*asked[arm])
            before = least.get(arm, seconds)
            least[arm] = {part: min(seconds[part], before[part]) for part in seconds}
    return least


def joined(texts: list[list[int]]) -> list[int]:
    return [token for text in texts for token in text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 8000, 32_000, 128_000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for T in options.tokens:
        for arm, seconds in measured(T, options.repeats).items():
            rows.append({"benchmark": "planning", "commit": git_commit(), "T": T, "arm": arm,
                         **seconds})  # fmt: skip
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    print("arm      tokens  claimed  vllm ms  plan ms  keep ms  plan/vllm  keep/vllm")
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        for row in mine:
            vllm, plan, keep = (1000 * row[part] for part in ("vllm", "plan", "keep"))
            print(
                f"{arm:8} {row['T']:6}  {row['claimed']:7.0f}  {vllm:7.1f}  {plan:7.1f}"
                f"  {keep:7.1f}  {plan / vllm:9.2f}  {keep / vllm:9.2f}"
            )
        long = [row for row in mine if row["T"] >= 8000]
        if len(long) > 1:
            x = np.log([row["T"] for row in long])
            slopes = [np.polyfit(x, np.log([row[part] for row in long]), 1)[0]
                      for part in ("plan", "keep")]  # fmt: skip
            print(f"{arm:8} slope of plan {slopes[0]:.2f}, of keep {slopes[1]:.2f}")


if __name__ == "__main__":
    main()
