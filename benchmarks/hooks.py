"""What lmc's hooks take of a prefill's processor time where there is nothing to reuse.

    python benchmarks/hooks.py

One engine in this process, prefix caching on, is asked prompts of which nothing is known. The
connector's methods that vLLM calls are timed by the clock of their thread's processor; what lmc's
own threads take (copies into host memory, the store behind it) is told apart. Prints both as shares
of the processor time that the whole process took for the prompt, medians with bootstrap intervals,
and appends a row a prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from engine import started

from lmc.results.rows import git_commit
from lmc.results.statistics import bootstrap

OUT = Path(__file__).parent / "results" / "hooks.jsonl"


class Clock:
    """Seconds of the processor within the connector's methods, as deep as they call each other."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            self._depth += 1
            start = time.thread_time()
            try:
                return method(*arguments, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.thread_time() - start

        return timed


@contextmanager
def timed_methods(clock: Clock) -> Iterator[None]:
    """All that vLLM calls of the connector."""
    from lmc.connectors.vllm import LMCConnector

    names = [n for n, m in vars(LMCConnector).items() if callable(m) and not n.startswith("__")]
    before = {name: getattr(LMCConnector, name) for name in names}
    for name, method in before.items():
        if not isinstance(vars(LMCConnector)[name], (classmethod, staticmethod)):
            setattr(LMCConnector, name, clock.around(method))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(LMCConnector, name, method)


def own_threads() -> float:
    """Seconds of the processor that lmc's own threads have taken so far."""
    tick = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for thread in threading.enumerate():
        if thread.name.startswith("lmc") and thread.native_id is not None:
            stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
            fields = stat.rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1600, 4000])
    parser.add_argument("--prompts", type=int, default=8, help="of each length")
    options = parser.parse_args()
    from vllm import SamplingParams

    clock = Clock()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work, timed_methods(clock):
        tier = {"name": "disk", "path": f"{work}/kv", "capacity": "8GiB"}
        lmc = {"memory_bytes": 2 << 30, "tiers": [tier]}
        llm = started(options.model, lmc, max_model_len=8192, max_num_batched_tokens=2048)
        rng = np.random.default_rng(0)
        for T in options.tokens:
            for i in range(-1, options.prompts):  # the first one warms up
                ids = rng.integers(1000, 40_000, T).tolist()
                begun, own, clock.seconds = time.process_time(), own_threads(), 0.0
                llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1),
                             use_tqdm=False)  # fmt: skip
                taken = time.process_time() - begun
                threads = own_threads() - own
                if i >= 0:
                    rows.append({"tokens": T, "hooks_s": clock.seconds, "threads_s": threads,
                                 "process_s": taken})  # fmt: skip
                time.sleep(1.0)  # what goes to the tier is not the next prompt's
            show([row for row in rows if row["tokens"] == T])
    where = {"benchmark": "hooks", "time": time.time(), "commit": git_commit()}
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(where | row) + "\n" for row in rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Shares of one length."""
    cells = [f"{rows[0]['tokens']:6} tokens, {len(rows)} prompts:"]
    for part in ("hooks_s", "threads_s"):
        shares = [[row[part] / (row["process_s"] - row["threads_s"])] for row in rows]
        share = bootstrap(shares, lambda sample: np.median(np.concatenate(sample)))
        assert share is not None
        seconds = np.median([row[part] for row in rows])
        cells.append(f"{part} {1e3 * seconds:.1f} ms, {100 * share.value:.2f}% "
                     f"[{100 * share.low:.2f}, {100 * share.high:.2f}]")  # fmt: skip
    print("  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
