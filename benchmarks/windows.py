"""What is loaded of a model with sliding windows, beside one of its shape without them.

    lmc model export gemma3-270m
    python benchmarks/windows.py

One engine in this process, prefix caching on, its cache reset before each request. Documents of a
prompt are stored first, each alone. Then, in turn: the prompt by vLLM alone, its documents in
another order with nothing recomputed (`moved`), and a prompt that was computed before (`exact`).
Bytes are what the worker counts as it loads out of host memory. Prints medians, and appends a row a
request.
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

OUT = Path(__file__).parent / "results" / "windows.jsonl"
HEAD, DOCUMENTS = 64, 8


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument("--rounds", type=int, default=5, help="of each length")
    options = parser.parse_args()
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    longest = max(options.tokens) + HEAD + 64
    lmc = {"memory_bytes": 6 << 30, "context": "any", "uncalibrated": "allow", "min_recovery": None}
    llm = started(
        options.model, lmc, max_model_len=longest, max_num_batched_tokens=2048, enforce_eager=True
    )
    worker = get_kv_transfer_group()._worker  # type: ignore[attr-defined]
    whole, loaded = worker.layout.bytes_per_token, [0]
    take = worker.take_stats

    def taken() -> Any:
        """What each step counted, on its way to vLLM."""
        stats = take()
        loaded[0] += stats.data.get("counts", {}).get("bytes_loaded:host", 0)
        return stats

    worker.take_stats = taken

    def ask(parts: list[list[int]], **said: Any) -> tuple[float, dict[str, Any]]:
        loaded[0] = 0
        ends = np.cumsum([len(part) for part in parts]).tolist()
        said |= {"chunks": [list(s) for s in zip([0, *ends[:-1]], ends, strict=True)]}
        sampling = SamplingParams(
            max_tokens=1, temperature=0, extra_args={"kv_transfer_params": {"lmc": said}}
        )
        assert llm.reset_prefix_cache()
        ids = [i for part in parts for i in part]
        begun = time.perf_counter()
        (answer,) = llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begun
        worker.finish_saves()
        return seconds, answer.kv_transfer_params["lmc"]  # type: ignore[index]

    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for T in options.tokens:
        for i in range(-1, options.rounds):  # the first one warms up
            n = [HEAD, *[T // DOCUMENTS] * DOCUMENTS]
            head, *documents = (rng.integers(1000, 40_000, size).tolist() for size in n)
            for document in documents:
                ask([head, document])
            for arm in ("plain", "moved", "exact"):
                if arm == "exact":
                    ask([head, *documents], blend="prefix")
                order = documents[::-1] if arm != "exact" else documents
                said = (
                    {"enabled": False}
                    if arm == "plain"
                    else {"blend": "full_reuse" if arm == "moved" else "prefix"}
                )
                seconds, report = ask([head, *order, [7]], save=False, **said)
                tokens = {k: v for k, v in report["kinds"].items() if v}
                row = {"tokens": T + HEAD, "arm": arm, "seconds": seconds, "kinds": tokens}
                row["loaded"] = loaded[0]
                rows += [row] if i >= 0 else []
        show([row for row in rows if row["tokens"] == T + HEAD], whole)
    where = {"benchmark": "windows", "time": time.time(), "commit": git_commit(),
             "model": options.model, "bytes_per_token": whole}  # fmt: skip
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(where | row) + "\n" for row in rows)


def show(rows: list[dict[str, Any]], whole: int) -> None:
    """Medians of one length; `whole` are the KV bytes of a token in all layers."""
    T = rows[0]["tokens"]
    print(f"{T:,} tokens; stored {whole:,} bytes a token, and so much a model without windows "
          "would load")  # fmt: skip
    for arm in dict.fromkeys(row["arm"] for row in rows):
        some = [row for row in rows if row["arm"] == arm]
        loaded, seconds = (
            float(np.median([r[key] for r in some])) for key in ("loaded", "seconds")
        )
        print(f"  {arm:6} {seconds:7.3f} s, {loaded / T:9,.0f} bytes loaded a token, "
              f"{loaded / T / whole:.3f} of that; {some[0]['kinds']}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
