"""An engine as its operator sees it: `/metrics` of vLLM's own registry, and KV events over zmq."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lmc.connectors.vllm.metrics import METRICS
from tests.connectors.vllm.engine import run_scenario
from tests.connectors.vllm.test_persistent import disk

pytestmark = pytest.mark.engine

TOKEN = 1536  # bytes


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> int:
    """Each of which has its share of the heads, and of a chunk's bytes."""
    return int(request.param)


@pytest.fixture(scope="module")
def result(ranks: int, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from vllm.config import KVEventsConfig

    folder = tmp_path_factory.mktemp("observed")
    endpoint = f"ipc://{folder}/events"  # who publishes binds it, as it does tcp://*:5557
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint)
    lmc = {"memory_bytes": 1000 * TOKEN // ranks, "trace": {"path": str(folder / "trace")}}
    return run_scenario(
        "tests.connectors.vllm.observed:observed", tiny_llama_dir, folder, separate_worker=True,
        lmc=disk(folder / "kv", capacity="4MiB") | lmc, tensor_parallel_size=ranks,
        given=(endpoint,), kv_events_config=events, disable_log_stats=False,
    ) | {"trace": folder / "trace"}  # fmt: skip


def test_the_recorder_has_a_line_of_each_request(result: Any) -> None:
    lines = [
        json.loads(line)
        for file in sorted(result["trace"].glob("trace-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    # One that a client keeps out of lmc is none of its business.
    answers = [a for a in result["answers"] if a.report["reason"] != "disabled"]
    assert len(lines) == len(answers) == len(result["answers"]) - 1
    told, recorded = Counter[str](), Counter[str]()
    for answer, line in zip(answers, lines, strict=True):
        told.update(answer.report["kinds"])
        recorded.update(line["kinds"])
    assert recorded == told


class Scrape:
    def __init__(self, text: str) -> None:
        self.samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def of(self, name: str, **labels: str) -> Counter[tuple[str, ...]]:
        """By the values of lmc's labels that are not given."""
        found: Counter[tuple[str, ...]] = Counter()
        for sample in self.samples:
            if sample.name == f"vllm:lmc_{name}" and labels.items() <= sample.labels.items():
                rest = {k: v for k, v in sample.labels.items() if k not in labels}
                key = tuple(v for k, v in sorted(rest.items()) if k not in ("engine", "model_name"))
                found[key] += sample.value
        return found


@pytest.fixture(scope="module")
def scrape(result: Any) -> Scrape:
    return Scrape(result["scraped"])


def test_tokens_are_those_that_clients_are_told_of(result: Any, scrape: Scrape) -> None:
    told: Counter[str] = Counter()
    for answer in result["answers"]:
        told.update(answer.report["kinds"])
    shown = scrape.of("prompt_tokens_total")
    assert {kind: n for (kind,), n in shown.items() if n} == {k: n for k, n in told.items() if n}
    assert told["moved"] and told["exact"] and told["recomputed"] and told["new"]
    total = sum(shown.values())
    served = scrape.of("hit_tokens_total").total() + scrape.of("miss_tokens_total").total()
    assert served + shown["local",] + shown["local_blended",] == total
    assert scrape.of("miss_tokens_total")["disabled",] == 30
    fractions = [answer.report["compute_fraction"] for answer in result["answers"]]
    assert scrape.of("compute_fraction_count")[()] == len(fractions)
    assert scrape.of("compute_fraction_sum")[()] == pytest.approx(sum(fractions), rel=0.005)


def test_both_sides_of_the_engine_arrive(ranks: int, scrape: Scrape) -> None:
    assert scrape.of("plan_seconds_count")[()] >= 13
    assert scrape.of("rows_computed_total")["claim",] > 0
    stored = scrape.of("transfer_bytes_total", direction="store")
    loaded = scrape.of("transfer_bytes_total", direction="load")
    assert min(stored["host",], stored["disk",], loaded["host",], loaded["disk",]) > 0
    seconds = scrape.of("transfer_seconds_total")
    assert len(seconds) == 4 and all(0 < s < 30 for s in seconds.values())
    assert scrape.of("index_events_total")["evicted",] > 0
    assert scrape.of("tier_events_total", tier="disk")["puts",] > 0
    memory = scrape.of("host_memory_bytes")  # of one rank
    assert memory["capacity",] == 1000 * TOKEN // ranks
    assert 0 < memory["used",] <= memory["capacity",]
    assert scrape.of("tier_answers") == {("disk",): 1}
    for nothing in ("load_failures_total", "save_failures_total", "tiers_left_alone_total"):
        assert scrape.of(nothing).total() == 0


def test_stalls_are_those_of_steps_beside_a_running_answer(result: Any, scrape: Scrape) -> None:
    blends, loads = scrape.of("blend_seconds_count")[()], scrape.of("load_seconds_count")[()]
    stalls = scrape.of("decode_stall_seconds_count")
    assert blends >= 2 and loads >= 2
    assert 2 <= stalls["claims",] < blends + loads  # those of requests that ran alone are none
    stalled = scrape.of("stalled_request_seconds_total")["claims",]
    seconds = scrape.of("decode_stall_seconds_sum")["claims",]
    assert seconds * 0.99 <= stalled <= 4 * seconds and seconds < result["wall"]


def test_every_metric_of_the_table_is_there(scrape: Scrape) -> None:
    shown = {sample.name for sample in scrape.samples}
    ends = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    # Of labels that nobody knows before they are counted, those that nothing has had yet are not.
    absent = {m.name for m in METRICS if m.name + ends[m.kind] not in shown}
    assert absent <= {"vllm:lmc_write_failures"}


def test_a_subscriber_sees_chunks_come_and_go(result: Any, ranks: int, scrape: Scrape) -> None:
    here: dict[tuple[str, Any], dict[int, int]] = {}
    published: Counter[str] = Counter()
    went: Counter[str] = Counter()
    for event in result["events"]:
        if not str(event.get("medium")).startswith("LMC_") or event["medium"] == "LMC_BLENDED":
            continue
        place = here.setdefault((event["medium"], event.get("ownership")), {})
        if event["is"] == "BlockStored":
            assert len(event["token_ids"]) == event["block_size"] > 0
            assert event["extra_keys"][0][0] == "lmc"
            place[event["block_hashes"][0]] = event["block_size"]
            published[event["medium"]] += event["block_size"]
        else:
            for hash in event["block_hashes"]:
                went[event["medium"]] += place.pop(hash, None) is not None
    assert set(here) == {("LMC_CPU", None), ("LMC_STORAGE", "disk")}
    assert min(went["LMC_CPU"], went["LMC_STORAGE"]) > 0
    # A follower who adds up knows what is where.
    used = scrape.of("host_memory_bytes")["used",] * ranks
    assert sum(here["LMC_CPU", None].values()) * TOKEN == used
    stored = scrape.of("transfer_bytes_total", tier="host", direction="store")[()]
    fetched = scrape.of("transfer_bytes_total", tier="disk", direction="load")[()]
    assert published["LMC_CPU"] * TOKEN == stored + fetched


def test_a_subscriber_can_tell_blended_blocks_from_others(result: Any) -> None:
    events = result["events"]
    blended = [e for e in events if e.get("medium") == "LMC_BLENDED"]
    marked = {hash for event in blended for hash in event["block_hashes"]}
    on_device = [e for e in events if e["is"] == "BlockStored" and e["medium"] == "GPU"]
    assert len(blended) == 3 and marked <= {h for e in on_device for h in e["block_hashes"]}
    # Of the same tokens in the same place others are plain.
    plain = [e for e in on_device if not marked.intersection(e["block_hashes"])]
    assert plain and all(event["token_ids"] for event in blended)
