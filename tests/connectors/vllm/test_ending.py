"""Steps that are for claims alone: vLLM's own forward is left out, and nobody can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.vllm.engine import OPEN, run_scenario

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def ended(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ended")
    return run_scenario("tests.connectors.vllm.ending:to_the_end", tiny_llama_dir, folder)


def same(got: Any, expected: Any) -> None:
    assert got.tokens == expected.tokens
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)
    assert got.kinds == expected.kinds


CASES = {
    "epic": 20, "cacheblend": 20, "query": 20, "full_recompute": 20, "sampled": 20,
    "one_token": 1,
    "long": 128,  # of 180: as many as a step schedules; vLLM goes on behind them
}  # fmt: skip


@pytest.mark.parametrize(("case", "rows"), CASES.items(), ids=CASES)
def test_rows_to_the_end_answer_as_the_models_own_forward(ended: Any, case: str, rows: int) -> None:
    (got, went), (own, none) = ended[case]
    same(got, own)
    assert (went, none) == (rows, 0)


@pytest.mark.parametrize("case", ["prefix", "failing", "taken_back", "no_memory"])
def test_where_rows_do_not_go_to_the_end_vllm_computes_them(ended: Any, case: str) -> None:
    (got, went), (own, none) = ended[case]
    same(got, own)
    assert (went, none) == (0, 0)


def test_what_lets_nothing_move_answers_as_plain_vllm(ended: Any) -> None:
    for case in ("full_recompute", "failing", "prefix"):
        got = ended[case][0][0]
        assert got.tokens == ended["plain"].tokens
        np.testing.assert_allclose(got.logprobs, ended["plain"].logprobs, atol=1e-4)


def test_claims_of_one_step_all_go_to_the_end_or_none(ended: Any) -> None:
    (got, went), (own, none) = ended["two_claims"]
    for one, other in zip(got, own, strict=True):
        same(one, other)
    assert (went, none) == (40, 0)
    (got, went), (own, none) = ended["beside_plain"]
    for one, other in zip(got, own, strict=True):
        same(one, other)
    assert (went, none) == (0, 0)


def test_the_next_turn_finds_them(ended: Any) -> None:
    (got, went), (own, none) = ended["next_turn"]
    for one, other in zip(got, own, strict=True):
        same(one, other)
    assert got[1].cached >= 250
    assert (went, none) == (20, 0)


def test_beside_rows_of_chunks_that_are_lost(ended: Any) -> None:
    got, went = ended["lost"]
    assert got.tokens == ended["plain"].tokens
    np.testing.assert_allclose(got.logprobs, ended["plain"].logprobs, atol=1e-4)
    assert went == 20


def test_another_connector_is_asked_about_each_layer_all_the_same(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    ours = {"kv_connector": "LMCConnector", "kv_connector_module_path": "lmc.connectors.vllm"}
    of_ours, of_other = {"lmc": OPEN}, {"shared_storage_path": str(tmp_path / "other")}
    other = {"kv_connector": "ExampleConnector"}
    connectors = [
        one | {"kv_role": "kv_both", "kv_connector_extra_config": extra}
        for one, extra in ((ours, of_ours), (other, of_other))
    ]
    result = run_scenario(
        "tests.connectors.vllm.ending:beside_another", tiny_llama_dir, tmp_path,
        disable_hybrid_kv_cache_manager=True,
        kv_transfer_config={
            "kv_connector": "MultiConnector", "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": connectors},
        },
    )  # fmt: skip
    assert result["got"].kinds["moved"] > 0
    assert set(result["calls"].values()) == {result["layers"]}
    assert result["known"] == 0  # requests that are over
