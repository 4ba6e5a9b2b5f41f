"""Requests that wait or are over keep nothing from others, in a real engine with few pages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.vllm.engine import run_scenario
from tests.connectors.vllm.stalls import ROWS
from tests.connectors.vllm.test_engine import same

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def result(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    # A staging buffer of less than a chunk.
    lmc = {"rows_per_step": ROWS, "staging_bytes": 4096, "memory_bytes": 4 << 20}
    folder = tmp_path_factory.mktemp("stalls")
    return run_scenario("tests.connectors.vllm.stalls:stalls", tiny_llama_dir, folder, lmc=lmc)


def test_who_is_over_holds_no_pages(result: Any) -> None:
    assert result["over"] == [True] * 3
    assert result["free"] == (True, result["blocks"])


def test_what_is_saved_is_read_before_its_pages_are_anothers(result: Any) -> None:
    reused = result["reused"]
    assert reused["waited"] >= 1 and reused["early"] >= 1
    for got, plain in zip(reused["got"], reused["plain"], strict=True):
        same(got, plain)
        assert got.kinds["exact"] >= 250


def test_nothing_is_saved_out_of_pages_that_were_given_up_for_sleep(result: Any) -> None:
    same(result["asleep"]["got"], result["asleep"]["plain"])
    assert result["counts"]["saves_refused"] >= 1
    assert result["asleep"]["got"].kinds["exact"] >= 64  # what was copied before is kept


def test_who_waits_finds_what_was_stored_meanwhile(result: Any) -> None:
    backlog = result["backlog"]
    reused = [backlog[name].kinds["moved"] for name in ("behind", "afterwards")]
    assert reused[0] >= reused[1] > 100  # the question too, which comes again there
    assert backlog["for_pages"].kinds["moved"] >= 590
    assert result["counts"]["planned_again"] >= 2
    same(backlog["at_once"], backlog["plain"])
    assert backlog["at_once"].kinds["exact"] > 200
    assert result["counts"]["deferred_for_save"] >= 1


def test_who_waits_keeps_nothing_in_memory(result: Any) -> None:
    queue = result["queue"]
    assert queue["waiting"] == 0 and queue["answers"] == 24
    assert queue["most"] <= 2 << 20  # half of it
    for got, plain in queue["compared"]:
        same(got, plain)


def test_the_rows_of_a_step_are_bounded(result: Any) -> None:
    rows = result["rows"]
    assert rows["claims"] == [1, 1, 1]
    assert result["counts"]["deferred_for_rows"] >= 2
    for got, plain in zip(rows["got"], rows["plain"], strict=True):
        same(got, plain)


def test_index_and_worker_agree_and_all_leases_are_back(result: Any) -> None:
    held, known = result["agree"]
    assert held == known
    assert (result["leases"], result["kept"]) == (0, 0)


SOAK_S = float(os.environ.get("LMC_SOAK_S", "1800"))


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 600)
def test_mixed_traffic_leaves_nothing_behind(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Repeated text, aborts, evictions and a tier that hangs: memory stays as it is."""
    disk = {"name": "tests.connectors.vllm.soak:Hung", "path": str(tmp_path / "kv")}
    lmc = {
        "memory_bytes": 1240 * 1536, "tiers": [disk | {"capacity": "8MiB"}],
        "fetch_patience_s": 0.3, "rows_per_step": 256, "staging_bytes": 16 << 10,
    }  # fmt: skip
    got = run_scenario(
        "tests.connectors.vllm.soak:soak", tiny_llama_dir, tmp_path, lmc=lmc,
        given=(SOAK_S, 1), timeout=SOAK_S + 500,
    )  # fmt: skip
    rss = np.array([sample["rss"] for sample in got["samples"]])
    fifth = len(rss) // 5
    grown = np.median(rss[-fifth:]) / np.median(rss[fifth : 2 * fifth])
    print(
        f"\nsoak: {SOAK_S:.0f} s, {got['asked']} requests, {got['aborted']} aborted, "
        f"{got['counts'].get('store:evicted', 0)} chunks evicted, "
        f"{got['counts'].get('fetches_failed', 0)} fetches failed, {got['wrong']} of "
        f"{got['compared']} answers wrong, memory of the last fifth / the second {grown:.3f}"
    )
    assert got["wrong"] == 0 and got["compared"] > 0
    assert got["agree"] and got["sizes"][0] == got["sizes"][1]
    assert got["leases"] == 0 and got["left"] == (0, 0, False, 0)
    assert got["free"] == (True, got["blocks"])
    assert grown < 1.02
