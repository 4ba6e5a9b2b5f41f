"""Families whose layers are not all alike, each tiny and random, in an engine of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.hf.tiny import MIXED, decoder
from tests.connectors.vllm.engine import BLOCK, run_scenario
from tests.connectors.vllm.scenarios import Answer
from tests.connectors.vllm.windowed import same

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096, "rope_theta": 1.5e5,
}  # fmt: skip
# Of vLLM's own models: two rotations and windows; latents; windows, learned sinks and experts.
# As transformers has it: layers that turn no keys.
FAST = ("Gemma3", "DeepseekV2", "GptOss", "SmolLM3", "Llama4")
# Capped logits; windows that alone turn keys; half of a head that turns, or a quarter; latents with
# compressed queries; and what else transformers runs.
SLOW = ("Gemma2", "Cohere2", "Exaone4", "Glm4", "StableLm", "DeepseekV3", "Olmo3", "Phi")
AS_TRANSFORMERS = ("SmolLM3", "Olmo3", "Phi")
# What vLLM's CPU backend knows of latents: 576 elements.
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
OPTIONS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 100},
    "GptOss": {"rope_parameters": YARN},
    # vLLM wants chunks of whole blocks of 32, and experts. Where queries grow with their position
    # plain answers of both engines are 0.03 apart.
    "Llama4": {
        "attention_chunk_size": 64,
        "moe_layers": [0, 1, 2, 3],
        "num_local_experts": 2,
        "attn_temperature_tuning": False,
    },
    "Exaone4": {"sliding_window": 24, "layer_types": MIXED},
    "Olmo3": {"sliding_window": 24, "layer_types": MIXED},
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
}


def answers(
    family: str, tmp_path: Path, hybrid: bool = False, across: bool = True, **options: Any
) -> dict[str, Any]:
    model = tmp_path / "model"
    options = OPTIONS.get(family, {}) | options
    decoder(family, **IDS | options).save_pretrained(model)
    # vLLM 0.32's operator for CPUs turns other rows than it is told, of queries and keys as these
    # models have them: such an engine would be refused.
    ours = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
    more: dict[str, Any] = ours if "kv_lora_rank" in options else {}
    elements = 576 if "kv_lora_rank" in options else 2 * 2 * 32  # K and V, G, D
    got: dict[str, Any] = run_scenario(
        "tests.connectors.vllm.families:layers", model, tmp_path, given=(across,),
        kv_cache_memory_bytes=40 * BLOCK * 4 * elements * 4,  # L, b
        disable_hybrid_kv_cache_manager=not hybrid, **more,
    )  # fmt: skip
    return got


@pytest.mark.engine
@pytest.mark.parametrize(
    ("family", "hybrid"),
    [
        *((one, False) for one in FAST),
        *((one, True) for one in ("Gemma3", "Mistral", "GptOss")),
        *(pytest.param(one, False, marks=pytest.mark.slow) for one in SLOW),
    ],
)
def test_layers_of_several_kinds_are_reused_and_blended(
    family: str, hybrid: bool, tmp_path: Path
) -> None:
    # vLLM changes the classes of transformers that it runs, so that they are no reference in its
    # process. And it computes Cohere 2 otherwise than transformers: plain answers are 0.1 apart.
    both = family not in (*AS_TRANSFORMERS, "Cohere2")
    got = answers(family, tmp_path, hybrid, across=both)
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
    # Both engines compute the same of the same rows.
    for name, both in got.get("across", {}).items():
        np.testing.assert_allclose(both["vllm"], both["hf"], atol=1e-4, err_msg=name)
        assert both["tokens"][0] == both["tokens"][1], name


@pytest.mark.engine
def test_what_cannot_be_blended_is_reused_where_it_is_exact(tmp_path: Path) -> None:
    """Its angles depend on how long a prompt may get."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    got = answers("Llama", tmp_path, across=False, rope_parameters=rope)
    for name in ("recompute", "reuse", "epic", "cacheblend", "query"):
        assert got[name].kinds == {"exact": 110, "new": 160}, name
        assert got[name].report["reason"].startswith("blending_refused:"), name
        assert same(got[name], got["plain"]), name
    assert got["exact"].kinds == {"exact": 269, "recomputed": 1}
    assert same(got["exact"], got["plain"]) and same(got["turn"], got["turn_plain"])


