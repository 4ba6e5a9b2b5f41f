"""The connector in real vLLM engines on a tiny random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.vllm.engine import run_scenario

pytestmark = pytest.mark.engine
MOVED = list(range(110, 250))  # where `prompt(2, 0, 3)` has documents that are moved


def same(got: Any, expected: Any) -> None:
    assert got.tokens == expected.tokens
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def shared(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one default engine did, by scenario: starting one takes longer than most of them."""
    folder = tmp_path_factory.mktemp("shared")
    return run_scenario("tests.connectors.vllm.shared:in_one_engine", tiny_llama_dir, folder)


@pytest.fixture(scope="module")
def reuse(shared: Any) -> Any:
    return shared["reuse"]


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

    def test_selecting_everything_equals_full_prefill(self, reuse: Any) -> None:
        same(reuse["cacheblend_all"], reuse["plain"])
        same(reuse["query_all"], reuse["plain"])
        same(reuse["gap_all"], reuse["gap_plain"])
        assert reuse["cacheblend_all"].selected == [MOVED] * 3
        assert reuse["cacheblend_all"].kinds == {"exact": 110, "recomputed": 140, "new": 20}
        same(reuse["long"], reuse["long_plain"])
        assert reuse["long"].kinds == {"exact": 110, "recomputed": 140, "new": 160}
        assert reuse["gap_all"].kinds == {"exact": 110, "recomputed": 140, "new": 29}

    def test_selecting_nothing_equals_full_reuse(self, reuse: Any) -> None:
        same(reuse["query_none"], reuse["full_reuse"])
        assert reuse["query_none"].selected == [[]] * 3
        # All rows of the check layer were computed, and the reused KV is back.
        same(reuse["cacheblend_none"], reuse["full_reuse"])
        assert reuse["cacheblend_none"].selected == [MOVED, MOVED, []]
        # What CacheBlend leaves behind there can be told from that.
        assert reuse["cacheblend_kept"].selected == [MOVED, MOVED, []]
        off = reuse["cacheblend_kept"].logprobs[0] - reuse["full_reuse"].logprobs[0]
        assert abs(off) > 1e-3

    def test_rows_are_selected_and_counted(self, reuse: Any) -> None:
        def parts(name: str) -> tuple[list[int], int, float]:
            answer = reuse[name]
            return (
                [len(rows) for rows in answer.selected],
                answer.report["kinds"]["recomputed"],
                answer.report["compute_fraction"],
            )

        assert parts("cacheblend") == (
            [140, 140, 21], 100, pytest.approx((3 * 20 + 140 + 140 + 21) / 3 / 270),
        )  # fmt: skip
        # The probe runs the question through all layers, one more time.
        assert parts("query") == ([14] * 3, 14, pytest.approx((20 + 20 + 14) / 270))
        # The gap's rows probe too, and go through all layers.
        assert parts("gap") == (
            [140, 140, 21], 100, pytest.approx((3 * 29 + 140 + 140 + 21) / 3 / 279),
        )  # fmt: skip
        # Up to the middle layer; that both choose a row is not known before.
        rows, _, fraction = parts("union")
        assert fraction == pytest.approx((20 + 16 + 21 + 20 * 2 / 3) / 270)
        assert 21 < rows[0] <= 16 + 21
        linked = {*range(110, 118), *range(180, 188)}
        assert all(linked < set(rows) < set(MOVED) for rows in reuse["union"].selected)

    def test_recorded_selection_is_replayed(self, reuse: Any) -> None:
        same(reuse["replay"], reuse["cacheblend"])
        assert reuse["replay"].selected == reuse["cacheblend"].selected

    def test_selective_blend_is_found_again_and_serves_nobody_else(self, reuse: Any) -> None:
        same(reuse["cacheblend_again"], reuse["cacheblend"])
        assert reuse["cacheblend_again"].kinds == {"local": 110, "local_blended": 146, "new": 14}
        # What is chosen of the rest alone passes for no part of the whole.
        for name in ("parted", "parted_again"):
            kinds = {"local": 110, "local_blended": 50, "moved": 25, "recomputed": 65, "new": 20}
            assert reuse[name].kinds == kinds
        same(reuse["parted_again"], reuse["parted"])
        same(reuse["plain_behind"], reuse["plain"])
        assert reuse["plain_behind"].cached == 96

    def test_kinds_add_up(self, reuse: Any) -> None:
        for answer in reuse.values():
            assert sum(answer.report["kinds"].values()) == answer.report["prompt_tokens"]
            # A probe before everything is computed again comes on top of it.
            checked = "Checked" in (answer.report["strategy"] or "")
            assert 0 < answer.report["flops_fraction"] <= (1.2 if checked else 1)


