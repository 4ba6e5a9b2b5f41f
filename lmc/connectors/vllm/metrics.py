"""Everything that lmc counts, as vLLM's `/metrics` and its log show it: one table.

Where something happens it is counted under a name: `tokens:moved`. The table says which metric and
which labels that is; a name that it does not have is an event of its own, so that nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any, Literal

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics

from lmc.blend.plan import KINDS

Kind = Literal["counter", "gauge", "histogram"]
PARTS: dict[str, Kind] = {"counts": "counter", "observed": "histogram", "levels": "gauge"}
MOST_SERIES = 200  # of one metric and engine; what has other labels then is counted as "other"
OTHER = "other"
SECONDS = (
    0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5)
US = 1e-6  # what is counted in microseconds, in seconds


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as vLLM's own are named; Prometheus shows that of a counter with `_total` behind it.
        help: what it is, in one line.
        sources: the names under which it is counted, and the labels that each stands for; in a
            name, `{label}` stands where the label's value is.
        known: by label, values that are shown from the start. A label may get others.
        scale: of what is counted, in the metric's unit.
        buckets: of a histogram, their upper ends.
        log: what it is called in vLLM's log line; "" leaves it out.
    """

    name: str
    kind: Kind
    help: str
    sources: Mapping[str, Mapping[str, str]]
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scale: float = 1.0
    buckets: tuple[float, ...] = ()
    log: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """Its own, in order; vLLM's come before them."""
        name, fixed = next(iter(self.sources.items()))
        return tuple(sorted({*re.findall(r"{(\w+)}", name), *fixed}))


def _metric(
    kind: Kind,
    name: str,
    help: str,
    sources: Mapping[str, Mapping[str, str]] | str,
    known: Mapping[str, tuple[str, ...]] | None = None,
    **fields: Any,
) -> Metric:
    several = {sources: {}} if isinstance(sources, str) else sources
    return Metric(f"vllm:lmc_{name}", kind, help, several, known or {}, **fields)


