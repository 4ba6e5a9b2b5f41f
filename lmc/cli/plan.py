"""`lmc plan`: from a trace to how much memory, what it finds, and what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.errors import errors_in_one_line

if TYPE_CHECKING:
    from lmc.sim.planning import Plan


def plan(
    trace: Annotated[Path, typer.Argument(help="A trace with block ids, token ids or text.")],
    target: Annotated[str, typer.Option(help="Share of what can be found, such as 80%.")] = "80%",
    model: Annotated[
        str,
        typer.Option(help="Says the bytes of a token: a known name, a config.json or its folder."),
    ] = "llama-3.1-8b",
    kv_dtype: Annotated[
        str | None, typer.Option(help="Of the KV, default the model's own.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="For text: a tokenizer.json, or a folder that holds one.")
    ] = None,
    chunker: Annotated[
        str, typer.Option(help="Cuts what is found anywhere, as in lmc reuse.")
    ] = "cdc:64",
    policy: Annotated[
        str, typer.Option(help="Policies beside LRU, such as sieve,arc,belady.")
    ] = "",
    tiers: Annotated[
        str | None, typer.Option(help="Sizes, the first asked first, such as 64GiB+1TiB.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="A time model that `lmc fit` wrote: adds TTFT under load.")
    ] = None,
    servers: Annotated[int, typer.Option(help="With --profile: engines behind one queue.")] = 1,
    rate_scale: Annotated[
        float, typer.Option(help="With --profile: how many times faster requests come.")
    ] = 1.0,
    blend: Annotated[
        str, typer.Option(help="With --profile: the strategy by which moved chunks are mended.")
    ] = "epic",
    plot: Annotated[Path | None, typer.Option(help="Draw both curves into this file.")] = None,
    format: Annotated[str, typer.Option(help="The trace's format, if it cannot be told.")] = "auto",
    strict: Annotated[bool, typer.Option(help="Stop at the first bad line.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say how much memory finds a share of what can be found, as prefix and at any position.

    For example: lmc plan trace.jsonl --target 80% --model llama-3.1-8b --plot plan.png
    """
    with errors_in_one_line("sim"):
        from lmc.chunking import CHUNKERS
        from lmc.cli.output import bar_of_bytes, check_plot, print_bad_lines, print_json
        from lmc.model.shape import shape
        from lmc.model.times import load
        from lmc.policies import POLICIES
        from lmc.quality import BLENDS
        from lmc.sim.planning import plan as planned
        from lmc.sim.readers import read
        from lmc.sizes import parse_bytes

        share = _share(target)
        check_plot(plot)
        sizes = [parse_bytes(part) for part in tiers.split("+")] if tiers else []
        times = None if profile is None else load(profile)
        others = POLICIES.split(policy) if policy else []
        # What is wrong is told before the trace is read.
        CHUNKERS.build(chunker)
        shape(model)
        with bar_of_bytes(trace, json) as tell:
            reading = read(trace, format, tokenizer=tokenizer, strict=strict, tell=tell)
            requests = list(reading)
        done = planned(
            requests,
            target=share,
            model=model,
            dtype=kv_dtype,
            chunker=chunker,
            spans=CHUNKERS.parse(chunker)["name"] == "explicit",
            policies=others,
            tiers=sizes,
            times=times,
            servers=servers,
            rate_scale=rate_scale,
            blend=BLENDS.build(blend),
        )
        if json:
            parts = {p: getattr(done, p) for p in ("targets", "policies", "tiers", "ttft_s")}
            about = {"trace": trace.name, "model": model, "requests": done.requests}
            answer = {"answer": done.sentence(), "prompt_tokens": done.reach.tokens}
            print_json(about | answer | parts)
        else:
            _print(trace, done)
        print_bad_lines(reading)
        if plot is not None:
            from lmc.plots import memory_curves

            memory_curves(done, trace.name).savefig(plot, dpi=150)


def _share(text: str) -> float:
    """80% or 0.8 -> 0.8; ValueError for anything else, or outside (0, 100%]."""
    try:
        share = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"target: got {text!r}, want a share such as 80%, at most 100%")
    return share


def _print(trace: Path, done: Plan) -> None:
    from lmc.cli.output import print_table

    typer.echo(done.sentence())
    anywhere = done.reach.anywhere is not None
    title = (
        f"{trace.name}: {done.requests:,} requests, {done.reach.tokens:,} prompt tokens, KV of "
        f"{done.model}, LRU"
    )
    names = ["of all that", "prefix GiB", "found"]
    names += ["anywhere GiB", "found", "exact", "moved"] if anywhere else []
    rows = []
    for row in done.targets:
        cells = [f"{row['share']:.0%}", _gib(row["prefix_bytes"]), _percent(row["prefix_rate"])]
        if anywhere:
            cells += [_gib(row["anywhere_bytes"])]
            cells += [_percent(row[k]) for k in ("anywhere_rate", "exact_rate", "moved_rate")]
        rows.append(cells)
    print_table(title, names, rows)
    for title, part in (
        (f"Other policies, with the memory of LRU at {done.target:.0%}", done.policies),
        ("Tiers, each taking what the one before evicts", done.tiers),
        ("Time to first token, waiting included", done.ttft_s),
    ):
        if part:
            print_table(title, *_cells(part))


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
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return heads, [[cell(name, row[name]) for name in names] for row in part]


def _gib(n: float) -> str:
    return f"{n / 2**30:,.0f}" if n >= 100 * 2**30 else f"{n / 2**30:.3g}"


def _percent(share: float) -> str:
    return f"{share:.1%}"
