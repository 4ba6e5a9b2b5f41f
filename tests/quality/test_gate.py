"""What the gate lets through, and what it says where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from lmc.blend.encoding import Context
from lmc.model.times import TierSpeed, TTFTModel
from lmc.quality import BLENDS
from lmc.quality.gate import ENCODED, admit, verdict
from lmc.quality.profile import QualityProfile
from lmc.store.record import ContextPolicy
from tests.quality.profiles import FULL


def ask(
    blend: Any,
    min_recovery: float = 0.3,
    profile: QualityProfile | None = FULL,
    uncalibrated: Any = "refuse",
) -> str | None:
    return verdict(blend, BLENDS.build(blend), profile, min_recovery, uncalibrated)


@pytest.mark.parametrize(
    "blend", ["prefix", "full_recompute", {"name": "replay", "by_layer": [[3]]}]
)
def test_what_cannot_lose_quality_passes(blend: Any) -> None:
    assert ask(blend, 1.0) is None
    assert ask(blend, 1.0, None) is None


def test_without_a_profile_nothing_is_moved() -> None:
    words = "no quality profile of this model with isolated chunks: run `lmc calibrate MODEL`"
    assert ask("epic", profile=None) == words
    assert ask("full_reuse", -9.0, None) == words
    assert ask("epic", profile=None, uncalibrated="allow") is None


@pytest.mark.parametrize(
    ("blend", "passes"),
    [
        ({"name": "epic", "link_tokens": 16}, True),
        ("epic", True),  # 16 by default
        ({"name": "epic", "link_tokens": 8}, True),  # 0.3, between 0.2 at 4 and 0.5 at 16
        ({"name": "epic", "link_tokens": 99}, True),  # as the greatest that was measured
        ({"name": "epic", "link_tokens": 7}, False),
        ({"name": "cacheblend", "tensor": "k", "ratio": 0.05}, True),
        ("full_reuse", False),
    ],
)
def test_recovery_must_reach_the_bound(blend: Any, passes: bool) -> None:
    assert (ask(blend) is None) == passes
    # That is not a matter of being calibrated.
    assert (ask(blend, uncalibrated="allow") is None) == passes


def test_refusals_are_one_clear_line() -> None:
    assert ask({"name": "epic", "link_tokens": 4}) == (
        "recovery of epic link_tokens=4 is 0.20 [0.10, 0.30], below min_recovery 0.3"
    )
    assert ask({"name": "cacheblend", "tensor": "k"}, 0.5) == (
        "recovery of cacheblend tensor=k ratio=0.15 is 0.30 [0.20, 0.40], below min_recovery 0.5"
    )
    assert ask({"name": "full_reuse", "rotate": False}) == (
        "recovery of full_reuse rotate=False is -2.00 [-2.10, -1.90], below min_recovery 0.3"
    )
    assert ask({"name": "epic", "link_tokens": 2}) == (
        "epic link_tokens=2 is not in the quality profile of this model "
        "(measured: link_tokens from 4 on)"
    )
    assert ask({"name": "random", "seed": 3}) == (
        "random seed=3 ratio=0.15 is not in the quality profile of this model "
        "(run `lmc calibrate MODEL --blend STRATEGY`)"
    )


@pytest.mark.parametrize(
    "blend",
    [
        {"name": "epic", "link_tokens": 2},
        {"name": "random", "ratio": 0.9},
        {"name": "cacheblend", "check_layer": 2, "ratio": 0.35},
        {"name": "union", "first": "epic", "second": "cacheblend"},
        {"name": "auto", "strategy": "epic"},
    ],
)
def test_what_was_not_measured_is_not_guessed(blend: Any) -> None:
    assert "is not in the quality profile" in (ask(blend, -9.0) or "")
    assert ask(blend, -9.0, uncalibrated="allow") is None


def test_a_controlled_strategy_is_judged_at_its_floor(tmp_path: Path) -> None:
    times = TTFTModel(0.0, 0.001, 0.0, 1000.0, (TierSpeed("host", 0.0, 1e6),))
    times.save(tmp_path / "times.yaml")
    blend = {"name": "controlled", "times": str(tmp_path / "times.yaml")}
    assert ask({**blend, "floor": 0.15}, 0.4) is None
    assert ask({**blend, "floor": 0.25}, 0.6) is None
    assert ask({**blend, "floor": 0.15}, 0.6) == (
        "recovery of cacheblend ratio=0.15 is 0.40 [0.30, 0.50], below min_recovery 0.6"
    )
    assert "ratio from 0.15 on" in (ask({**blend, "floor": 0.1}, 0.6) or "")


def test_an_automatic_strategy_is_resolved_and_judged_as_what_it_stands_for() -> None:
    def asked(blend: Any, bound: float | None, profile: QualityProfile | None = FULL) -> Any:
        return admit(blend, BLENDS.build(blend), profile, bound)

    auto = {"name": "auto", "strategy": "epic", "min_recovery": 0.3}
    eight = BLENDS.build({"name": "epic", "link_tokens": 8})
    assert asked(auto, 0.3) == asked(auto, None) == eight
    assert asked(auto, 0.4) == (
        "recovery of epic link_tokens=8 is 0.30 [0.20, 0.40], below min_recovery 0.4"
    )
    assert "no quality profile of this model to choose 'epic' by" in asked(auto, None, None)
    assert "best: link_tokens 32" in asked({**auto, "min_recovery": 0.9}, 0.3)


def test_without_a_bound_any_strategy_runs() -> None:
    for blend in ("full_reuse", "random"):
        strategy = BLENDS.build(blend)
        for profile in (FULL, None):
            assert admit(blend, strategy, profile, None) == strategy
            assert isinstance(admit(blend, strategy, profile, 0.3), str)


def test_a_missing_profile_is_asked_for_with_the_chunks_that_are_moved_here() -> None:
    strategy = BLENDS.build("epic")
    said = admit("epic", strategy, None, 0.2, context=ENCODED["shared_prefix"])
    assert said == (
        "no quality profile of this model with anchored chunks: "
        "run `lmc calibrate MODEL --context anchored`"
    )
    assert set(ENCODED) == set(get_args(ContextPolicy))
    assert set(ENCODED.values()) == set(get_args(Context))
