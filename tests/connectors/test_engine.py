"""The connector in real vLLM engines on a tiny random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.engine import run_scenario

pytestmark = pytest.mark.engine


def same(got: Any, expected: Any) -> None:
    assert got.tokens == expected.tokens
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def reuse(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_scenario("reuse", tiny_llama_dir, tmp_path_factory.mktemp("reuse"))


class TestReuse:
    def test_recompute_everything_equals_full_prefill(self, reuse: Any) -> None:
        same(reuse["full_recompute"], reuse["plain"])
        same(reuse["cdc"], reuse["plain"])
        same(reuse["unaligned"], reuse["unaligned_plain"])
        assert reuse["full_recompute"].kinds == {"exact": 110, "recomputed": 140, "new": 20}
        assert reuse["unaligned"].kinds == {"recomputed": 180, "new": 33}

    def test_nothing_moved_equals_prefix_caching(self, reuse: Any) -> None:
        same(reuse["prefix"], reuse["plain"])
        assert reuse["prefix"].kinds == {"exact": 110, "new": 160}
        same(reuse["nothing_moved"], reuse["nothing_moved_plain"])
        assert reuse["nothing_moved"].kinds == {"exact": 110, "new": 20}

    def test_moved_documents_are_reused(self, reuse: Any) -> None:
        assert reuse["epic"].kinds == {"exact": 110, "moved": 124, "recomputed": 16, "new": 20}
        assert reuse["epic"].cached == 250
        assert reuse["epic"].report["compute_fraction"] == pytest.approx(36 / 270)
        assert reuse["epic"].report["strategy"] == "epic"
        assert reuse["epic"].report["bytes"] == {"host": 250 * 1536}
        assert reuse["full_reuse"].kinds == {"exact": 110, "moved": 140, "new": 20}

    def test_blends_differ_from_full_prefill_and_from_each_other(self, reuse: Any) -> None:
        arms = ("plain", "epic", "full_reuse", "norotate")
        first = [reuse[arm].logprobs[0] for arm in arms]
        assert len({round(float(x), 4) for x in first}) == len(arms)

    def test_equal_recipe_is_found_in_vllms_own_cache(self, reuse: Any) -> None:
        same(reuse["epic_again"], reuse["epic"])
        assert reuse["epic_again"].kinds == {"local": 110, "local_blended": 146, "new": 14}

    def test_tenants_do_not_see_each_other(self, reuse: Any) -> None:
        assert reuse["other_tenant"].kinds == {"new": 270}
        same(reuse["other_tenant"], reuse["plain"])

    def test_little_gain_is_not_worth_a_blend(self, reuse: Any) -> None:
        assert reuse["little_gain"].kinds == {"recomputed": 70, "new": 90}
        assert reuse["little_gain"].report["reason"] == "gain_below_minimum"

    def test_chunk_saved_in_its_context_is_exact_there(self, reuse: Any) -> None:
        assert reuse["exact_later"].kinds == {"exact": 270, "new": 30}

    def test_kinds_add_up(self, reuse: Any) -> None:
        for answer in reuse.values():
            assert sum(answer.report["kinds"].values()) == answer.report["prompt_tokens"]
            assert 0 < answer.report["flops_fraction"] <= 1


def poisoned(result: Any) -> bool:
    return any(
        after.cached > 110 or after.tokens != before.tokens
        for before, after in zip(result["before"], result["after"], strict=True)
    )


def test_blended_blocks_never_serve_a_plain_request(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario("poison", tiny_llama_dir, tmp_path)
    assert not poisoned(result)
    for before, after, blended in zip(
        *(result[k] for k in ("before", "after", "blended")), strict=True
    ):
        same(after, before)
        assert blended.report["kinds"]["moved"] == 140
        # What is shared is the exact start, up to the block with the first moved token.
        assert after.cached == 96


def test_control_without_the_taint_is_poisoned(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario("poison_untainted", tiny_llama_dir, tmp_path)
    assert poisoned(result)
    assert [a.cached for a in result["after"]] == [256] * 3


def test_requests_in_the_same_steps(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario("together", tiny_llama_dir, tmp_path)
    for name, alone in result["alone"].items():
        same(result["together"][name], alone)
    assert result["together"]["blended"].report["kinds"]["moved"] == 124
    assert result["counts"]["chunks_lost"] == 2
    same(result["lossy"], result["lossy_plain"])
    assert result["lossy"].kinds == {"exact": 110, "recomputed": 70, "new": 20}
    assert result["lossy"].report["compute_fraction"] == pytest.approx(90 / 200)
    assert result["counts"]["rows_recomputed_for_lost_chunks"] == 70
    assert result["counts"]["deferred"] >= 1  # the shared system prompt was still being computed
    same(result["forgotten"], result["forgotten_plain"])
    assert result["forgotten"].kinds == {"new": 270}
    assert result["counts"]["replanned"] >= 1
    assert result["held"] == 0


def test_preempted_and_resumed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario("preempted", tiny_llama_dir, tmp_path)
    assert result["preemptions"]
    for got, alone in zip(result["together"], result["alone"], strict=True):
        same(got, alone)
    assert result["after"].tokens == result["alone"][0].tokens[:20]


def test_next_turn_finds_blended_blocks(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario("next_turn", tiny_llama_dir, tmp_path)
    same(result["turn"], result["plain"])
    assert result["turn"].report["kinds"]["local_blended"] > 140
    same(result["stored_decode"], result["plain"])


def test_bad_requests_are_served_plainly_with_the_reason(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    result = run_scenario("bad_requests", tiny_llama_dir, tmp_path)
    reasons = {
        "unknown_strategy": "bad_request:.*'cachblend'.*epic",
        "unknown_key": "bad_request:.*chunk; valid",
        "overlap": r"bad_request:.*\(40, 60\)",
        "beyond": r"bad_request:.*\(0, 5000\)",
        "prompt_logprobs": "prompt_logprobs",
    }
    for name, pattern in reasons.items():
        same(result[name], result["plain"])
        assert result[name].cached == 0
        with pytest.raises(ValueError, match=pattern):
            raise ValueError(result[name].report["reason"])
    assert result["stored"] == 0


def test_default_topology(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario("reuse", tiny_llama_dir, tmp_path, separate_worker=True)
    same(result["full_recompute"], result["plain"])
    assert result["epic"].kinds == {"exact": 110, "moved": 124, "recomputed": 16, "new": 20}
    same(result["epic_again"], result["epic"])


def test_tensor_parallel(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario(
        "reuse", tiny_llama_dir, tmp_path, separate_worker=True, tensor_parallel_size=2
    )
    same(result["full_recompute"], result["plain"])
    assert result["epic"].kinds == {"exact": 110, "moved": 124, "recomputed": 16, "new": 20}
    assert result["epic"].report["bytes"] == {"host": 250 * 1536 // 2}  # on each rank


def test_rope_that_cannot_be_moved(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "dynamic"
    shutil.copytree(tiny_llama_dir, model)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (model / "config.json").write_text(json.dumps(config))
    result = run_scenario("refused", model, tmp_path)
    same(result["epic"], result["plain"])
    assert result["epic"].kinds == {"exact": 110, "new": 90}
    assert "RoPE type 'dynamic' cannot be re-rotated" in result["epic"].report["reason"]


def test_without_our_worker_class(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario("refused", tiny_llama_dir, tmp_path, worker_cls="auto")
    same(result["epic"], result["plain"])
    assert result["epic"].kinds == {"exact": 110, "new": 90}
    assert "--worker-cls lmc.connectors.vllm.LMCWorker" in result["epic"].report["reason"]


@pytest.mark.timeout(900)
def test_the_kernels_answer_as_the_backend_does(
    reuse: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """All of the CUDA path but the GPU: gather, scatter and attention as vLLM would launch them."""
    by_kernels = run_scenario(
        "reuse", tiny_llama_dir, tmp_path, lmc={"attention": "kernels"}, interpret=True
    )
    for name, answer in by_kernels.items():
        same(answer, reuse[name])
        assert answer.kinds == reuse[name].kinds


@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["backend", "kernels"])
def test_selective_forward_in_vllms_pages(way: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    difference = run_scenario(
        "adapter", tiny_llama_dir, tmp_path, lmc={"attention": way}, interpret=way == "kernels"
    )
    assert difference["finite"]
    assert difference["scattered"] < 1e-4
    assert difference["sliced"] < 1e-4
    # A row never depends on later tokens.
    assert difference["earlier_rows"] == 0
    assert difference["later_rows"] > 1e-2
    # The published mask lets rows see the future, and this test can tell.
    assert difference["bottom_right_mask"] > 1e-2
