"""What it costs to place a claim's chunks, beside what vLLM takes to hash the same prompt's blocks.

    python benchmarks/placement.py

All of a prompt is moved chunks in host memory, in any order, each turned by a delta of its own: the
most there is to place. Timed is all that a worker does to find them and put them into pages, less
the movement of their bytes, which is timed by itself in the same round. vLLM hashes a prompt of
that length, in blocks of 16, in the same process. Printed are medians over the rounds, of the
process's own time, and the slope of placement over tokens, both as logarithms: 1 is linear. A row a
length is appended to benchmarks/results.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from lmc.connectors.vllm.loading import Placement, Target, find
from lmc.connectors.vllm.messages import ChunkLoad
from lmc.kernels.host import scatter_runs_host
from lmc.kernels.paged import PagedKV
from lmc.model.layout import KVLayout
from lmc.model.rope import Rope, Rotations
from lmc.results.rows import git_commit
from lmc.store.chunks import Chunks

OUT = Path(__file__).parent / "results" / "placement.jsonl"
TOKENS = (8192, 32768, 131072)
LAYOUT = KVLayout(L=1, G=1, D=128, dtype="float32")  # as many angles as a model, but few bytes
P = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--chunk", type=int, default=33, help="tokens of a chunk")
    options = parser.parse_args()
    hash_fn = get_hash_fn_by_name("sha256")
    init_none_hash(hash_fn)
    hasher = get_request_block_hasher(P, hash_fn)
    print(f"{'tokens':>8}{'chunks':>8}{'placement, ms':>15}{'hashing, ms':>13}{'ratio':>7}")
    rows = []
    for tokens in TOKENS:
        claim = Claimed(tokens, options.chunk)
        ids = np.random.default_rng(1).integers(0, 128_000, tokens).tolist()
        request = Request("r", ids, SamplingParams(max_tokens=1), None)
        assert len(hasher(request)) == tokens // P
        taken = []
        for i in range(options.rounds + 1):
            gc.collect()
            placing, moving = claim.place()
            hashing = timed(hasher, request)
            if i:  # the first one compiles
                taken.append((placing - moving, moving, hashing))
        placement, moving, hashing = (1000 * float(x) for x in np.median(taken, axis=0))
        ratio = placement / hashing
        print(f"{tokens:8}{len(claim.loads):8}{placement:15.2f}{hashing:13.2f}{ratio:7.2f}")
        rows.append(
            {
                "benchmark": "placement", "commit": git_commit(), "tokens": tokens,
                "chunks": len(claim.loads), "placement_ms": placement, "movement_ms": moving,
                "hashing_ms": hashing, "ratio": ratio,
            }
        )  # fmt: skip
    logs = np.log([[row["tokens"], row["placement_ms"]] for row in rows]).T
    print(f"slope {np.polyfit(*logs, 1)[0]:.2f}")
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


class Claimed:
    """Chunks in host memory, and a prompt of them in pages anywhere."""

    def __init__(self, tokens: int, chunk: int) -> None:
        n, N = tokens // chunk, 1 + -(-tokens // P)
        rng = np.random.default_rng(0)
        self.chunks = Chunks(LAYOUT, tokens * LAYOUT.bytes_per_token, populate=True)
        for slot in range(n):
            self.chunks.reserve(slot, chunk)
            self.chunks.memory.publish(slot)
        self.loads = [
            ChunkLoad(slot, i * chunk, (i + 1) * chunk, i * chunk, chunk, (i - slot) * chunk)
            for i, slot in enumerate(rng.permutation(n).tolist())
        ]
        self.blocks = rng.permutation(N - 1) + 1
        k, v = torch.zeros(2, N, P, LAYOUT.G, LAYOUT.D).unbind()
        self.pages = PagedKV((k,), (v,))
        rope = Rope(np.logspace(0, -4, LAYOUT.D // 2), False, "default")
        self.rope = Rotations((rope,), (0,) * LAYOUT.L)

    def place(self) -> tuple[float, float]:
        """Seconds to place them as a worker does, and what their bytes alone take of it."""
        start = time.process_time()
        found = find(self.chunks, self.loads, layered=True, deadline=0.0)
        target = Target([self.blocks], self.pages, self.rope)
        placement = Placement(found.held, self.chunks.memory, target)
        placement.put()
        taken = time.process_time() - start
        assert len(found.held) == len(self.loads)
        (part,) = placement.parts
        where = (part.slots, part.runs, placement.cos, placement.sin)
        moving = timed(
            lambda: scatter_runs_host(
                placement.buffer, self.pages, *where, interleaved=False, layers=(0, LAYOUT.L)
            )
        )
        return taken, moving


def timed(call: Callable[..., object], *given: object) -> float:
    """Seconds of this process that a call takes."""
    start = time.process_time()
    call(*given)
    return time.process_time() - start


if __name__ == "__main__":
    main()