@pytest.mark.engine
def test_bfloat16_is_served_within_its_own_noise(tmp_path: Path) -> None:
    model = tmp_path / "model"
    decoder("Llama", **IDS).save_pretrained(model)
    got = run_scenario(
        "tests.connectors.vllm.families:rounded", model, tmp_path, dtype="bfloat16",
        kv_cache_memory_bytes=40 * BLOCK * 4 * 2 * 2 * 32 * 2,
    )  # fmt: skip
    floor = max(apart(got["plain"], got["plain_in_two"]), 2.0**-7)  # a step, of a number near 4
    assert got["plain_in_two"].kinds["local"] == 96
    assert got["recompute"].kinds == {"exact": 110, "recomputed": 140, "new": 20}
    assert got["exact"].kinds == {"exact": 269, "recomputed": 1}
    for name in ("recompute", "exact"):
        assert apart(got["plain"], got[name]) <= floor, name
    assert apart(got["plain"], got["reuse"]) > 10 * floor


def apart(one: Answer, other: Answer) -> float:
    """The largest difference of log-probabilities, as far as the tokens are the same."""
    n = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b),
             len(one.tokens))  # fmt: skip
    return float(np.abs(one.logprobs[: n + 1] - other.logprobs[: n + 1]).max())


@pytest.mark.engine
def test_windows_that_vllm_keeps_apart_are_seen_by_every_row_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    decoder("Gemma3", **IDS | {"sliding_window": 100}).save_pretrained(model)
    got = run_scenario(
        "tests.connectors.vllm.windowed:windows", model, tmp_path, given=(10,),
        max_model_len=768, kv_cache_memory_bytes=18 * BLOCK * 4 * 2 * 2 * 32 * 4,
    )  # fmt: skip
    local, long, losses, churn = (got[name] for name in ("local", "long", "losses", "churn"))
    # Rows right behind what vLLM holds itself see its windows.
    assert local["recompute"].kinds == {"local": 96, "exact": 14, "recomputed": 140, "new": 20}
    assert same(local["recompute"], local["plain"]) and same(local["exact"], local["plain"])
    assert local["epic"].kinds["moved"] == local["epic_alone"].kinds["moved"] == 124
    assert same(local["epic"], local["epic_alone"])
    # Of a prompt of many steps, and of its answer, everything is stored.
    assert long["again"].kinds == {"exact": 599, "recomputed": 1}
    assert same(long["again"], long["plain"])
    assert long["turn"].kinds == {"exact": 659, "new": 21}
    assert same(long["turn"], long["turn_plain"])
    # What is lost is computed, in parts where not all that its rows see has room.
    assert losses["one"].kinds == {"exact": 225, "recomputed": 20, "new": 25}
    for name in ("all", "whole", "in_parts"):
        assert losses[name].kinds["recomputed"] >= 245, name
    for name in ("one", "all", "whole", "in_parts"):
        assert same(losses[name], losses["plain"]), name
    assert same(losses["together"], losses["together_plain"])
    assert same(losses["beside"], losses["plain"])
    assert churn["wrong"] == [] and churn["lost"] == 0
    assert churn["preempted"] > 0
    assert churn["counts"]["deferred_for_windows"] > 0


@pytest.mark.engine
def test_what_is_kept_of_a_pool_is_never_wanted_for(tmp_path: Path) -> None:
    model = tmp_path / "model"
    decoder("Gemma3", **IDS | {"sliding_window": 100}).save_pretrained(model)
    got = run_scenario(
        "tests.connectors.vllm.windowed:small_pool", model, tmp_path, max_model_len=720,
        kv_cache_memory_bytes=17 * BLOCK * 4 * 2 * 2 * 32 * 4,
        lmc={"chunker": {"name": "fixed", "n": 620}, "memory_bytes": 2 << 20},
    )  # fmt: skip
    for name in ("long", "claim"):
        assert same(got[name], got[f"{name}_plain"]), name
    assert got["lost"] == 0 and got["evicted"] <= 0


@pytest.mark.engine
def test_of_windows_far_back_nothing_is_loaded(tmp_path: Path) -> None:
    model = tmp_path / "model"
    mixed = [*["sliding_attention"] * 5, "full_attention"]
    options = {"num_hidden_layers": 6, "layer_types": mixed, "sliding_window": 512}
    longest = {"max_position_embeddings": 8320}
    decoder("Gemma3", **IDS | options | longest).save_pretrained(model)
    got = run_scenario(
        "tests.connectors.vllm.windowed:far_back", model, tmp_path, max_model_len=8320,
        max_num_batched_tokens=2048, kv_cache_memory_bytes=2000 * BLOCK * 2 * 2 * 32 * 4,
    )  # fmt: skip
    assert got["exact"].kinds["exact"] > 8000 and same(got["exact"], got["plain"])
    assert got["moved"].kinds["moved"] > 6000
    for name in ("exact", "moved"):
        share = got[f"{name}_bytes"] / (8192 * got["bytes_per_token"])
        assert 1 / 6 < share < 0.25, (name, share)