def poisoned(result: Any) -> bool:
    return any(
        after.cached > 110 or after.tokens != before.tokens
        for before, after in zip(result["before"], result["after"], strict=True)
    )


def test_blended_blocks_never_serve_a_plain_request(shared: Any) -> None:
    result = shared["poison"]
    assert not poisoned(result)
    for before, after, blended, moved in zip(
        *(result[k] for k in ("before", "after", "blended")), (140, 40, 126), strict=True
    ):
        same(after, before)
        assert blended.report["kinds"]["moved"] == moved
        # What is shared is the exact start, up to the block with the first moved token.
        assert after.cached == 96


def test_what_vllm_holds_stays_blended_when_a_request_is_planned_again(shared: Any) -> None:
    result = shared["replanned"]
    assert result["lost"] and result["first"].kinds["local_blended"] >= 80
    # Nothing of it is stored as if it had been computed in full.
    assert result["again"].kinds["exact"] <= 110
    same(result["again"], result["plain"])


def test_control_without_the_taint_is_poisoned(shared: Any) -> None:
    result = shared["poison_untainted"]
    assert poisoned(result)
    assert [a.cached for a in result["after"]] == [256] * 3


def test_requests_in_the_same_steps(shared: Any) -> None:
    result = shared["together"]
    for name, alone in result["alone"].items():
        same(result["together"][name], alone)
    assert result["together"]["blended"].report["kinds"]["moved"] == 124
    assert result["counts"]["chunks_lost"] == result["gone"] >= 4
    same(result["lossy"], result["lossy_plain"])
    assert result["lossy"].kinds == {"exact": 110, "recomputed": 70, "new": 20}
    assert result["lossy"].report["compute_fraction"] == pytest.approx(90 / 200)
    selective = result["selective_lossy"]
    same(selective["two"], selective["two_plain"])
    assert selective["two"].kinds == {"exact": 110, "recomputed": 140, "new": 20}
    # What is lost is forced, and no longer the strategy's to choose.
    assert selective["two"].selected == [list(range(110, 180))] * 3
    assert selective["one"].selected == [[]] * 3
    same(selective["one"], selective["one_plain"])
    assert selective["one"].kinds == {"exact": 110, "recomputed": 70, "new": 20}
    assert selective["one"].report["compute_fraction"] == pytest.approx(90 / 200)
    assert result["counts"]["rows_recomputed_for_lost_chunks"] == 3 * 70
    assert result["counts"]["deferred"] >= 1  # the shared system prompt was still being computed
    same(result["forgotten"], result["forgotten_plain"])
    assert result["forgotten"].kinds == {"new": 270}
    assert result["counts"]["replanned"] >= 1
    assert result["held"] == 0


def test_claims_of_one_step_go_through_the_layers_together(shared: Any) -> None:
    result = shared["in_one_pass"]
    assert result["claims"] == [4]
    for got, alone in zip(result["together"], result["alone"], strict=True):
        same(got, alone)
        assert got.kinds["moved"] == alone.kinds["moved"] > 0


def test_what_fails_of_one_claim_leaves_the_others(shared: Any) -> None:
    result = shared["in_one_pass"]
    assert result["tries"] == [4, 1]
    for i in (0, 2, 3):
        same(result["one_fails"][i], result["alone"][i])
    # All of it is computed, out of its tokens alone.
    same(result["one_fails"][1], result["plain"])


