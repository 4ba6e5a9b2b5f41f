"""Families whose layers are not all alike, each tiny and random, in an engine of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.hf.tiny import MIXED, decoder
from tests.connectors.vllm.engine import BLOCK, run_scenario
from tests.connectors.vllm.scenarios import Answer

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096, "rope_theta": 1.5e5,
}  # fmt: skip
# Blended too: two rotations and windows; windows and capped logits; windows, which alone turn keys.
BLENDED = ("Gemma3", "Gemma2", "Cohere2")
# Of these the layer loop is not the model's own, or no rotation of a known kind is found.
EXACT: dict[str, dict[str, Any]] = {
    "GptOss": {"rope_parameters": YARN},
    "SmolLM3": {},
    "Exaone4": {"sliding_window": 24, "layer_types": MIXED},
}


def answers(family: str, tmp_path: Path, **options: Any) -> dict[str, Answer]:
    model = tmp_path / "model"
    decoder(family, **IDS | options).save_pretrained(model)
    answers: dict[str, Answer] = run_scenario(
        "tests.connectors.vllm.families:layers", model, tmp_path,
        kv_cache_memory_bytes=40 * BLOCK * 4 * 2 * 2 * 32 * 4,  # L, K and V, G, D, b
        disable_hybrid_kv_cache_manager=True,
    )  # fmt: skip
    return answers


def same(one: Answer, other: Answer) -> bool:
    return one.tokens == other.tokens and bool(np.abs(one.logprobs - other.logprobs).max() < 1e-4)


@pytest.mark.engine
@pytest.mark.parametrize("family", BLENDED)
def test_layers_of_several_kinds_are_reused_and_blended(family: str, tmp_path: Path) -> None:
    got = answers(family, tmp_path)
    plain = got["plain"]
    for name in ("recompute", "all_by_deviation", "all_by_query"):
        assert got[name].kinds == {"exact": 110, "recomputed": 140, "new": 20}, name
        assert same(got[name], plain), name
    assert got["exact"].kinds == {"exact": 269, "recomputed": 1}
    assert same(got["exact"], plain)
    assert got["turn"].kinds == {"exact": 281, "new": 71}
    assert same(got["turn"], got["turn_plain"])
    # Where not all is computed it shows, and computing more brings it nearer in the end.
    assert got["reuse"].kinds == {"exact": 110, "moved": 140, "new": 20}
    assert not same(got["reuse"], plain)
    assert got["epic"].kinds == {"exact": 110, "moved": 124, "recomputed": 16, "new": 20}


@pytest.mark.engine
@pytest.mark.parametrize("family", EXACT)
def test_what_cannot_be_blended_is_reused_where_it_is_exact(family: str, tmp_path: Path) -> None:
    got = answers(family, tmp_path, **EXACT[family])
    for name in ("recompute", "reuse", "epic", "cacheblend", "query"):
        assert got[name].kinds == {"exact": 110, "new": 160}, name
        assert got[name].report["reason"].startswith("blending_refused:"), name
        assert same(got[name], got["plain"]), name
    assert got["exact"].kinds == {"exact": 269, "recomputed": 1}
    assert same(got["exact"], got["plain"]) and same(got["turn"], got["turn_plain"])


@pytest.mark.engine
def test_windows_with_a_cache_of_their_own_are_refused_by_name(tmp_path: Path) -> None:
    model = tmp_path / "model"
    decoder("Gemma3").save_pretrained(model)
    scenario = "tests.connectors.vllm.families:refused"
    said = run_scenario(scenario, model, tmp_path, kv_cache_memory_bytes=1 << 22)
    assert said["reason"] == (
        "engine:several kv cache groups; with --disable-hybrid-kv-cache-manager there is one"
    )
    assert said["plain"]