METRICS = (
    # -- what becomes of prompts -----------------------------------------------------------------
    _metric(
        "counter", "prompt_tokens", "Prompt tokens of admitted requests, by what became of them.",
        "tokens:{kind}", {"kind": KINDS}, log="tokens",
    ),
    _metric(
        "counter", "hit_tokens", "Prompt tokens found in a store, by where their KV came from.",
        "hits:{tier}", {"tier": ("host",)},
    ),
    _metric(
        "counter", "miss_tokens",
        "Prompt tokens that neither vLLM's prefix cache nor a store served, by why.",
        "misses:{reason}", {"reason": ("not_found", "beyond_claim")},
    ),
    _metric(
        "histogram", "compute_fraction",
        "Of each request's row-layers, the share that is computed; probes may make it more than 1.",
        "compute_fraction", buckets=SHARES,
    ),
    _metric(
        "counter", "plain_requests", "Requests served as if lmc were not there, by why.",
        "plain:{reason}", log="plain",
    ),
    _metric(
        "counter", "unblended_plans",
        "Plans that move no chunk although that was asked for, by why; quality_gate is the gate.",
        "unblended:{reason}",
        {"reason": ("quality_gate", "blending_refused", "gain_below_minimum")}, log="unblended",
    ),
    # -- waiting and planning --------------------------------------------------------------------
    _metric(
        "counter", "deferrals", "Times a request was put off for a step, by what it waited for.",
        {"deferred_for_{reason}": {}, "deferred": {"reason": "blocks"}},
        {"reason": ("save", "memory", "lookup", "flight", "fetch", "hand_over", "rows", "blocks")},
        log="deferred",
    ),
    _metric(
        "counter", "single_flights",
        "Requests that waited for what another computes; in vain, or a tier did not say in time.",
        "flights_{outcome}", {"outcome": ("followed", "in_vain", "unanswered")}, log="flights",
    ),
    _metric(
        "counter", "hand_overs",
        "Prompts kept for another engine; in part, for want of room; not, since a window had left "
        "some behind or it could not be trusted, or since the name was taken.",
        "hand_overs:{outcome}", {"outcome": ("kept", "in_part", "lost", "taken")},
    ),
    _metric(
        "counter", "replans", "Requests planned again before they were admitted, by why.",
        {"planned_again": {"reason": "more_stored"}, "replanned": {"reason": "outdated"}},
        {"reason": ("more_stored", "outdated")},
    ),
    _metric(
        "histogram", "plan_seconds", "Seconds of the scheduler's thread that making a plan took.",
        "plan_seconds", buckets=SECONDS,
    ),
    # -- computing -------------------------------------------------------------------------------
    _metric(
        "counter", "rows_computed",
        "Rows computed by lmc through all layers, by what for; rest stands in for vLLM's forward.",
        {
            "rows_computed": {"purpose": "claim"},
            "rows_computed_to_the_end": {"purpose": "rest"},
            "rows_computed_alone": {"purpose": "isolated"},
        },
        {"purpose": ("claim", "rest", "isolated")}, log="rows",
    ),
    _metric(
        "counter", "row_layers", "Row-layers that selective strategies computed, by what for.",
        {"row_layers_selected": {"purpose": "selected"}, "row_layers_probed": {"purpose": "probe"}},
        {"purpose": ("selected", "probe")},
    ),
    _metric(
        "histogram", "blend_seconds",
        "Seconds that a step's claims took in steps that computed rows of them; loading included, "
        "and rows that stand in for vLLM's forward.",
        "blend_seconds", buckets=SECONDS, log="blend_s",
    ),
    _metric(
        "histogram", "load_seconds",
        "Seconds that a step's claims took in steps that computed no rows of them.",
        "load_seconds", buckets=SECONDS, log="load_s",
    ),
    _metric(
        "histogram", "decode_stall_seconds",
        "Seconds by which lmc made a step longer that had requests in the midst of their answers.",
        "stall_seconds:{cause}", {"cause": ("claims", "isolated", "copies")},
        buckets=SECONDS, log="stall_s",
    ),
    _metric(
        "counter", "stalled_request_seconds",
        "The same seconds, times the requests that were in the midst of their answers.",
        "stalled_us:{cause}", {"cause": ("claims", "isolated", "copies")}, scale=US,
    ),
    # -- bytes -----------------------------------------------------------------------------------
    _metric(
        "counter", "transfer_bytes",
        "Bytes of KV moved: host memory to and from pages, tiers to and from host memory.",
        {
            "bytes_loaded:host": {"tier": "host", "direction": "load"},
            "bytes_loaded:behind": {"tier": "host", "direction": "load"},
            "bytes_saved:host": {"tier": "host", "direction": "store"},
            "bytes_fetched:{tier}": {"direction": "load"},
            "bytes_stored:{tier}": {"direction": "store"},
        },
        {"tier": ("host",), "direction": ("load", "store")},
    ),
    _metric(
        "counter", "transfer_seconds",
        "Seconds in which such bytes were under way; on a GPU a load counts as long as its launch.",
        {
            "host:load_us": {"tier": "host", "direction": "load"},
            "save_us:host": {"tier": "host", "direction": "store"},
            "fetch_us:{tier}": {"direction": "load"},
            "write_us:{tier}": {"direction": "store"},
        },
        {"tier": ("host",), "direction": ("load", "store")}, scale=US,
    ),
    # -- faults ----------------------------------------------------------------------------------
    _metric(
        "counter", "load_failures",
        "What did not come: chunks out of tiers, chunks of a claim, whole claims.",
        {
            "fetches_failed": {"what": "fetch"}, "chunks_lost": {"what": "chunk"},
            "claims_failed": {"what": "claim"},
        },
        {"what": ("fetch", "chunk", "claim")}, log="not_loaded",
    ),
    _metric(
        "counter", "save_failures", "Chunks that did not get from pages into host memory, by why.",
        {
            "saves_refused": {"reason": "refused"}, "saves_failed": {"reason": "failed"},
            "saves_given_up": {"reason": "given_up"},
        },
        {"reason": ("refused", "failed", "given_up")}, log="not_saved",
    ),
    _metric(
        "counter", "write_failures", "Chunks that a tier was to have and did not take, by why.",
        {"writes_{outcome}:{tier}": {}}, log="not_written",
    ),
    _metric(
        "counter", "tiers_left_alone", "Times a tier was not asked for a while since it was late.",
        "tiers_left_alone", log="tiers_left_alone",
    ),
    # -- stores ----------------------------------------------------------------------------------
    _metric(
        "counter", "index_events", "What happened to chunks in host memory.",
        "store:{event}", {"event": ("put", "adopted", "known", "evicted", "no_room")},
    ),
    _metric(
        "counter", "tier_bytes", "Bytes that a tier itself counted.", "{tier}:bytes_{event}",
    ),
    _metric(
        "counter", "tier_events", "What else a tier itself counted.", "{tier}:{event}",
    ),
    _metric(
        "counter", "trace_lines", "Lines of the recorder, by what became of them.",
        "trace_lines_{outcome}", {"outcome": ("written", "dropped", "failed")}, log="trace_lines",
    ),
    _metric(
        "counter", "events", "Everything else that lmc counts, by its name.", "{event}",
        {"event": ("requests_given_up", "claims_given_up", "claims_computed")}, log="events",
    ),
    # -- how things stand ------------------------------------------------------------------------
    _metric(
        "gauge", "host_memory_bytes", "Host memory for chunks, of one rank: used, and all of it.",
        {"host_memory_bytes:{state}": {}}, {"state": ("used", "capacity")}, log="host_memory",
    ),
    _metric(
        "gauge", "write_queue_bytes", "Bytes that wait to be written to a tier, of all ranks.",
        "write_queue_bytes:{tier}",
    ),
    _metric(
        "gauge", "pending_fetches", "Chunks on their way out of tiers, on all ranks.",
        "pending_fetches",
    ),
    _metric(
        "gauge", "pending_copies", "Copies, evictions and fetches that wait for the saving thread.",
        "pending_copies",
    ),
    _metric(
        "gauge", "pending_lookups", "Prompts of which a tier has yet to say what it has.",
        "pending_lookups",
    ),
    _metric(
        "gauge", "isolated_waiting", "Texts that wait to be computed alone.", "isolated_waiting",
    ),
    _metric(
        "gauge", "tier_answers", "1 where a tier is asked for chunks, 0 where it is left alone.",
        "tier_answers:{tier}",
    ),
)  # fmt: skip
# What all ranks do alike is counted by the first of them alone.
ALIKE = frozenset({
    "rows_computed", "rows_computed_to_the_end", "rows_computed_alone", "row_layers_selected",
    "row_layers_probed", "claims_computed", "claims_parted", "probes_cut_short",
})  # fmt: skip

