"""An exact repeat out of host memory, beside vLLM's own hit and what the copy alone would take.

    python benchmarks/repeat.py

One engine in this process, prefix caching on. Each prompt is asked; then, in turn, again as it is
(vLLM's own hit), and again once vLLM's cache was reset, so that lmc brings it. `bound` is the first
of them and, measured in between, the copy of as many bytes by memcpy out of memory that is not in
the processor's caches. Prints medians and the ratio of the second to the bound with a bootstrap
interval, and appends a row a pair.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from engine import started

from lmc.results.rows import git_commit
from lmc.results.statistics import bootstrap

OUT = Path(__file__).parent / "results" / "repeat.jsonl"


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1600, 4000])
    parser.add_argument("--pairs", type=int, default=8, help="of each length")
    options = parser.parse_args()
    from vllm import SamplingParams

    lmc = {"memory_bytes": 3 << 30}
    llm = started(options.model, lmc, max_model_len=8192, max_num_batched_tokens=4096)

    def ask(ids: list[int]) -> tuple[float, dict[str, int]]:
        begun = time.perf_counter()
        (answer,) = llm.generate(
            {"prompt_token_ids": ids}, SamplingParams(max_tokens=1), use_tqdm=False
        )
        seconds = time.perf_counter() - begun
        return seconds, answer.kv_transfer_params["lmc"]["kinds"]  # type: ignore[index]

    hf = llm.model_config.hf_text_config
    head = hf.hidden_size // hf.num_attention_heads
    per_token = hf.num_hidden_layers * 2 * hf.num_key_value_heads * head * 4
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for T in options.tokens:
        for i in range(-1, options.pairs):  # the first one warms up
            ids = rng.integers(1000, 40_000, T).tolist()
            ask(ids)
            while llm.llm_engine.has_unfinished_requests():
                pass
            time.sleep(0.5)
            row: dict[str, Any] = {"tokens": T}
            for arm in ("local", "lmc") if i % 2 else ("lmc", "local"):
                if arm == "lmc":
                    assert llm.reset_prefix_cache()
                row[f"{arm}_s"], kinds = ask(ids)
                # What vLLM's own hit lacks, the rest of a block, lmc brings in both.
                found = "exact" if arm == "lmc" else "local"
                assert kinds["new"] <= 32 and kinds[found] >= T - 129, kinds
            row["bytes"] = (T - 1) * per_token
            row["memcpy_s"] = memcpy(row["bytes"])
            rows += [row] if i >= 0 else []
        show([row for row in rows if row["tokens"] == T])
    where = {"benchmark": "repeat", "time": time.time(), "commit": git_commit()}
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(where | row) + "\n" for row in rows)


def memcpy(nbytes: int) -> float:
    """Seconds of a copy into memory that is there already."""
    source, to = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)  # with all of their pages
    np.ones(64 << 20, np.uint8).sum()  # what was in the caches is not any more
    begun = time.perf_counter()
    np.copyto(to, source)
    return time.perf_counter() - begun


def show(rows: list[dict[str, Any]]) -> None:
    """Medians of one length, and the ratio to what is possible."""
    local, lmc, copy = (
        float(np.median([row[key] for row in rows])) for key in ("local_s", "lmc_s", "memcpy_s")
    )
    ratios = [[row["lmc_s"] / (row["local_s"] + row["memcpy_s"])] for row in rows]
    ratio = bootstrap(ratios, lambda sample: np.median(np.concatenate(sample)))
    assert ratio is not None
    print(f"{rows[0]['tokens']:6} tokens, {rows[0]['bytes'] / 1e6:.0f} MB: vLLM's own hit "
          f"{1e3 * local:.1f} ms, memcpy {1e3 * copy:.1f} ms, lmc {1e3 * lmc:.1f} ms: "
          f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] of both", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