def test_where_a_layer_fails_each_claim_is_served_by_itself(shared: Any) -> None:
    result = shared["in_one_pass"]
    assert result["parted"] == [4, 1, 1, 1, 1]
    for got, alone in zip(result["none_together"], result["alone"], strict=True):
        same(got, alone)


def test_preempted_and_resumed(shared: Any) -> None:
    result = shared["preempted"]
    assert result["preemptions"]
    for got, alone in zip(result["together"], result["alone"], strict=True):
        same(got, alone)
    assert result["after"].tokens == result["alone"][0].tokens[:20]


def test_next_turn_finds_blended_blocks(shared: Any) -> None:
    result = shared["next_turn"]
    same(result["turn"], result["plain"])
    assert result["turn"].report["kinds"]["local_blended"] > 140
    same(result["stored_decode"], result["plain"])


def test_bad_requests_are_served_plainly_with_the_reason(shared: Any) -> None:
    result = shared["bad_requests"]
    reasons = {
        "unknown_strategy": "bad_request:.*'cachblend'.*epic",
        "unknown_layer": r"bad_request:.*\[7\], want layers of 0 to 2",
        "unknown_key": "bad_request:.*'chunk'; valid",
        "deep_text": "bad_request:.*want a name or {name: ...",
        "deep_mapping": "bad_request:",
        "long_name": "bad_request:.*want a name or {name: ...",
        "overlap": r"bad_request:.*\(40, 60\)",
        "beyond": r"bad_request:.*\(0, 5000\)",
        "prompt_logprobs": "prompt_logprobs",
    }
    for name, pattern in reasons.items():
        same(result[name], result["plain"])
        assert result[name].cached == 0
        assert len(result[name].report["reason"]) < 600
        with pytest.raises(ValueError, match=pattern):
            raise ValueError(result[name].report["reason"])
    assert result["stored"] == 0


