"""`lmc plan`: from a trace to how much memory, what it finds, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.errors import errors_in_one_line
from lmc.cli.options import (
    AsJson,
    Format,
    KVDtype,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    Model,
    RateScale,
    Servers,
    Strict,
    Times,
    Tokenizer,
    Trace,
    batch_of,
)

if TYPE_CHECKING:
    from lmc.sim.planning import Plan


def plan(
    trace: Trace,
    target: Annotated[str, typer.Option(help="Share of what can be found, such as 80%.")] = "80%",
    model: Model = "llama-3.1-8b",
    kv_dtype: KVDtype = None,
    tokenizer: Tokenizer = None,
    chunker: Annotated[
        str, typer.Option(help="Cuts what is found anywhere, as in lmc reuse.")
    ] = "cdc:64",
    policy: Annotated[
        str, typer.Option(help="Policies beside LRU, such as sieve,arc,belady.")
    ] = "",
    tiers: Annotated[
        str | None, typer.Option(help="Sizes, the first asked first, such as 64GiB+1TiB.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Of vLLM's own cache in front, such as 16GiB: rates are what is found beyond it."
        ),
    ] = None,
    profile: Times = None,
    servers: Servers = 1,
    rate_scale: RateScale = 1.0,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    blend: Annotated[
        str, typer.Option(help="With --profile: the strategy by which moved chunks are mended.")
    ] = "epic",
    plot: Annotated[Path | None, typer.Option(help="Draw both curves into this file.")] = None,
    format: Format = "auto",
    strict: Strict = False,
    json: AsJson = False,
) -> None:
    """Say how much memory finds a share of what can be found, as prefix and at any position.

    For example: lmc plan trace.jsonl --target 80% --model llama-3.1-8b --plot plan.png
    """
    with errors_in_one_line("sim"):
        from lmc.chunking import CHUNKERS
        from lmc.cli.output import bar_of_bytes, check_plot, print_bad_lines, print_json
        from lmc.model.gpus import times_for
        from lmc.model.shape import shape
        from lmc.policies import POLICIES
        from lmc.quality import BLENDS
        from lmc.sim.planning import plan as planned
        from lmc.sim.readers import read
        from lmc.sizes import parse_bytes

        wanted = share(target)
        batch = batch_of(max_num_seqs, max_num_batched_tokens)
        check_plot(plot)
        sizes = [parse_bytes(part) for part in tiers.split("+")] if tiers else []
        others = POLICIES.split(policy) if policy else []
        # What is wrong is told before the trace is read.
        CHUNKERS.build(chunker)
        sized = shape(model)
        times = times_for(profile, sized, kv_dtype, model) if profile else None
        with bar_of_bytes(trace, json) as tell:
            reading = read(trace, format, tokenizer=tokenizer, strict=strict, tell=tell)
            requests = list(reading)
        done = planned(
            requests,
            target=wanted,
            model=model,
            dtype=kv_dtype,
            chunker=chunker,
            spans=CHUNKERS.parse(chunker)["name"] == "explicit",
            policies=others,
            tiers=sizes,
            times=times,
            servers=servers,
            rate_scale=rate_scale,
            batch=batch,
            engine_bytes=parse_bytes(engine) if engine else 0,
            blend=BLENDS.build(blend),
        )
        if json:
            parts = {p: getattr(done, p) for p in ("targets", "policies", "tiers", "ttft_s")}
            about = {"trace": trace.name, "model": model, "requests": done.requests}
            answer = {"answer": done.sentence(), "prompt_tokens": done.reach.tokens}
            answer |= {"engine_rate": done.reach.engine, "times": done.times or None}
            print_json(about | answer | parts)
        else:
            _print(trace, done)
        print_bad_lines(reading)
        if plot is not None:
            from lmc.plots import memory_curves

            memory_curves(done, trace.name).savefig(plot, dpi=150)


def share(text: str) -> float:
    """80% or 0.8 -> 0.8; ValueError for anything else, or outside (0, 100%]."""
    try:
        found = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        raise ValueError(f"target: got {text!r}, want a share such as 80%, at most 100%")
    return found


def _print(trace: Path, done: Plan) -> None:
    from lmc.cli.output import plain, show, table

    typer.echo(done.sentence())
    for title, columns, rows in tables(done, trace.name):
        shown = table(plain(title), columns)
        for cells in rows:
            shown.add_row(*cells)
        show(shown)


def tables(done: Plan, name: str) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and cells of each table of a plan for the trace `name`."""
    anywhere = done.reach.anywhere is not None
    names = ["of all that", "prefix GiB", "found"]
    names += ["anywhere GiB", "found", "exact", "moved"] if anywhere else []
    rows = []
    for row in done.targets:
        cells = [f"{row['share']:.0%}", _gib(row["prefix_bytes"]), _percent(row["prefix_rate"])]
        if anywhere:
            cells += [_gib(row["anywhere_bytes"])]
            cells += [_percent(row[k]) for k in ("anywhere_rate", "exact_rate", "moved_rate")]
        rows.append(cells)
    yield (
        f"{name}: {done.requests:,} requests, {done.reach.tokens:,} prompt tokens, KV of "
        f"{done.model}, LRU",
        names,
        rows,
    )
    for title, part in (
        (f"Other policies, with the memory of LRU at {done.target:.0%}", done.policies),
        ("Tiers, each taking what the one before evicts", done.tiers),
        (f"Time to first token, waiting included: {done.times}", done.ttft_s),
    ):
        if part:
            yield title, *_cells(part)


def _cells(part: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Column names and cells of rows of one kind."""
    names = list(part[0])
    heads = [n.replace("bytes", "GiB").replace("_rate", " found") for n in names]
    heads = [f"{n} s" if n in ("p50", "p90", "p99") else n for n in heads]

    def cell(name: str, value: Any) -> str:
        if name == "bytes":
            return _gib(value)
        if name.endswith("rate"):
            return _percent(value)
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    return heads, [[cell(name, row[name]) for name in names] for row in part]


def _gib(n: float) -> str:
    return f"{n / 2**30:,.0f}" if n >= 100 * 2**30 else f"{n / 2**30:.3g}"


def _percent(share: float) -> str:
    return f"{share:.1%}"