_PATTERNS = [
    (re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(name))), metric, fixed)
    for names in (False, True)  # a name before what stands for many
    for metric in METRICS
    for name, fixed in metric.sources.items()
    if ("{" in name) == names
]


@lru_cache(maxsize=4096)
def series_of(name: str, kind: Kind = "counter") -> tuple[Metric, tuple[str, ...]] | None:
    """The metric that has `name`, and the values of its own labels, in order.

    Every counter has one; None for what nobody observes and no level is called.
    """
    for pattern, metric, fixed in _PATTERNS:
        if metric.kind == kind and (match := pattern.fullmatch(name)):
            values = {**match.groupdict(), **fixed}
            return metric, tuple(values[label] for label in metric.labels)
    return None


def in_short(data: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What `LMCStats` carries, as one readable line: what is none is left out."""
    said: dict[str, list[str]] = {metric.log: [] for metric in METRICS if metric.log}

    for part, kind in PARTS.items():
        for name, value in data.get(part, {}).items():
            metric, labels = series_of(name, kind) or (None, ())
            if metric and metric.log and (told := _told(metric, value)):
                said[metric.log].append(" ".join((*labels, told)))
    return {log: "; ".join(sorted(parts)) for log, parts in said.items() if parts}


def _told(metric: Metric, value: Any) -> str:
    match metric.kind:
        case "counter":
            return f"{value * metric.scale:g}" if value else ""
        case "gauge":
            return f"{sum(value.values()):g}"
        case "histogram":
            n, total = sum(value.values()), sum(seen * times for seen, times in value.items())
            return f"{n} of {total / n:.3g} (most {max(value):.3g})"


class LMCPromMetrics(KVConnectorPromMetrics):
    """The table in vLLM's registry; `observe` takes in what `LMCStats` carries.

    vLLM makes one in each of its API servers. Each step's statistics go to one of them, so that
    counters and histograms add up, and a gauge is what was told last.
    """

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        classes: dict[str, Any] = {
            "counter": self._counter_cls,
            "gauge": self._gauge_cls,
            "histogram": self._histogram_cls,
        }
        self._families: dict[str, Any] = {}
        for metric in METRICS:
            options: dict[str, Any] = {}
            if metric.kind == "gauge":
                options["multiprocess_mode"] = "mostrecent"
            elif metric.kind == "histogram":
                options["buckets"] = metric.buckets
            self._families[metric.name] = classes[metric.kind](
                name=metric.name,
                documentation=metric.help,
                labelnames=[*labelnames, *metric.labels],
                **options,
            )
        self._series: dict[tuple[int, str], dict[tuple[str, ...], Any]] = {}
        for engine in per_engine_labelvalues:
            for metric in METRICS:
                if all(label in metric.known for label in metric.labels):
                    for values in product(*(metric.known[label] for label in metric.labels)):
                        self._of(engine, metric, values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take in what one step of an engine told."""
        for part, kind in PARTS.items():
            for name, value in transfer_stats_data.get(part, {}).items():
                if found := series_of(name, kind):
                    _take_in(self._of(engine_idx, *found), found[0], value)

    def _of(self, engine: int, metric: Metric, values: tuple[str, ...]) -> Any:
        """One time series; of too many, the one for all others."""
        known = self._series.setdefault((engine, metric.name), {})
        if values not in known:
            if len(known) >= MOST_SERIES:
                values = (OTHER,) * len(values)
            labels = [*self.per_engine_labelvalues[engine], *values]
            known[values] = self._families[metric.name].labels(*labels)
        return known[values]


def _take_in(series: Any, metric: Metric, value: Any) -> None:
    """A number that was counted, how often each value was observed, or a level by rank."""
    match metric.kind:
        case "counter":
            series.inc(max(0, value) * metric.scale)
        case "gauge":
            series.set(sum(value.values()))
        case "histogram":
            for seen, n in value.items():
                for _ in range(n):
                    series.observe(seen)