def test_default_topology(reuse: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario("reuse", tiny_llama_dir, tmp_path, separate_worker=True)
    same(result["full_recompute"], result["plain"])
    assert result["epic"].kinds == {"exact": 110, "moved": 124, "recomputed": 16, "new": 20}
    same(result["epic_again"], result["epic"])
    same(result["union"], reuse["union"])


def test_tensor_parallel(reuse: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario(
        "reuse", tiny_llama_dir, tmp_path, separate_worker=True, tensor_parallel_size=2
    )
    same(result["full_recompute"], result["plain"])
    assert result["epic"].kinds == {"exact": 110, "moved": 124, "recomputed": 16, "new": 20}
    assert result["epic"].report["bytes"] == {"host": 250 * 1536 // 2}  # on each rank
    same(result["cacheblend_all"], result["plain"])
    same(result["query_all"], result["plain"])
    # Both ranks choose by what they saw together, so as one rank that has all heads.
    same(result["cacheblend"], reuse["cacheblend"])
    same(result["query"], reuse["query"])


@pytest.mark.slow
def test_ranks_compute_claims_of_one_step_together(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario(
        "tests.connectors.vllm.ranks:in_ranks", tiny_llama_dir, tmp_path, separate_worker=True,
        tensor_parallel_size=2, worker_cls="tests.connectors.vllm.ranks.CountingWorker",
    )  # fmt: skip
    for got, alone in zip(result["together"], result["alone"], strict=True):
        same(got, alone)
    first, second = result["passes"]
    assert first == second == [1, 1, 1, 1, 4]


@pytest.mark.alone
def test_rope_that_cannot_be_moved(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "dynamic"
    shutil.copytree(tiny_llama_dir, model)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (model / "config.json").write_text(json.dumps(config))
    result = run_scenario("tests.connectors.vllm.trust:refused", model, tmp_path)
    same(result["epic"], result["plain"])
    assert result["epic"].kinds == {"exact": 110, "new": 90}
    assert "RoPE type 'dynamic' cannot be re-rotated" in result["epic"].report["reason"]


@pytest.mark.alone
def test_without_our_worker_class(tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = run_scenario(
        "tests.connectors.vllm.trust:refused", tiny_llama_dir, tmp_path, worker_cls="auto"
    )
    same(result["epic"], result["plain"])
    assert result["epic"].kinds == {"exact": 110, "new": 90}
    assert "--worker-cls lmc.connectors.vllm.LMCWorker" in result["epic"].report["reason"]
    # Nobody would have seen weights change.
    assert result["reset"].kinds == {"new": 200}


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
        assert answer.selected == reuse[name].selected


def test_selective_forward_in_vllms_pages_by_the_backend(shared: Any) -> None:
    check_selective_forward(shared["adapter"])


@pytest.mark.alone
@pytest.mark.timeout(900)
def test_selective_forward_in_vllms_pages_by_kernels(tiny_llama_dir: Path, tmp_path: Path) -> None:
    kernels = {"attention": "kernels"}
    check_selective_forward(
        run_scenario("adapter", tiny_llama_dir, tmp_path, lmc=kernels, interpret=True)
    )


def check_selective_forward(difference: dict[str, Any]) -> None:
    assert difference["finite"]
    assert difference["scattered"] < 1e-4
    assert difference["sliced"] < 1e-4
    # A row never depends on later tokens.
    assert difference["earlier_rows"] == 0
    assert difference["later_rows"] > 1e-2
    # The published mask lets rows see the future, and this test can tell.
    assert difference["bottom_right_mask"] > 1e-2
    check_measured(difference["measured"])


def check_measured(runs: dict[str, Any]) -> None:
    """Of 230 rows 100..109 are forced, the rest of 40..199 reused and wrong, and 200.. ask."""
    dense, stale = runs.pop("dense"), runs.pop("stale")
    moved = np.array([*range(40, 100), *range(110, 200)])
    outcome, after = runs["all"]
    assert all(np.array_equal(rows, np.arange(40, 200)) for rows in outcome.rows)
    assert np.abs(after - dense).max() < 1e-4
    for name, (outcome, after) in runs.items():
        for layer, rows in enumerate(outcome.rows):
            assert np.array_equal(rows, np.union1d(outcome.selected[layer], np.arange(100, 110)))
            # Nothing else is written, but by a probe behind the claim.
            left = np.setdiff1d(np.arange(200), rows)
            assert np.array_equal(after[layer][:, left], stale[layer][:, left]), name
    # Reused rows were spoiled the more, the later they stand.
    farthest = moved[-23:]
    for name in ("deviation", "deviation_sliced"):
        outcome = runs[name][0]
        assert [len(rows) for rows in outcome.selected] == [150, 150, 23]
        assert len(np.intersect1d(outcome.selected[2], farthest)) > 15
        assert outcome.probe == 0
    assert np.array_equal(runs["deviation"][0].selected[2], runs["deviation_sliced"][0].selected[2])
    np.testing.assert_allclose(runs["deviation"][1], runs["deviation_sliced"][1], atol=1e-4)
    # `selected` puts back what it does not take on, `all` does not.
    for name, back in (("selected", True), ("deviation", False)):
        outcome, after = runs[name]
        dropped = np.setdiff1d(moved, outcome.selected[2])
        same_rows = (after[1][:, dropped] == stale[1][:, dropped]).all(axis=(0, 2, 3))
        assert same_rows.all() if back else not same_rows.any()
    # The probe runs forced rows and suffix through all layers.
    assert runs["query"][0].probe == 3 * (10 + 30)
    assert runs["query_in_part"][0].probe == 3 * (10 + 224 - 200)
    for name in ("query", "query_sliced", "query_in_part"):
        assert [len(rows) for rows in runs[name][0].selected] == [15] * 3
    assert np.array_equal(runs["query"][0].selected[0], runs["query_sliced"][0].selected[0])
    assert not np.array_equal(runs["query"][0].selected[0], runs["query_in_part"][0].selected[0])
