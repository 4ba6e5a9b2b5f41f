"""`lmc sim`: hit rates of a trace by policy and capacity, and what they are worth in time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from lmc.sizes import in_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from lmc.model.times import TTFTModel
    from lmc.sim.sweep import Metric, Outcome, Unit
    from lmc.sim.trace import Request

MOST = 3  # sessions that are named
NAME = 24  # letters of such a name
CAPACITIES = {
    "blocks": "1k,10k,100k,inf",
    "tokens": "1M,10M,100M,inf",
    "bytes": "1GiB,16GiB,256GiB,inf",
}


def sim(
    trace: Trace,
    policy: Annotated[str, typer.Option(help="One or more, such as lru,belady,ttl:600.")] = "lru",
    capacity: Annotated[
        str | None,
        typer.Option(
            help="One or more, such as 1k,64GiB,inf; + between tiers, such as 1k+50k; or all: "
            "LRU at every capacity in one pass. Default: some, by unit."
        ),
    ] = None,
    unit: Annotated[
        Literal["blocks", "tokens", "bytes"] | None,
        typer.Option(
            help="Of capacities. Default: bytes where they are such as 64GiB, and for the metric "
            "store; else blocks."
        ),
    ] = None,
    metric: Annotated[
        Literal["object", "prefix", "store"],
        typer.Option(
            help="object: accesses that a tier held. prefix: tokens in the run of hits from the "
            "start, full blocks only. store: tokens that lmc's own store and planner find, exact "
            "or moved (needs token ids or text; its capacities are bytes)."
        ),
    ] = "object",
    model: Model = "llama-3.1-8b",
    kv_dtype: KVDtype = None,
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
        int | None,
        typer.Option(
            min=1,
            help="Metric store: exact contexts kept of one content; by default 2, and 64 where "
            "the strategy moves nothing.",
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    sample: Annotated[
        float | None,
        typer.Option(help="With --capacity all: the share of keys to look at (SHARDS)."),
    ] = None,
    times: Times = None,
    servers: Servers = 1,
    rate_scale: RateScale = 1.0,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw hit rate against capacity into this file.")
    ] = None,
    format: Format = "auto",
    strict: Strict = False,
    json: AsJson = False,
) -> None:
    """Replay a trace through eviction policies, in tiers that hold no bytes.

    For example: lmc sim trace.jsonl --metric prefix --policy lru,sieve --capacity 64GiB,1TiB
    """
    with errors_in_one_line("sim"):
        from lmc.chunking import CHUNKERS
        from lmc.cli.output import bar_of_bytes, check_plot, print_bad_lines, print_json
        from lmc.model.gpus import times_for
        from lmc.model.shape import shape as model_shape
        from lmc.policies import POLICIES
        from lmc.quality import BLENDS
        from lmc.sim.reach import store_rows
        from lmc.sim.readers import read
        from lmc.sim.sweep import lru_rows, parse_capacity, store_sweep, sweep
        from lmc.sim.trace import accesses

        check_plot(plot)
        batch = batch_of(max_num_seqs, max_num_batched_tokens)
        shape, cut = model_shape(model), CHUNKERS.build(chunker)
        model_of_times = times_for(times, shape, kv_dtype, model) if times else None
        unit = _unit(unit, capacity, metric)
        capacity = capacity or CAPACITIES[unit]
        curve = capacity.strip() == "all"
        if curve and (policy, times) != ("lru", None):
            raise ValueError("capacity all: for policy lru, and without times")
        if sample is not None and metric == "store":
            raise ValueError("sample: for the metric object alone")
        if sample is not None and not curve:
            raise ValueError("sample: goes with --capacity all")
        policies = POLICIES.split(policy)
        asked = {} if curve else {parse_capacity(c): c.strip() for c in capacity.split(",")}
        capacities = list(asked)
        with bar_of_bytes(trace, json) as tell:
            reading = read(trace, format, tokenizer=tokenizer, strict=strict, tell=tell)
            requests = sorted(reading, key=lambda r: r.timestamp)
        by_block: Metric = "prefix" if metric == "prefix" else "object"
        spans = CHUNKERS.parse(chunker)["name"] == "explicit"
        if curve and metric == "store":
            per_token = shape.bytes_per_token(kv_dtype)
            lru, rows = store_rows(requests, cut, per_token, spans=spans)
        elif curve:
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
                    spans=spans,
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
            load = {"servers": servers, "rate_scale": rate_scale, "batch": batch}
            rows = _rows(requests, outcomes, model_of_times, load)
        if json:
            print_json(rows)
        else:
            _print(trace, rows, asked)
        print_bad_lines(reading)
        if plot is not None:
            from lmc.plots import hit_rates

            of = f", KV of {model}" if unit == "bytes" else ""
            hit_rates(rows, lru, f"{trace.name}: {len(requests):,} requests{of}").savefig(
                plot, dpi=150
            )


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
    load: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One row an outcome; with times, theirs too under a load, as `serve` takes it, and first a
    row without any cache."""
    if times is None:
        return [o.row() for o in outcomes]
    from lmc.sim.timing import serve

    of = {"times": times.origin}
    rows = [o.row() | serve(requests, o, times, **load).row() | of for o in outcomes]
    nothing = {"policy": "none", "capacity": 0, "hits": 0, "hit_rate": 0.0}
    same = {key: rows[0][key] for key in ("unit", "metric", "accesses")}
    base = serve(requests, None, times, **load)
    return [nothing | same | base.row() | of, *rows]


