"""What clients are told of their tokens, and what is recorded: without an engine, and in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planning import Bench
from lmc.blend.tokenmap import tokens_by
from lmc.connectors.vllm.config import LMCConfig, Trace
from lmc.connectors.vllm.explaining import Explaining
from lmc.sim.explain import Recording, report_in
from lmc.sim.readers import read
from tests.connectors.vllm.engine import run_scenario
from tests.connectors.vllm.test_planning import text


class Recorded(Bench):
    """A scheduler's side that records into a folder."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(4000, **options)
        config = LMCConfig(trace=Trace(path=str(folder)))
        self.side.explaining = Explaining(config, self.side.planner)

    def told(self, tokens: list[int], salt: str | None = None, **lmc: Any) -> dict[str, Any]:
        """One request from its arrival to its end: its report."""
        request = self.arrive(tokens, lmc)
        if salt is not None:
            request.cache_salt = salt
            self.side.requests.pop(request.request_id)
            self.side.on_new_request(request)
        assert self.admit(request) is not None
        own = [list(ids) for ids in self.manager.get_block_ids(request.request_id)]
        report = self.side.finish(request, own)
        self.manager.free(request)
        self.step()
        assert self.manager.reset_prefix_cache()
        assert report is not None
        return report["lmc"]  # type: ignore[no-any-return]

    def lines(self, folder: Path) -> list[dict[str, Any]]:
        self.side.close()
        files = sorted(folder.glob("trace-*"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_clients_are_told_what_they_ask_for_and_the_trace_says_all(tmp_path: Path) -> None:
    bench, document = Recorded(tmp_path), text(400)
    silent = bench.told(document, salt="theirs")
    assert "map" not in silent and "seconds" not in silent
    mine = bench.told(document, salt="mine", explain=True, save=False)
    # A text that somebody else has stored is to its client like one that nobody has.
    assert mine["map"] == [[0, 400, "new", None, "never_seen"]]
    again = report_in(bench.told(text(30) + document, salt="theirs", explain=True, save=False))
    assert tokens_by(again.map, "kind") == {k: n for k, n in again.kinds.items() if n}
    assert set(again.seconds) == {"plan", "wait"}
    bench.told(document, enabled=False)
    first, second, third = bench.lines(tmp_path)
    assert first["tenant"] == third["tenant"] != second["tenant"]
    assert tokens_by(Recording(tmp_path).find("2").map, "cause") == {"other_salt": 400}
    assert third["map"] == json.loads(json.dumps(again.map))
    assert [r.input_tokens for r in read(tmp_path)] == [400, 400, 430]


def test_a_request_that_never_began_and_one_that_is_none_of_ours(tmp_path: Path) -> None:
    bench = Recorded(tmp_path)
    waiting = bench.arrive(text(100), {"explain": True})
    ended = bench.side.finish(waiting, [])
    assert ended is not None
    assert ended["lmc"]["map"] == [[0, 100, "new", None, "not_begun"]]
    bad = bench.told(text(50), blend="a secret", explain=True)
    assert "map" not in bad and "a secret" in bad["reason"]
    (first, second) = bench.lines(tmp_path)
    assert "chunks" in first and "chunks" not in second
    # What a client writes does not go into the trace.
    assert second["reason"] == "bad_request" and "secret" not in json.dumps(second)
    assert second["map"] == [[0, 50, "new", None, "plain"]]


def test_evicted(tmp_path: Path) -> None:
    bench = Recorded(tmp_path, memory_bytes=2500 * 131_072)
    first, second = text(1500), text(1500)
    for document in (first, second):
        bench.told(document)
    report = report_in(bench.told([*text(40), *first], explain=True, save=False))
    assert tokens_by(report.map, "cause")["evicted"] > 400
    bench.side.close()


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one engine told, and what it recorded until it ended."""
    folder = tmp_path_factory.mktemp("explained")
    trace = {"trace": {"path": str(folder / "trace")}}
    told = run_scenario(
        "tests.connectors.vllm.explained:explained", tiny_llama_dir, folder, lmc=trace
    )
    return told, folder / "trace"


@pytest.mark.engine
def test_in_an_engine(engine: Any) -> None:
    told, folder = engine
    assert "map" not in told["silent"] and "map" not in told["bad"]
    assert told["plain"]["reason"] == "disabled" and "map" not in told["plain"]
    blended = report_in(told["blended"])
    assert tokens_by(blended.map, "kind") == {k: n for k, n in blended.kinds.items() if n}
    assert blended.map[0] == (0, 110, "exact", "host", None)
    assert tokens_by(blended.map, "cause") == {"boundary": 16, "never_seen": 20}
    assert blended.seconds["claim"] > 0 < blended.seconds["plan"]
    assert tokens_by(report_in(told["unmoved"]).map, "cause") == {"strategy": 140, "never_seen": 20}
    assert told["other_salt"]["map"] == [[0, 270, "new", None, "never_seen"]]
    lost = report_in(told["lost"])
    # Of its 70 rows the first eight were to be computed anyway.
    assert tokens_by(lost.map, "cause") == {"boundary": 8, "lost": 62, "never_seen": 20}
    # Until it ended: six documents, and all of these but the one that lmc was not to see.
    reading = read(folder, strict=True)
    assert len(list(reading)) == 6 + 5
    last = Recording(folder).find(None)
    assert last.map == lost.map and last.output_tokens == 12
    salted = Recording(folder).find("10")
    assert tokens_by(salted.map, "cause") == {"other_salt": 250, "never_seen": 20}
