"""By how much blending makes running answers wait, by the budget of rows a step.

    python benchmarks/stall.py

One engine in this process decodes 4 answers. Then 4 requests come at once whose documents are moved
and blended, each of 1,600 tokens in a new order, under a budget (`rows_per_step`) that is another
one each round, in turn; `prefill` is the same requests without lmc. Told of a round: the longest
and the summed time beyond a usual step between tokens of the running answers, until the new
requests have begun to answer, and when those did. Prints medians with bootstrap intervals, appends
a row a round.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from lmc.model import exports
from lmc.results.rows import git_commit
from lmc.results.statistics import bootstrap
from lmc.workloads.rag_reorder import RagReorder
from lmc.workloads.sample import Sample, corpus_of

OUT = Path(__file__).parent / "results" / "stall.jsonl"
RUNNING, COMING = 4, 4
NO_BUDGET = 1 << 30
BUDGETS = {"none": NO_BUDGET, "2048": 2048, "512": 512, "256": 256, "128": 128, "prefill": 0}


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    model = exports.resolve(options.model)
    llm = LLM(
        str(model), dtype="float32", max_model_len=4096, max_num_batched_tokens=2048,
        max_num_seqs=16, worker_cls="lmc.connectors.vllm.LMCWorker",
        kv_transfer_config=KVTransferConfig(
            kv_connector="LMCConnector", kv_connector_module_path="lmc.connectors.vllm",
            kv_role="kv_both", kv_load_failure_policy="recompute",
            kv_connector_extra_config={"lmc": {"memory_bytes": 2 << 30}},
        ),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    rag = RagReorder(seed=0, documents=8, documents_per_prompt=6,
                     prompts=COMING * (options.rounds + 1) * len(BUDGETS))  # fmt: skip
    samples = rag.samples(tokenizer)
    for part in corpus_of(rag, samples, tokenizer):
        llm.generate({"prompt_token_ids": list(part.token_ids)}, SamplingParams(max_tokens=1),
                     use_tqdm=False)  # fmt: skip
    core: Any = llm.llm_engine.engine_core
    admission = core.engine_core.scheduler.connector._scheduler.admission
    left = iter(samples)
    rows = []
    for i in range(-1, options.rounds):  # the first one warms up
        arms = list(BUDGETS)[:: 1 if i % 2 else -1]
        for arm in arms:
            admission._rows = BUDGETS[arm] or NO_BUDGET
            assert llm.reset_prefix_cache()
            coming = [next(left) for _ in range(COMING)]
            row = measure(llm, coming, lmc=arm != "prefill") | {"budget": arm, "round": i}
            rows += [row] if i >= 0 else []
    for arm in BUDGETS:
        show(arm, [row for row in rows if row["budget"] == arm])
    where = {"benchmark": "stall", "time": time.time(), "commit": git_commit()}
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(where | row) + "\n" for row in rows)


def measure(llm: Any, coming: list[Sample], lmc: bool) -> dict[str, float]:
    """One round."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    none = {"kv_transfer_params": {"lmc": {"enabled": False}}}
    rng = np.random.default_rng(len(coming[0].prompt.token_ids))
    for i in range(RUNNING):
        ids = rng.integers(1000, 40_000, 48).tolist()
        sampling = SamplingParams(max_tokens=2000, ignore_eos=True, extra_args=none)
        engine.add_request(f"running {i}", {"prompt_token_ids": ids}, sampling)
    usual: list[float] = []
    for step in range(12):
        begun = time.perf_counter()
        engine.step()
        usual += [time.perf_counter() - begun] if step >= 4 else []
    each = float(np.median(usual))
    for i, sample in enumerate(coming):
        spans = [list(span) for span in sample.reusable]
        extra = {"kv_transfer_params": {"lmc": {"chunks": spans, "save": False}}} if lmc else none
        prompt = {"prompt_token_ids": list(sample.prompt.token_ids)}
        engine.add_request(f"coming {i}", prompt, SamplingParams(max_tokens=1, extra_args=extra))
    begun = last = time.perf_counter()
    firsts: list[float] = []
    gaps: list[float] = []
    while len(firsts) < len(coming):
        outputs = engine.step()
        now = time.perf_counter()
        if any(out.request_id.startswith("running") for out in outputs):
            gaps.append(now - last)
            last = now
        firsts += [now - begun for out in outputs if out.request_id.startswith("coming")]
    engine.abort_request([f"running {i}" for i in range(RUNNING)])
    while engine.has_unfinished_requests():
        engine.step()
    beyond = sum(max(0.0, gap - each) for gap in gaps)
    return {"longest_s": max(gaps) - each, "summed_s": beyond, "usual_s": each,
            "first_s": min(firsts), "last_s": max(firsts)}  # fmt: skip


def show(arm: str, rows: list[dict[str, Any]]) -> None:
    """Medians of one budget."""
    line = f"{arm:8} {len(rows):3} rounds"
    for key in ("longest_s", "summed_s", "first_s", "last_s"):
        found = bootstrap([[row[key]] for row in rows],
                          lambda sample: np.median(np.concatenate(sample)))  # fmt: skip
        assert found is not None
        line += f"  {key} {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
    print(line, flush=True)


if __name__ == "__main__":
    main()
