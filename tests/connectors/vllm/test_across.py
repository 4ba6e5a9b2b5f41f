"""The same selection in two engines gives the same answer; the quality gate in a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from lmc.model.rope import rotations_of
from lmc.model.weights import weights_digest
from tests.connectors.vllm.across import GATED, STRATEGIES_ACROSS
from tests.connectors.vllm.engine import run_scenario
from tests.quality.profiles import epic, profile

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def results(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One engine; its profile is made by hand, and says that more rows of `epic` recover more."""
    folder = tmp_path_factory.mktemp("across")
    rope = rotations_of(AutoConfig.from_pretrained(tiny_llama_dir)).fingerprint
    of_this_model = {
        "weights": weights_digest(tiny_llama_dir).hex(),
        "rope": rope.hex(),
        "model": "tiny",
    }
    made = profile(epic(4, 0.2), epic(16, 0.5), epic(32, 0.6))
    made.model_copy(update=of_this_model | {"context": "first_seen"}).save(folder / "profile.yaml")
    lmc = {"profile": str(folder / "profile.yaml"), "min_recovery": 0.4}
    return run_scenario("across_and_gated", tiny_llama_dir, folder, lmc=lmc)


@pytest.mark.parametrize("name", STRATEGIES_ACROSS)
def test_hugging_face_and_vllm_agree_on_a_replayed_selection(results: Any, name: str) -> None:
    result = results["across"][name]
    np.testing.assert_allclose(result["vllm"], result["hf"], atol=1e-4)
    assert result["tokens"][0] == result["tokens"][1]
    assert (result["selected"] > 0) == (name != "full_reuse")
    served, planned = result["kinds"]
    assert served["exact"] == planned["exact"] == 110
    assert served["new"] == planned["new"]


def test_strategies_differ(results: Any) -> None:
    first = {round(float(result["hf"][0]), 4) for result in results["across"].values()}
    assert len(first) == len(STRATEGIES_ACROSS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("known", None),
        ("auto", None),
        ("control", None),
        ("prefix", None),
        ("below", "quality_gate:recovery of epic link_tokens=4 is 0.20 [0.10, 0.30], below"),
        ("unknown", "quality_gate:cacheblend ratio=0.2 is not in the quality profile"),
        ("out_of_reach", "quality_gate:auto: no measured link_tokens of 'epic' reaches"),
    ],
)
def test_the_gate_refuses_to_move_and_exact_reuse_goes_on(
    results: Any, name: str, reason: str | None
) -> None:
    answer, plain = results["gated"][name], results["gated"]["prefix"]
    if reason is None:
        assert answer.report["reason"] is None
        assert ("moved" in answer.kinds) == (name in ("known", "auto"))
    else:
        assert answer.report["reason"].startswith(reason)
        assert answer.kinds == plain.kinds == {"exact": 110, "new": 160}
        assert answer.tokens == plain.tokens
        np.testing.assert_allclose(answer.logprobs, plain.logprobs, atol=1e-4)


def test_auto_takes_the_least_that_recovers_enough(results: Any) -> None:
    # Between 16 rows (0.5) and 32 (0.6), 0.54 is reached at 22.4; two documents are moved.
    assert results["gated"]["auto"].kinds["recomputed"] == 2 * 23
    assert set(results["gated"]) == set(GATED)
