"""How long running answers stand still for blending, by the budget of rows a step.

    python benchmarks/stall.py

One engine in this process. Some requests decode; then several retrieval prompts, whose documents
are stored and come in another order, are admitted at once. In turn, the same prompts: `alone`
(nothing is admitted), `plain` (vLLM prefills them, in chunks), and blending with so many rows a
step at most (`rows_per_step`; `none`: as many as vLLM schedules). A step that computes rows makes
everybody who decodes wait for it.

Prints by arm, medians over rounds with bootstrap intervals: the longest time between two tokens of
an answer that decodes; how much later than alone these answers are over; the time to the first
token of the first and of the last of the prompts. Appends a row a round.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from engine import started
from transformers import AutoTokenizer

from lmc.model import exports
from lmc.results.rows import git_commit
from lmc.results.statistics import bootstrap
from lmc.workloads.rag_reorder import RagReorder
from lmc.workloads.sample import corpus_of

OUT = Path(__file__).parent / "results" / "stall.jsonl"
DECODED = 96  # tokens of an answer that runs
BUDGET = 2048  # tokens that vLLM schedules a step


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--decoding", type=int, default=4, help="answers that run")
    parser.add_argument("--admitted", type=int, default=4, help="prompts that come at once")
    parser.add_argument("--rows", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--strategy", default="epic", help="a strategy's name or JSON")
    options = parser.parse_args()
    lmc = {"memory_bytes": 4 << 30, "uncalibrated": "allow"}
    limits = {"max_model_len": 4096, "max_num_batched_tokens": BUDGET, "max_num_seqs": 16}
    llm = started(options.model, lmc, **limits)
    tokenizer = AutoTokenizer.from_pretrained(exports.resolve(options.model))
    arms = ["alone", "plain", "none", *map(str, options.rows)]
    rows: list[dict[str, Any]] = []
    for round_ in range(-1, options.rounds):  # the first one warms up
        order = arms[round_ % len(arms) :] + arms[: round_ % len(arms)]
        for arm in order:
            got = one(llm, tokenizer, arm, round_ + 1, options)
            rows += [{"arm": arm, "round": round_} | got] if round_ >= 0 else []
        print(f"round {round_ + 1} of {options.rounds}", flush=True)
    show(rows, arms)
    where = {"benchmark": "stall", "time": time.time(), "commit": git_commit()}
    where |= {"strategy": options.strategy, "model": options.model}
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(where | row) + "\n" for row in rows)


def one(
    llm: Any, tokenizer: Any, arm: str, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One round of one arm; the prompts of a round are the same for all arms, their salts not."""
    from vllm import SamplingParams

    from lmc.connectors.vllm import drain

    engine = llm.llm_engine
    side = engine.engine_core.engine_core.scheduler.connector._scheduler
    strategy = options.strategy
    if strategy.startswith("{"):
        strategy = json.loads(strategy)
    rag = RagReorder(seed=seed, documents=8, documents_per_prompt=6, prompts=options.admitted)
    samples = rag.samples(tokenizer)
    salt = f"{arm} {seed} {time.time()}"

    def add(name: str, ids: Any, tokens: int, lmc: dict[str, Any]) -> None:
        params = SamplingParams(
            max_tokens=tokens, min_tokens=tokens, temperature=0,
            extra_args={"kv_transfer_params": {"lmc": lmc}},
        )  # fmt: skip
        engine.add_request(name, {"prompt_token_ids": list(ids), "cache_salt": salt}, params)

    if arm not in ("alone", "plain"):
        for i, document in enumerate(corpus_of(rag, samples, tokenizer)):
            spans = [list(span) for span in document.spans]
            add(f"document {i}", document.token_ids, 1, {"chunks": spans})
            while engine.has_unfinished_requests():
                engine.step()
        drain(llm)
        side.admission._rows = BUDGET if arm == "none" else int(arm)
    for i in range(options.decoding):
        ids = tokenizer.encode(f"Of {seed} {i} there is this to say: ")
        add(f"decoding {i}", ids, DECODED, {"enabled": False})
    times: dict[str, list[float]] = {}
    begun, moved, added = 0.0, 0, False
    while engine.has_unfinished_requests():
        if not added and all(len(times.get(f"decoding {i}", [])) >= 16
                             for i in range(options.decoding)):  # fmt: skip
            added, begun = True, time.perf_counter()
            if arm != "alone":
                for i, sample in enumerate(samples):
                    spans = [list(span) for span in sample.reusable]
                    blends = {"chunks": spans, "blend": strategy, "save": False}
                    lmc = {"enabled": False} if arm == "plain" else blends
                    add(f"prompt {i}", sample.prompt.token_ids, 2, lmc)
        for output in engine.step():
            times.setdefault(output.request_id, []).append(time.perf_counter())
            if output.finished and output.request_id.startswith("prompt") and arm != "plain":
                moved += output.kv_transfer_params["lmc"]["kinds"]["moved"]
    gaps = [np.diff([t for t in times[f"decoding {i}"] if t >= begun - 0.5])
            for i in range(options.decoding)]  # fmt: skip
    firsts = sorted(t[0] - begun for name, t in times.items() if name.startswith("prompt"))
    lasts = [times[f"decoding {i}"][-1] - begun for i in range(options.decoding)]
    assert arm in ("alone", "plain") or moved > 0, "nothing was moved"
    return {
        "gap_s": max(float(g.max()) for g in gaps), "decoded_s": float(np.mean(lasts)),
        "first_s": firsts[0] if firsts else 0.0, "last_s": firsts[-1] if firsts else 0.0,
        "moved": moved,
    }  # fmt: skip


def show(rows: list[dict[str, Any]], arms: list[str]) -> None:
    """One line an arm."""
    alone = {row["round"]: row["decoded_s"] for row in rows if row["arm"] == "alone"}
    print("arm    longest gap ms        answers later by ms    first prompt ms        "
          "last prompt ms         moved")  # fmt: skip
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm]
        columns = [
            [row["gap_s"] for row in own],
            [row["decoded_s"] - alone[row["round"]] for row in own],
            [row["first_s"] for row in own],
            [row["last_s"] for row in own],
        ]
        cells = [f"{arm:6}"]
        for column in columns:
            e = bootstrap([[x] for x in column], lambda s: float(np.median(np.concatenate(s))))
            assert e is not None
            cells.append(f"{1e3 * e.value:6.0f} [{1e3 * e.low:.0f}, {1e3 * e.high:.0f}]".ljust(22))
        print(*cells, f"{np.mean([row['moved'] for row in own]):.0f}", flush=True)


if __name__ == "__main__":
    main()
