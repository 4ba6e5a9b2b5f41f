"""`lmc sim`: hit rates of a trace by policy and capacity, and what they are worth in time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lmc.cli.errors import errors_in_one_line

if TYPE_CHECKING:
    from rich.table import Table

    from lmc.model.times import TTFTModel
    from lmc.sim.sweep import Metric, Outcome
    from lmc.sim.trace import Request

CAPACITIES = {
    "blocks": "1k,10k,100k,inf",
    "tokens": "1M,10M,100M,inf",
    "bytes": "1GiB,16GiB,256GiB,inf",
}


def sim(
    trace: Annotated[Path, typer.Argument(help="A trace with block ids, token ids or text.")],
    policy: Annotated[str, typer.Option(help="One or more, such as lru,belady,ttl:600.")] = "lru",
    capacity: Annotated[
        str | None,
        typer.Option(
            help="One or more, such as 1k,64GiB,inf; + between tiers, such as 1k+50k; or all: "
            "LRU at every capacity in one pass. Default: some, by unit."
        ),
    ] = None,
    unit: Annotated[
        Literal["blocks", "tokens", "bytes"], typer.Option(help="Of capacities.")
    ] = "blocks",
    metric: Annotated[
        Literal["object", "prefix", "store"],
        typer.Option(
            help="object: accesses that a tier held. prefix: tokens in the run of hits from the "
            "start, full blocks only. store: tokens that lmc's own store and planner find, exact "
            "or moved (needs token ids or text, and capacities in bytes)."
        ),
    ] = "object",
    model: Annotated[
        str,
        typer.Option(
            help="Says the bytes of a token and the cost of computing it: a known name, "
            "a config.json or its folder."
        ),
    ] = "llama-3.1-8b",
    kv_dtype: Annotated[
        str | None, typer.Option(help="Of the KV, default the model's own.")
    ] = None,
    write: Annotated[
        Literal["through", "back"],
        typer.Option(help="Tiers: through (all at once) or back (what one evicts)."),
    ] = "through",
    chunker: Annotated[
        str, typer.Option(help="Cuts token ids and text, as in lmc reuse.")
    ] = "fixed:16",
    blend: Annotated[
        str, typer.Option(help="Metric store: the blending strategy, such as epic:4.")
    ] = "epic",
    exact_variants: Annotated[
        int, typer.Option(help="Metric store: exact contexts kept of one content.")
    ] = 2,
    tokenizer: Annotated[
        Path | None, typer.Option(help="For text: a tokenizer.json, or a folder that holds one.")
    ] = None,
    sample: Annotated[
        float | None,
        typer.Option(help="With --capacity all: the share of keys to look at (SHARDS)."),
    ] = None,
    times: Annotated[
        Path | None, typer.Option(help="A time model that `lmc fit` wrote: adds TTFT under load.")
    ] = None,
    servers: Annotated[int, typer.Option(help="With --times: engines behind one queue.")] = 1,
    rate_scale: Annotated[
        float, typer.Option(help="With --times: how many times faster requests come.")
    ] = 1.0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw hit rate against capacity into this file.")
    ] = None,
    format: Annotated[str, typer.Option(help="The trace's format, if it cannot be told.")] = "auto",
    strict: Annotated[bool, typer.Option(help="Stop at the first bad line.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Replay a trace through eviction policies, in tiers that hold no bytes."""
    with errors_in_one_line("sim"):
        from lmc.chunking import CHUNKERS
        from lmc.cli.output import bar_of_bytes, print_bad_lines, print_json
        from lmc.model.shape import shape as model_shape
        from lmc.policies import POLICIES
        from lmc.quality import BLENDS
        from lmc.sim.readers import read
        from lmc.sim.sweep import lru_rows, parse_capacity, store_sweep, sweep
        from lmc.sim.trace import accesses

        model_of_times = _loaded(times)
        shape, cut = model_shape(model), CHUNKERS.build(chunker)
        capacity = capacity or CAPACITIES[unit]
        curve = capacity.strip() == "all"
        if curve and (policy, metric == "store", times) != ("lru", False, None):
            raise ValueError("capacity all: for policy lru and the metrics object and prefix alone")
        if sample is not None and not curve:
            raise ValueError("sample: goes with --capacity all")
        if metric == "store" and unit != "bytes":
            raise ValueError(f"metric store counts bytes: got unit {unit}, want --unit bytes")
        policies = POLICIES.split(policy)
        capacities = [] if curve else [parse_capacity(c) for c in capacity.split(",")]
        with bar_of_bytes(trace, json) as tell:
            reading = read(trace, format, tokenizer=tokenizer, strict=strict, tell=tell)
            requests = sorted(reading, key=lambda r: r.timestamp)
        by_block: Metric = "prefix" if metric == "prefix" else "object"
        if curve:
            lru, rows = lru_rows(
                accesses(requests, cut),
                unit=unit,
                metric=by_block,
                model=shape,
                dtype=kv_dtype,
                sample=sample,
            )
        else:
            lru = None
            if metric == "store":
                replayed = store_sweep(
                    requests,
                    policies,
                    capacities,
                    cut,
                    model=shape,
                    dtype=kv_dtype,
                    blend=BLENDS.build(blend),
                    exact_variants=exact_variants,
                    spans=CHUNKERS.parse(chunker)["name"] == "explicit",
                )
            else:
                replayed = sweep(
                    accesses(requests, cut),
                    policies,
                    capacities,
                    unit=unit,
                    metric=by_block,
                    model=shape,
                    dtype=kv_dtype,
                    write=write,
                )
            outcomes = _with_progress(replayed, len(policies) * len(capacities), json)
            rows = _rows(requests, outcomes, model_of_times, servers, rate_scale)
        if json:
            print_json(rows)
        else:
            _print(trace, rows)
            print_bad_lines(reading)
        if plot is not None:
            from lmc.plots import hit_rates

            hit_rates(rows, lru).savefig(plot, dpi=150)


