"""Hostile requests, changed weights, unknown pages: a real engine goes on and answers rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.connectors.vllm.engine import run_scenario
from tests.connectors.vllm.test_engine import same
from tests.connectors.vllm.trust import fuzz

pytestmark = pytest.mark.engine

SCENARIO = "tests.connectors.vllm.trust:"


def ran(scenario: str, model: Path, tmp_path: Path, requests: int, timeout: float) -> Any:
    disk = {"name": "disk", "path": str(tmp_path / "kv"), "capacity": "64MiB"}
    return run_scenario(
        SCENARIO + scenario,
        model,
        tmp_path,
        given=(requests,),
        timeout=timeout,
        lmc={"controls": False, "tiers": [disk]},
        enable_prompt_embeds=True,
    )


@pytest.fixture(scope="module")
def trust(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ran("trust", tiny_llama_dir, tmp_path_factory.mktemp("trust"), 300, 280)


def check_fuzz(result: Any, requests: int) -> None:
    assert not result["wrong"], "\n".join(result["wrong"][:20])
    assert result["requests"] >= requests
    assert result["blended"] > requests / 50  # some of them do what they ask for
    assert result["counts"]["plain:bad_request"] > requests / 20
    assert "requests_given_up" not in result["counts"]


def test_no_request_stops_the_engine_or_reaches_what_it_must_not(trust: Any) -> None:
    check_fuzz(trust["fuzz"], 300)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(2400)
def test_twenty_thousand_requests(tiny_llama_dir: Path, tmp_path: Path) -> None:
    check_fuzz(ran(fuzz.__name__, tiny_llama_dir, tmp_path, 20_000, 2300), 20_000)


def test_embeddings_are_never_taken_for_tokens(trust: Any) -> None:
    result = trust["embeds"]
    assert result["other"].tokens != result["plain"].tokens
    same(result["got"], result["plain"])
    assert result["got"].report["reason"] == "prompt_embeds"
    assert result["got"].kinds == {"new": 130}


def test_a_request_that_lmc_fails_on_is_vllms(trust: Any) -> None:
    result = trust["given_up"]
    for name in ("planning", "waiting", "leasing"):
        same(result[name], result["plain"])
        assert result[name].report["reason"] == "failed:PanicError"
    for name in ("planning", "waiting", "leasing", "keeping"):
        same(result[f"{name}_after"], result["plain"])
    assert result["counts"]["requests_given_up"] == 3
    assert result["counts"]["saves_given_up"] >= 1


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        ("unknown_backend", "engine:its pages are not known: .*CPU_ATTN is unknown"),
        ("swapped", "engine:what layer 0 wrote into pages is not what is read from them"),
        ("shifted", "engine:what layer 0 wrote"),
        ("one_layer", "engine:what layer 2 wrote"),
    ],
)
def test_pages_that_cannot_be_read_rule_out_everything(
    trust: Any, spoilt: str, reason: str
) -> None:
    result = trust["degraded"]
    same(result[spoilt], result["plain"])
    assert result[spoilt].kinds == {"new": 200}
    with pytest.raises(ValueError, match=reason):
        raise ValueError(result[spoilt].report["reason"])


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        ("cannot_attend", "blending_refused:rows cannot attend here: .*sinks"),
        ("no_rope_in_one_layer", "blending_refused:keys of layer 1 moved by 100 positions differ"),
        ("another_loop", "blending_refused:the layer loop differs from model.forward"),
    ],
)
def test_what_rules_out_blending_leaves_exact_reuse(trust: Any, spoilt: str, reason: str) -> None:
    result = trust["degraded"]
    assert result[spoilt].kinds == {"exact": 110, "new": 90}
    with pytest.raises(ValueError, match=reason):
        raise ValueError(result[spoilt].report["reason"])


def test_where_steps_overlap_nothing_is_claimed_that_could_not_be_mended(trust: Any) -> None:
    result = trust["degraded"]
    same(result["overlapping"], result["plain"])
    assert result["overlapping"].kinds == {"new": 200}
    assert "engine:with async scheduling" in result["overlapping"].report["reason"]
    # Rows can be computed here, if not moved.
    assert result["overlapping_unrotated"].kinds == {"exact": 110, "new": 90}


def test_all_is_well_once_nothing_is_spoilt(trust: Any) -> None:
    result = trust["degraded"]
    assert result["refusal"] == (None, None)
    assert result["mended"].kinds == {"exact": 110, "moved": 62, "recomputed": 8, "new": 20}


@pytest.mark.parametrize(
    "way", ["in_place", "behind_the_back", "swapped_storage", "by_a_trainer", "named"]
)
def test_chunks_of_other_weights_are_never_loaded(trust: Any, way: str) -> None:
    result = trust["weights"][way]
    assert result["plain"].tokens != trust["weights"]["first"].tokens
    same(result["got"], result["plain"])
    same(result["again"], result["plain_longer"])
    # What the first one computed is found by the second.
    assert result["again"].report["kinds"]["exact"] > 0


def test_weights_that_have_a_name_are_found_again(trust: Any) -> None:
    result = trust["weights"]
    # Planned for the name before, and computed all the same.
    assert result["other_name"].kinds == {"recomputed": 200}
    same(result["other_name"], result["named"]["plain"])
    same(result["same_name"], result["named"]["plain"])
    assert result["same_name"].report["kinds"]["exact"] > 0
    assert result["same_name"].report["bytes"].keys() >= {"disk"}


def test_reloaded_weights_find_what_was_stored_before(trust: Any) -> None:
    result = trust["weights"]
    same(result["reloading"], result["first"])
    same(result["reloaded"], result["first"])
    assert result["reloaded"].report["kinds"]["exact"] > 0
    assert result["reloaded"].report["bytes"].keys() >= {"disk"}


def test_kv_of_two_weights_is_kept_by_nobody(trust: Any) -> None:
    for pair in (*trust["weights"]["running"], *trust["weights"]["noticed"]):
        same(*pair)
    same(*trust["weights"]["unreset"])
    same(*trust["weights"]["ended"])