def _unit(unit: Unit | None, capacity: str | None, metric: str) -> Unit:
    """What capacities are counted in. Raises ValueError where they, or the metric, say another."""
    parts = (part.strip() for part in re.split(r"[,+]", capacity or ""))
    sizes = [part for part in parts if part and part not in ("inf", "all")]
    bytes_too = [part for part in sizes if in_bytes(part)]
    if unit is None:
        unit = "bytes" if bytes_too or metric == "store" else "blocks"
        if counts := [part for part in sizes if bytes_too and part not in bytes_too]:
            raise ValueError(f"capacity: got {bytes_too[0]} and {counts[0]}, want all of one unit")
    if unit != "bytes" and bytes_too:
        raise ValueError(f"unit {unit}: got capacity {bytes_too[0]}, which is of bytes")
    if unit != "bytes" and metric == "store":
        raise ValueError(f"metric store counts bytes: got unit {unit}, want --unit bytes")
    return unit


def _print(
    trace: Path, rows: Sequence[dict[str, Any]], asked: Mapping[tuple[float, ...], str]
) -> None:
    from rich.console import Console

    from lmc.cli.output import plain, show, table

    first = rows[-1]
    what = {"object": "accesses", "prefix": "input tokens", "store": "prompt tokens"}
    extra = [k for k in ("exact", "moved", "recomputed", "computed", "error") if k in first]
    tiers = max(len(row.get("tiers", ())) for row in rows)
    rates = table(
        f"{trace.name}: {first['accesses']:,} {what[first['metric']]} (metric {first['metric']})",
        ["policy", first["unit"], "hit rate", *extra, *(f"tier {i + 1}" for i in range(tiers))],
    )
    times = table(
        f"Time to first token, waiting included: {plain(first.get('times', ''))}",
        ["policy", first["unit"], "p50 s", "p90 s", "p99 s", "load", "req/s", "tok/s", "slower"],
    )
    for row in rows:
        name = (row["policy"], _capacity(row, asked))
        if row["policy"] != "none":
            cells = [f"{row[k]:.2%}" for k in ("hit_rate", *extra)]
            served = [f"{t['hits'] / row['accesses']:.2%}" for t in row.get("tiers", ())]
            rates.add_row(*name, *cells, *served, *[""] * (tiers - len(served)))
        if "ttft_s" in row:
            spread = [f"{row['ttft_s'][p]:.2f}" for p in ("p50", "p90", "p99")]
            offered, rate = row["offered_load"], f"{row['requests_per_s']:.3g}"
            load = f"{offered:.0%}" if offered < 1e4 else f"{100 * offered:.1e}%"
            tokens = f"{row['input_tokens_per_s']:,.0f}"
            times.add_row(*name, *spread, load, rate, tokens, f"{row['reuse_slower']:.1%}")
    show(rates)
    if (causes := _causes(rows, what[first["metric"]], asked)) is not None:
        show(causes)
    if (evicted := _evicted(rows, asked)) is not None:
        show(evicted)
    if not times.row_count:
        return
    show(times)
    console = Console()
    if any(row["offered_load"] >= 1 for row in rows):
        console.print(
            "load 100% and more: requests come faster than they are served, so that times describe "
            "the length of the trace, not a steady state (--servers, --rate-scale).",
            style="yellow",
        )
    if any(row["reuse_slower"] for row in rows):
        console.print(
            "slower: share of requests for which loading what was found, and computing the rest, "
            "takes longer than computing all of it.",
            style="yellow",
        )


def _causes(
    rows: Sequence[dict[str, Any]], what: str, asked: Mapping[tuple[float, ...], str]
) -> Table | None:
    """Why what was not found was not, or was computed again; None where it is not told apart."""
    from lmc.cli.output import table

    names = list(dict.fromkeys(cause for row in rows for cause in row.get("causes", ())))
    if not names:
        return None
    columns = ["policy", rows[-1]["unit"], *names]
    shown = table(f"Why not found, or computed again: shares of all {what}", columns)
    for row in rows:
        if "causes" in row:
            shares = (f"{row['causes'].get(name, 0) / row['accesses']:.2%}" for name in names)
            shown.add_row(row["policy"], _capacity(row, asked), *shares)
    return shown


def _evicted(
    rows: Sequence[dict[str, Any]], asked: Mapping[tuple[float, ...], str]
) -> Table | None:
    """Whose requests pushed out what was asked for again; None where nobody's did."""
    from lmc.cli.output import plain, table

    told = [row for row in rows if "evicted_by" in row]
    if not any(session for row in told for session in row["evicted_by"]["sessions"]):
        return None
    shown = table(
        "Evicted by whom: shares of the tokens that were, and were asked for again",
        ["policy", rows[-1]["unit"], "own session", "others", "most by"],
    )
    for row in told:
        sessions, total = row["evicted_by"]["sessions"], row["evicted_by"]["tokens"]
        own = row["evicted_by"]["own"] / total
        # A session's name is whatever a trace says.
        most = ", ".join(
            f"{plain(s[:NAME]) or 'no name'} {n / total:.1%}" for s, n in [*sessions.items()][:MOST]
        )
        shown.add_row(row["policy"], _capacity(row, asked), f"{own:.1%}", f"{1 - own:.1%}", most)
    return shown


def _capacity(row: Mapping[str, Any], asked: Mapping[tuple[float, ...], str]) -> str:
    """As it was asked for; where it was not, 1000 -> 1,000, and of bytes 1024 -> 1.0 KiB."""
    from lmc.cli.output import size

    values = row["capacity"] if isinstance(row["capacity"], list) else [row["capacity"]]
    if given := asked.get(tuple(float(value) for value in values)):
        return given
    shown = size if row["unit"] == "bytes" else "{:,.0f}".format
    return " + ".join(v if isinstance(v, str) else shown(v) for v in values)
