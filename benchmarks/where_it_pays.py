"""Where reuse at any position pays: what a prefix cache finds, what moving adds, at what memory.

    python benchmarks/where_it_pays.py --out benchmarks/results/where_it_pays.jsonl

One row a workload: each generator of `lmc.sim.synthetic` as it comes, whose true shares are known,
and traces that are given (`--trace NAME=PATH`, with `--tokenizer` if they are text). Draws
docs/where_it_pays.png from the rows. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmc import plots
from lmc.results.rows import git_commit
from lmc.sim.planning import plan
from lmc.sim.readers import read
from lmc.sim.synthetic import GENERATORS, Truth
from lmc.sim.trace import Request

OUT = Path(__file__).parent / "results" / "where_it_pays.jsonl"
FIGURE = Path(__file__).parents[1] / "docs" / "where_it_pays.png"
TARGET = 0.8


def row_of(name: str, requests: list[Request], model: str, truth: Truth | None) -> dict[str, Any]:
    """What a plan says, as plain values."""
    found = plan(requests, target=TARGET, model=model)
    at = next(row for row in found.targets if row["share"] == TARGET)
    reach = found.reach
    return {
        "workload": name,
        "made": truth is not None,
        "requests": len(requests),
        "prompt_tokens": reach.tokens,
        "model": model,
        "target": TARGET,
        "prefix": reach.prefix.infinite,
        "exact": reach.exact.infinite if reach.exact else None,
        "anywhere": reach.anywhere.infinite if reach.anywhere else None,
        "truth": truth.shares if truth else None,
        **{k: v for k, v in at.items() if k != "share"},
        "commit": git_commit(),
    }


def rows(traces: list[str], tokenizer: str | None, model: str) -> Iterator[dict[str, Any]]:
    """Of all generators, then of the traces."""
    for name in GENERATORS.names():
        truth = Truth()
        requests = list(truth.watch(GENERATORS.build(name).requests()))
        yield row_of(name, requests, model, truth)
    for trace in traces:
        name, _, path = trace.partition("=")
        yield row_of(name, list(read(path, tokenizer=tokenizer)), model, None)


def main() -> None:
    """Compute, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--trace", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--tokenizer")
    parser.add_argument("--model", default="llama-3.1-8b")
    options = parser.parse_args()
    found = []
    for row in rows(options.trace, options.tokenizer, options.model):
        found.append(row)
        anywhere = "-" if row["anywhere"] is None else f"{row['anywhere']:.1%}"
        print(f"{row['workload']:10} prefix {row['prefix']:.1%}  anywhere {anywhere}", flush=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in found))
    plots.where_it_pays(found).savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
