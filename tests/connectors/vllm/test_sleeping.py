"""Pausing, sleeping and resetting lose nothing that is on disk, and nothing wrong gets there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.connectors.vllm.engine import run_scenario
from tests.connectors.vllm.test_engine import same

pytestmark = pytest.mark.engine


def test_what_is_stored_is_found_after_a_pause(tiny_llama_dir: Path, tmp_path: Path) -> None:
    disk = {"name": "disk", "path": str(tmp_path / "kv"), "capacity": "64MiB"}
    result = run_scenario(
        "tests.connectors.vllm.sleeping:asleep",
        tiny_llama_dir,
        tmp_path,
        separate_worker=True,
        lmc={"tiers": [disk]},
        worker_cls="tests.connectors.vllm.sleeping.SlowWorker",
    )
    for name, got in result["ways"].items():
        aborted = got["reason"] == "abort"
        assert aborted == ("abort" in name), name
        whole = got["plain"].tokens
        assert got["tokens"] == (whole[: len(got["tokens"])] if aborted else whole), name
        assert got["other"] == result["plain_other"].tokens, name
        # What was there is found, and what was under way is right or not there.
        same(got["found_before"], result["plain_before"])
        assert got["found_before"].kinds == {"exact": 129, "recomputed": 1}, name
        assert got["found_before"].report["bytes"] == {"host": 0, "disk": 129 * 1536}, name
        same(got["found"], got["plain"])
        assert got["found"].report["kinds"]["exact"] >= 40, name
    assert any(got["found"].report["kinds"]["exact"] > 180 for got in result["ways"].values())
    assert result["discard"] == [True]
