"""The queue of `lmc sim` beside a server: time to first token under load, simulated and measured.

    python benchmarks/queueing.py --minutes 2

Starts a plain vLLM server without a prefix cache. Prompts of 100 to 3,000 tokens and answers of 1
to 32 come as a Poisson process, at some shares of what one client was served, each for so many
minutes. Before and behind each load requests of such lengths are sent one at a time: the two
together give the constants of a time model (least squares), since a shared machine is faster at one
time than at another. The same arrivals are simulated, one request after the other
(`lmc.sim.queueing`) and in vLLM's steps (`lmc.sim.batching`). Nothing of the load is fitted.

Prints measured and simulated times, those too of a machine that is a twentieth slower, which says
how much a queue makes of little, and appends a row a request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from openai import AsyncOpenAI
from serving import ENVIRONMENT, ask

from lmc.experiment.vllm.servers import running, vllm_serve
from lmc.model import exports
from lmc.model.times import TTFTModel, prefill_work
from lmc.results.rows import cpu_name, git_commit
from lmc.sim.batching import Batch, Work, simulate_steps
from lmc.sim.queueing import Queue, simulate

OUT = Path(__file__).parent / "results" / "queueing.jsonl"
SHARES = (0.5, 0.9)  # of the rate at which one client was served
LENGTHS, ANSWERS = (100, 3000), (1, 32)  # tokens
SINGLE = 12  # requests, one at a time, before and behind each load
SLOWER = 1.05
BATCH = Batch(max_num_seqs=16, max_num_batched_tokens=2048)
FLAGS = (
    "--dtype", "float32", "--max-model-len", "4096", "--no-enable-prefix-caching",
    "--max-num-batched-tokens", str(BATCH.max_num_batched_tokens),
    "--max-num-seqs", str(BATCH.max_num_seqs),
)  # fmt: skip
Asked = tuple[int, int]  # tokens of the prompt, of the answer


async def answered(
    client: AsyncOpenAI, model: str, asked: Asked, rng: random.Random
) -> tuple[float, float]:
    """Seconds to the first token, and of the whole answer, of a prompt of random tokens."""
    ids = [rng.randrange(1000, 40_000) for _ in range(asked[0])]
    first, wall, _ = await ask(client, model, ids, {}, asked[1])
    return first, wall


def fitted(asked: list[Asked], took: np.ndarray) -> TTFTModel:
    """The time model of requests that ran alone; took: [R, 2] seconds."""
    rows, pairs = prefill_work([T for T, _ in asked], 0)
    # Relative errors, or the longest prompts would be all that counts.
    columns = np.stack([np.ones(len(rows)), rows, pairs], 1) / took[:, :1]
    fixed, per_row, per_pair = np.linalg.lstsq(columns, np.ones(len(rows)), rcond=None)[0]
    behind = np.array([n - 1 for _, n in asked])
    some = behind > 0
    per_token = np.median((took[some, 1] - took[some, 0]) / behind[some])
    constants = (max(float(x), 0.0) for x in (fixed, per_row, per_pair))
    return TTFTModel(*constants, bytes_per_token=1, tiers=(), per_output_token_s=float(per_token))


def slower(times: TTFTModel) -> TTFTModel:
    """The same of a machine that takes longer for everything."""
    seconds = ("fixed_s", "per_row_s", "per_pair_s", "per_output_token_s")
    return replace(times, **{name: getattr(times, name) * SLOWER for name in seconds})


def draw(rng: random.Random) -> Asked:
    """A request; lengths are spread evenly on a log scale."""
    low, high = np.log(LENGTHS)
    return round(np.exp(rng.uniform(low, high))), rng.randint(*ANSWERS)


async def load(
    client: AsyncOpenAI, model: str, asked: list[Asked], at: np.ndarray, rng: random.Random
) -> np.ndarray:
    """[R, 2] seconds of requests that come at `at`."""
    begun = time.perf_counter()

    async def one(when: float, what: Asked) -> tuple[float, float]:
        await asyncio.sleep(max(0.0, when - (time.perf_counter() - begun)))
        return await answered(client, model, what, rng)

    return np.array(await asyncio.gather(*map(one, at.tolist(), asked)))


def show(name: str, ttft_s: np.ndarray, measured: np.ndarray) -> None:
    """One line of times, and the median of what they are of those that were measured."""
    p50, p90, p95 = np.percentile(ttft_s, [50, 90, 95])
    print(f"  {name:24} p50 {p50:6.2f}  p90 {p90:6.2f}  p95 {p95:6.2f}  mean {ttft_s.mean():6.2f}  "
          f"a request {np.median(ttft_s / measured):5.2f}")  # fmt: skip


async def measure(url: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of all requests of the load."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    model = (await client.models.list()).data[0].id
    rng = random.Random(options.seed)
    for _ in range(3):
        await answered(client, model, (2000, 8), rng)

    async def one_by_one() -> tuple[list[Asked], np.ndarray]:
        some = [draw(rng) for _ in range(SINGLE)]
        return some, np.array([await answered(client, model, what, rng) for what in some])

    before, took = await one_by_one()
    rate = len(before) / took[:, 1].sum()
    rows: list[dict[str, object]] = []
    for share in options.shares:
        R = round(60 * options.minutes * share * rate)
        asked = [draw(rng) for _ in range(R)]
        at = np.cumsum([rng.expovariate(share * rate) for _ in asked])
        measured = await load(client, model, asked, at - at[0], rng)
        behind, then = await one_by_one()
        times = fitted(before + behind, np.concatenate([took, then]))
        before, took = behind, then
        print(times)
        T, outputs = (np.array(x) for x in zip(*asked, strict=True))
        work = Work(*prefill_work(T, 0), np.zeros(R), T, outputs)
        full = times.seconds(work.rows, work.pairs, np.zeros((R, 0)))
        after = times.per_output_token_s * (outputs - 1)
        simulated: dict[str, Queue] = {
            "one_after_the_other": simulate(at, full, T, after_first_s=after),
            "in_steps": simulate_steps(at, work, times, BATCH),
            "in_steps_slower": simulate_steps(at, work, slower(times), BATCH),
        }
        print(f"{share:.2f} of {rate:.2f} requests a second, {R} requests, seconds:")
        show("measured", measured[:, 0], measured[:, 0])
        for name, queue in simulated.items():
            show(name.replace("_", " "), queue.ttft_s, measured[:, 0])
        rows += [
            {
                "share": share, "at_s": float(at[i]), "prompt_tokens": int(T[i]),
                "output_tokens": int(outputs[i]), "ttft_s": float(measured[i, 0]),
                "wall_s": float(measured[i, 1]),
                **{name: float(q.ttft_s[i]) for name, q in simulated.items()},
            }
            for i in range(R)
        ]  # fmt: skip
    return rows


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=2.0, help="of each load")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    command = [*vllm_serve(exports.resolve(options.model)), *FLAGS]
    with (
        tempfile.TemporaryDirectory() as work,
        running(command, Path(work) / "server.log", ENVIRONMENT) as server,
    ):
        rows = asyncio.run(measure(server.url, options))
    about = {"benchmark": "queueing", "time": time.time(), "cpu": cpu_name()}
    about["commit"] = git_commit()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as out:
        out.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
