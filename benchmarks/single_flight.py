"""What it saves that servers which share a folder compute a text once: two pairs of them.

    python benchmarks/single_flight.py

Two `lmc serve` share a folder, and two more another one with `single_flight_s: 0`. Each pair is
asked the same new prompt of 1,600 tokens by two clients at once, one a server, in turn with the
other pair. Prints by pair the tokens that were computed of both prompts, and the seconds until the
first answer has begun and until both have, with bootstrap intervals; appends a row a prompt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from openai import OpenAI
from transformers import AutoTokenizer

from benchmarks.serving import ENVIRONMENT, FLAGS, strangers
from lmc.experiment.vllm.servers import lmc_serve, running
from lmc.model import exports
from lmc.results.rows import git_commit
from lmc.results.statistics import bootstrap

OUT = Path(__file__).parent / "results" / "single_flight.jsonl"
ARMS = {"waits": 10.0, "computes": 0.0}


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=10)
    options = parser.parse_args()
    model = exports.resolve(options.model)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        clients: dict[str, list[OpenAI]] = {}
        for arm, seconds in ARMS.items():
            tier = {"name": "disk", "path": f"{work}/{arm}", "capacity": "4GiB"}
            config = Path(work) / f"{arm}.json"
            config.write_text(json.dumps(
                {"memory_bytes": 1 << 30, "tiers": [tier], "single_flight_s": seconds}
            ))  # fmt: skip
            for i in range(2):
                command = [*lmc_serve(model, config), *FLAGS]
                server = stack.enter_context(
                    running(command, Path(work) / f"{arm}{i}.log", ENVIRONMENT)
                )
                clients.setdefault(arm, []).append(
                    OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
                )
        name = clients["waits"][0].models.list().data[0].id
        tokenizer = AutoTokenizer.from_pretrained(model)
        samples = [s for seed in range(16) for s in strangers(seed, tokenizer)]
        for i, sample in enumerate(samples[: options.prompts + 1]):
            for arm in sorted(ARMS, reverse=bool(i % 2)):
                row = both(clients[arm], name, list(sample.prompt.token_ids), f"{i}")
                rows += [row | {"arm": arm, "prompt": i}] if i else []  # the first warms up
        show(rows)
    where = {"benchmark": "single_flight", "time": time.time(), "commit": git_commit()}
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(where | row) + "\n" for row in rows)


def both(clients: list[OpenAI], model: str, ids: list[int], salt: str) -> dict[str, Any]:
    """One prompt, sent to both servers at once."""
    begun = time.perf_counter()

    def ask(client: OpenAI) -> tuple[float, int]:
        answer = client.completions.create(
            model=model, prompt=ids, max_tokens=1, temperature=0, extra_body={"cache_salt": salt}
        )
        kinds = answer.kv_transfer_params["lmc"]["kinds"]  # type: ignore[attr-defined]
        return time.perf_counter() - begun, kinds["new"] + kinds["recomputed"]

    with ThreadPoolExecutor(2) as pool:
        seconds, computed = zip(*pool.map(ask, clients), strict=True)
    return {"first_s": min(seconds), "both_s": max(seconds), "computed": sum(computed),
            "prompt_tokens": 2 * len(ids)}  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Medians by arm, and how much sooner both have answered where one waits."""
    arms = {arm: [r for r in rows if r["arm"] == arm] for arm in ARMS}
    for arm, some in arms.items():
        computed = sum(r["computed"] for r in some) / sum(r["prompt_tokens"] for r in some)
        first, both = (np.median([r[key] for r in some]) for key in ("first_s", "both_s"))
        print(f"{arm:9} {len(some):3} prompts twice: computed {computed:.3f} of their tokens, "
              f"first {first:.2f} s, both {both:.2f} s")  # fmt: skip
    for key in ("first_s", "both_s"):
        pairs = zip(arms["computes"], arms["waits"], strict=True)
        ratio = bootstrap([[a[key] / b[key]] for a, b in pairs],
                          lambda sample: np.median(np.concatenate(sample)))  # fmt: skip
        assert ratio is not None
        print(
            f"{key} sooner where one waits: {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        )


if __name__ == "__main__":
    main()