def _loaded(path: Path | None) -> TTFTModel | None:
    from lmc.model.times import load

    return None if path is None else load(path)


def _with_progress(outcomes: Iterator[Outcome], n: int, quiet: bool) -> Iterator[Outcome]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    off = quiet or not console.is_terminal
    return iter(track(outcomes, "replaying", n, console=console, transient=True, disable=off))


def _rows(
    requests: Sequence[Request],
    outcomes: Iterable[Outcome],
    times: TTFTModel | None,
    servers: int,
    rate_scale: float,
) -> list[dict[str, Any]]:
    """One row an outcome; with times, theirs too, and first a row without any cache."""
    if times is None:
        return [o.row() for o in outcomes]
    from lmc.sim.timing import serve

    rows = [
        o.row() | serve(requests, o, times, servers=servers, rate_scale=rate_scale).row()
        for o in outcomes
    ]
    nothing = {"policy": "none", "capacity": 0, "hits": 0, "hit_rate": 0.0}
    same = {key: rows[0][key] for key in ("unit", "metric", "accesses")}
    base = serve(requests, None, times, servers=servers, rate_scale=rate_scale)
    return [nothing | same | base.row(), *rows]


def _print(trace: Path, rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console

    first = rows[-1]
    what = {"object": "accesses", "prefix": "input tokens", "store": "prompt tokens"}
    extra = [k for k in ("exact", "moved", "recomputed", "computed", "error") if k in first]
    tiers = max(len(row.get("tiers", ())) for row in rows)
    rates = _table(
        f"{trace.name}: {first['accesses']:,} {what[first['metric']]} (metric {first['metric']})",
        ["policy", first["unit"], "hit rate", *extra, *(f"tier {i + 1}" for i in range(tiers))],
    )
    times = _table(
        "Time to first token, waiting included",
        ["policy", first["unit"], "p50 s", "p90 s", "p99 s", "load", "req/s", "tok/s", "slower"],
    )
    for row in rows:
        capacity = row["capacity"] if isinstance(row["capacity"], list) else [row["capacity"]]
        name = (row["policy"], " + ".join(map(_round, capacity)))
        if row["policy"] != "none":
            cells = [f"{row[k]:.4f}" for k in ("hit_rate", *extra)]
            served = [f"{t['hits'] / row['accesses']:.4f}" for t in row.get("tiers", ())]
            rates.add_row(*name, *cells, *served, *[""] * (tiers - len(served)))
        if "ttft_s" in row:
            spread = [f"{row['ttft_s'][p]:.2f}" for p in ("p50", "p90", "p99")]
            load, rate = f"{row['offered_load']:.2f}", f"{row['requests_per_s']:.3g}"
            tokens = f"{row['input_tokens_per_s']:,.0f}"
            times.add_row(*name, *spread, load, rate, tokens, f"{row['reuse_slower']:.1%}")
    console = Console()
    console.print(rates)
    if (causes := _causes(rows, what[first["metric"]])) is not None:
        console.print(causes)
    if not times.row_count:
        return
    console.print(times)
    if any(row["offered_load"] >= 1 for row in rows):
        console.print(
            "load 1 and more: requests come faster than they are served, so that times describe "
            "the length of the trace, not a steady state (--servers, --rate-scale).",
            style="yellow",
        )
    if any(row["reuse_slower"] for row in rows):
        console.print(
            "slower: share of requests for which loading what was found, and computing the rest, "
            "takes longer than computing all of it.",
            style="yellow",
        )


def _causes(rows: Sequence[dict[str, Any]], what: str) -> Table | None:
    """Why what was not found was not, or was computed again; None where it is not told apart."""
    names = list(dict.fromkeys(cause for row in rows for cause in row.get("causes", ())))
    if not names:
        return None
    columns = ["policy", rows[-1]["unit"], *names]
    table = _table(f"Why not found, or computed again: shares of all {what}", columns)
    for row in rows:
        if "causes" in row:
            capacity = row["capacity"] if isinstance(row["capacity"], list) else [row["capacity"]]
            shares = (f"{row['causes'].get(name, 0) / row['accesses']:.4f}" for name in names)
            table.add_row(row["policy"], " + ".join(map(_round, capacity)), *shares)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column(columns[0])
    for name in columns[1:]:
        table.add_column(name, justify="right")
    return table


def _round(capacity: float | str) -> str:
    """1000 -> 1,000; 1099511627776 -> 1,024.0 Gi; inf as it is."""
    if isinstance(capacity, str) or capacity < 1 << 30:
        return str(capacity) if isinstance(capacity, str) else f"{capacity:,.0f}"
    return f"{capacity / (1 << 30):,.1f} Gi"
