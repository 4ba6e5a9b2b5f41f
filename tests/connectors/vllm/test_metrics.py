"""The table of metrics, and what travels to it: nothing that is counted is lost on the way."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as PromCounter
from prometheus_client import Gauge as PromGauge
from prometheus_client import Histogram as PromHistogram

from lmc.connectors.vllm import metrics
from lmc.connectors.vllm.messages import ChunkSave, Claim, Encode, LMCStats, Observed, StepMetadata
from lmc.connectors.vllm.metrics import METRICS, LMCPromMetrics, series_of
from lmc.connectors.vllm.stalls import Stalls

ROOT = Path(__file__).parents[3]


def counted_names() -> set[str]:
    """Every name that reaches the table; `x` stands for what is only known when it is counted."""
    found = set()
    prefixes = {"index.py": "store:", "memory.py": "host:", "loading.py": "host:"}
    for path in trees():
        tree = ast.parse(path.read_text())
        names = {name for node in ast.walk(tree) for name in names_of(node)}
        if path.parent.name == "disk" or path.name == "payload.py":
            names = {f"disk:{name}" for name in names}
        if path.parent.name == "remote":
            names = {f"redis:{name}" for name in names}
        prefix = prefixes.get(path.name, "")
        found |= {name if ":" in name else prefix + name for name in names}
    return found


def trees() -> list[Path]:
    """The sources that count."""
    folders = [ROOT / "lmc" / "connectors" / "vllm", ROOT / "lmc" / "store"]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def names_of(node: ast.AST) -> list[str]:
    """What `counts[...] += n` counts."""
    if not isinstance(node, ast.AugAssign) or not isinstance(node.target, ast.Subscript):
        return []
    if ast.unparse(node.target.value).rsplit(".", 1)[-1] not in ("counts", "_counts"):
        return []
    return texts(node.target.slice)


def texts(node: ast.AST) -> list[str]:
    """What an expression may be, as far as its source says."""
    match node:
        case ast.Constant(value=str(name)):
            return [name]
        case ast.JoinedStr(values=parts):
            return ["".join(p.value if isinstance(p, ast.Constant) else "x" for p in parts)]
        case ast.IfExp(body=body, orelse=orelse):
            return [*texts(body), *texts(orelse)]
    return ["x"]


COUNTED = sorted(counted_names())


def test_every_name_that_is_counted_has_a_metric_of_its_own_meaning() -> None:
    assert len(COUNTED) > 80
    found = {name: series_of(name)[0].name for name in COUNTED}  # type: ignore[index]
    events = [name for name, metric in found.items() if metric == "vllm:lmc_events"]
    assert events == [
        "adapters_changed", "chunks_not_computed_alone", "claims_computed", "claims_given_up",
        "claims_parted", "claims_without_windows", "fetched", "lines_dropped", "probes_cut_short",
        "requests_given_up", "requests_over_failed_claims", "rows_recomputed_for_lost_chunks",
        "saves_behind_window", "tokens_computed_alone", "weights_changed", "x",
    ]  # fmt: skip
    assert found["disk:put_failed:x"] == "vllm:lmc_tier_events"
    assert found["disk:bytes_written"] == "vllm:lmc_tier_bytes"


def test_what_is_observed_and_every_level_has_a_metric() -> None:
    seen: dict[str, set[str]] = {"histogram": set(), "gauge": set()}
    for path in trees():
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=value, attr="add"), args=[name, _]):
                    if ast.unparse(value).endswith("observed"):
                        seen["histogram"] |= {*texts(name)}
                case ast.FunctionDef(name="levels" | "waiting" | "take_stats"):
                    dicts = [n for n in ast.walk(node) if isinstance(n, ast.Dict | ast.DictComp)]
                    for n in dicts:
                        keys = n.keys if isinstance(n, ast.Dict) else [n.key]
                        seen["gauge"] |= {text for key in keys if key for text in texts(key)}
    seen["gauge"] -= {"x"}  # a counter's own name
    assert seen["histogram"] == {
        "plan_seconds", "compute_fraction", "blend_seconds", "load_seconds", "stall_seconds:x",
    }  # fmt: skip
    assert {"pending_copies", "isolated_waiting", "write_queue_bytes:x"} <= seen["gauge"]
    for kind, names in seen.items():
        for name in names:
            assert series_of(name, kind) is not None, name  # type: ignore[arg-type]


def test_names_are_as_prometheus_and_vllm_want_them() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"vllm:lmc_[a-z_]+", metric.name), metric.name
        assert not metric.name.endswith("_total"), metric.name  # Prometheus' client adds it
        assert (metric.kind == "histogram") == bool(metric.buckets)
        for name, fixed in metric.sources.items():
            assert sorted({*re.findall(r"{(\w+)}", name), *fixed}) == list(metric.labels), name
        assert set(metric.known) <= set(metric.labels)


class Scraped:
    """The table in a registry of its own, of engines 0 and 1."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        types = {
            kind: lambda *a, kind=kind, **k: kind(*a, registry=self.registry, **k)
            for kind in (PromCounter, PromGauge, PromHistogram)
        }
        labels: dict[int, list[object]] = {i: ["model", str(i)] for i in range(2)}
        config: Any = type("Config", (), {"kv_transfer_config": None})
        self.table = LMCPromMetrics(config, types, ["model_name", "engine"], labels)

    def samples(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """By the values of the labels that are not given."""
        return {
            tuple(v for k, v in s.labels.items() if k not in ("model_name", *labels)): s.value
            for family in self.registry.collect()
            for s in family.samples
            if s.name == name and labels.items() <= s.labels.items()
        }

    def total(self) -> float:
        """Of all counters, each in what it is counted in."""
        scales = {metric.name: metric.scale for metric in METRICS if metric.kind == "counter"}
        return sum(
            s.value / scales[family.name]
            for family in self.registry.collect()
            for s in family.samples
            if family.name in scales and s.name.endswith("_total")
        )


NAMES = st.one_of(
    st.sampled_from(COUNTED),
    st.from_regex(r"[a-z_]{1,8}(:[a-z_]{1,8}){0,2}", fullmatch=True),
)
COUNTS = st.dictionaries(NAMES, st.integers(1, 1 << 40), max_size=8)


@settings(max_examples=20)  # a registry each
@given(st.lists(COUNTS, min_size=1, max_size=4))
def test_what_is_counted_comes_out_once(steps: list[dict[str, int]]) -> None:
    scraped = Scraped()
    for counts in steps:
        scraped.table.observe(LMCStats.of(counts).data, 1)
    assert scraped.total() == pytest.approx(sum(sum(counts.values()) for counts in steps))


def test_each_metric_shows_what_it_says() -> None:
    scraped = Scraped()
    observed = Observed()
    for seconds in (0.0123456, 0.2, 0.2):
        observed.add("stall_seconds:claims", seconds)
    counts = {"tokens:moved": 7, "deferred": 2, "deferred_for_fetch": 3, "stalled_us:claims": 1500,
              "bytes_loaded:host": 10, "bytes_loaded:behind": 5, "bytes_fetched:disk": 5,
              "writes_dropped:disk": 1, "unheard_of": 4}  # fmt: skip
    scraped.table.observe(LMCStats.of(counts, observed, {"pending_copies": 2}).data)
    assert scraped.samples("vllm:lmc_prompt_tokens_total", engine="0")["moved",] == 7
    deferrals = scraped.samples("vllm:lmc_deferrals_total", engine="0")
    assert (deferrals["blocks",], deferrals["fetch",], deferrals["save",]) == (2, 3, 0)
    stalled = scraped.samples("vllm:lmc_stalled_request_seconds_total", engine="0")
    assert stalled["claims",] == pytest.approx(0.0015)
    loaded = scraped.samples("vllm:lmc_transfer_bytes_total", engine="0", direction="load")
    assert loaded == {("host",): 15, ("disk",): 5}
    assert scraped.samples("vllm:lmc_write_failures_total") == {("0", "dropped", "disk"): 1}
    assert scraped.samples("vllm:lmc_events_total", engine="0")["unheard_of",] == 4
    assert scraped.samples("vllm:lmc_decode_stall_seconds_count", engine="0")["claims",] == 3
    sums = scraped.samples("vllm:lmc_decode_stall_seconds_sum", engine="0")
    assert sums["claims",] == pytest.approx(0.4123)
    assert scraped.samples("vllm:lmc_pending_copies") == {("0",): 2, ("1",): 0}
    assert scraped.samples("vllm:lmc_prompt_tokens_total", engine="1")["moved",] == 0


def test_a_gauge_is_what_all_ranks_said_last() -> None:
    scraped = Scraped()
    for step in ((5, 7), (1, 0)):
        ranks = [
            LMCStats.of({}, levels={"write_queue_bytes:disk": n}, rank=rank)
            for rank, n in enumerate(step)
        ]
        scraped.table.observe(reduce(LMCStats.aggregate, ranks).data)  # type: ignore[arg-type]
        got = scraped.samples("vllm:lmc_write_queue_bytes")
        assert got == {("0", "disk"): sum(step)}


def test_labels_are_bounded_whatever_is_counted() -> None:
    scraped = Scraped()
    scraped.table.observe({"counts": {f"plain:reason{i}": 1 for i in range(1000)}})
    scraped.table.observe({"counts": {f"plain:reason{i}": 1 for i in range(1000)}})
    got = scraped.samples("vllm:lmc_plain_requests_total", engine="0")
    assert len(got) == metrics.MOST_SERIES + 1 and sum(got.values()) == 2000
    assert got["other",] == 2 * (1000 - metrics.MOST_SERIES)


@st.composite
def reports(draw: Any) -> LMCStats:
    observed = Observed()
    for value in draw(st.lists(st.floats(1e-6, 1e3), max_size=5)):
        observed.add("plan_seconds", value)
    levels = draw(st.dictionaries(st.just("pending_copies"), st.integers(0, 9)))
    return LMCStats.of(draw(COUNTS), observed, levels, draw(st.integers(0, 3)))


@given(st.lists(reports(), min_size=1, max_size=5))
def test_reports_add_up_in_any_grouping_and_leave_each_other_alone(all_of: list[LMCStats]) -> None:
    import copy

    import msgspec

    before = copy.deepcopy([stats.data for stats in all_of])
    left = reduce(LMCStats.aggregate, all_of, LMCStats())  # type: ignore[arg-type]
    assert [stats.data for stats in all_of] == before
    half = len(all_of) // 2
    parts = [
        reduce(LMCStats.aggregate, some, LMCStats()) for some in (all_of[:half], all_of[half:])
    ]  # type: ignore[arg-type]
    assert parts[0].aggregate(parts[1]).data == left.data
    assert left.data.get("counts", {}) == dict(
        sum((Counter(d.get("counts", {})) for d in before), Counter())
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(left.data)) == left.data


def test_many_observations_are_a_short_message() -> None:
    observed = Observed()
    for i in range(200_000):
        observed.add("plan_seconds", 1e-6 * 1.0001**i)
    assert sum(observed["plan_seconds"].values()) == 200_000
    assert len(observed["plan_seconds"]) < 900 * 10
    exact = sum(1e-6 * 1.0001**i for i in range(200_000))
    kept = sum(value * n for value, n in observed["plan_seconds"].items())
    assert kept == pytest.approx(exact, rel=0.001)


def test_the_log_line_stays_one_line_that_can_be_read() -> None:
    observed = Observed()
    for seconds in (0.1, 0.3):
        observed.add("blend_seconds", seconds)
    counts = dict.fromkeys(COUNTED, 3) | {"tokens:new": 0}
    levels = {"host_memory_bytes:used": 1 << 20, "host_memory_bytes:capacity": 1 << 30}
    said = LMCStats.of(counts, observed, levels).reduce()
    line = ", ".join(f"{k}={v}" for k, v in said.items())
    assert "\n" not in line and len(line) < 900
    assert said["blend_s"] == "2 of 0.2 (most 0.3)" and "tokens" in said and "new" not in said
    assert LMCStats().reduce() == {} and LMCStats().is_empty()


def test_stalls_are_of_steps_in_which_somebody_is_answered() -> None:
    import time

    import numpy as np

    rows = np.arange(2)
    claim = Claim("a", 0, 2, rows, [0], [], rows)
    encode = Encode(rows, 0, [], [ChunkSave(None, "", 0, 2, [[1]])])  # type: ignore[arg-type]
    stalls = Stalls()
    for step in (
        StepMetadata(decodes=5),
        StepMetadata(claims=[claim], decodes=0),
        StepMetadata(claims=[claim], encodes=[encode], reused=True, decodes=3),
    ):
        for cause in ("copies", "claims", "isolated"):
            with stalls.during(cause, step):  # type: ignore[arg-type]
                time.sleep(0.002)
    data = stalls.take().data
    seen = {name: sum(values.values()) for name, values in data["observed"].items()}
    assert seen == {"blend_seconds": 2, "stall_seconds:claims": 1, "stall_seconds:isolated": 1,
                    "stall_seconds:copies": 1}  # fmt: skip
    (stall,) = data["observed"]["stall_seconds:claims"]
    assert stall >= 0.002 and data["counts"]["stalled_us:claims"] == pytest.approx(
        3e6 * stall, rel=0.01
    )
    assert stalls.take().is_empty()


def test_a_stall_is_measured_also_where_the_claim_fails() -> None:
    import numpy as np

    rows = np.arange(2)
    step = StepMetadata(claims=[Claim("a", 0, 2, rows, [0], [], rows[:0])], decodes=1)
    stalls = Stalls()
    with pytest.raises(RuntimeError, match="no device"), stalls.during("claims", step):
        raise RuntimeError("no device")
    assert set(stalls.take().data["observed"]) == {"load_seconds", "stall_seconds:claims"}
