"""Which models are taken, what is said of the others, and that none is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmc.connectors.hf import HFModel, answer
from lmc.connectors.hf.check import small
from tests.connectors.hf.tiny import (
    CHUNKS,
    FAMILIES,
    MIXED,
    QUESTION,
    SYSTEM,
    TOKENS,
    T,
    decoder,
    far,
    reference,
    tiny,
)

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 512}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 256}  # fmt: skip

NOPE = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_the_models_own(family: str) -> None:
    model = tiny(family)
    right = reference(model)
    assert far(model.prefill(np.array(TOKENS), logits_from=0).logits, right) < 1e-5
    split = model.prefill(np.array(TOKENS), logits_from=100, split=77, record=True)
    assert far(split.logits, right[100:]) < 1e-5
    assert split.outputs is not None
    assert split.outputs.shape == (4, T - 100, 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_shifting_every_position_equally_changes_nothing(family: str) -> None:
    model = tiny(family)
    shifted = model.prefill(np.array(TOKENS), np.arange(T) + 300, logits_from=0)
    assert far(shifted.logits, reference(model)) < 1e-3


@pytest.mark.parametrize("rope", [YARN, LLAMA3], ids=lambda rope: rope["rope_type"])
def test_scaled_rope_that_is_still_a_rotation_is_taken(rope: dict[str, Any]) -> None:
    model = HFModel(decoder("Llama", rope_parameters=rope))
    parts = [SYSTEM, *CHUNKS, QUESTION]
    result = answer(model, None, parts, "full_recompute", compare=True)
    assert result.report["kl_last"] < 1e-9
    assert answer(model, None, parts, compare=True).report["kl_last"] > 1e-3


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "RoPE type 'dynamic' cannot be re-rotated (its angles depend on more than the distance "
            "moved); rotatable types: default, linear, llama3, yarn",
        ),
        # Their layers run, but what comes out is not what the model makes of it.
        ("Granite", {"embedding_multiplier": 8.0}, "GraniteForCausalLM: logits differ from the"),
    ],
)
def test_a_model_that_cannot_be_blended_is_refused(
    family: str, options: dict[str, Any], words: str
) -> None:
    model = decoder(family, **options)
    before = model.config._attn_implementation
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are the test
        HFModel(model)
    assert words in str(error.value)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Granite", {"logits_scaling": 8.0}),
        # Layers from the first one on, and the last one alone, turn no keys.
        ("SmolLM3", NOPE | {"no_rope_layers": [0, 0, 1, 1]}),
        ("SmolLM3", NOPE | {"no_rope_layers": [1, 1, 1, 0]}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
        ("Exaone4", {"sliding_window": 24, "layer_types": MIXED}),
        ("Olmo3", {"sliding_window": 24, "layer_types": MIXED}),
        # A part of a head turns; their layers end in another norm, or hand no argument on.
        ("Phi", {}),
        ("StableLm", {}),
    ],
)
def test_layers_of_other_kinds_are_taken(family: str, options: dict[str, Any]) -> None:
    model = HFModel(decoder(family, **options))
    parts = [SYSTEM, *CHUNKS, QUESTION]
    result = answer(model, None, parts, "full_recompute", compare=True)
    assert result.report["kl_last"] < 1e-9
    assert answer(model, None, parts, compare=True).report["kl_last"] > 1e-7


@pytest.mark.parametrize("family", ["Ernie4_5", "Glm4"])
def test_neighbours_may_be_turned_together(family: str) -> None:
    """Which elements make a pair no config says; Glm4 turns half of them."""
    model = HFModel(decoder(family, **NOPE))
    assert model.rotations.interleaved
    parts = [SYSTEM, *CHUNKS, QUESTION]
    result = answer(model, None, parts, "full_recompute", compare=True)
    assert result.report["kl_last"] < 1e-9


def test_a_model_without_rope_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match=r"'gpt2' has no RoPE.*rotatable types: default, linear"):
        HFModel(model)


def test_latents_that_an_index_chooses_of_are_refused() -> None:
    with pytest.raises(ValueError, match=r"DeepseekV32ForCausalLM: .*: 2 indexed"):
        HFModel(small("deepseek_v32"))


def test_of_latents_one_array_is_stored() -> None:
    """What both make of a token's keys and values, and what turns of them."""
    model = tiny("DeepseekV3")
    assert model.layout.shape(7) == (4, 1, 7, 1, 48 + 16)
    assert model.layout.bytes_per_token == 4 * 64 * 4
    assert model.prefill(np.array(TOKENS)).pages.rows(0, T).shape == (4, 1, T, 1, 64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_as_it_was(attention: str) -> None:
    model = decoder("Llama")
    model.set_attn_implementation(attention)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        before = model(ids).logits
    for strategy in ("cacheblend", "ape"):
        answer(model, None, [SYSTEM, *CHUNKS, QUESTION], strategy, max_new_tokens=2)
    assert model.config._attn_implementation == attention
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_a_failing_forward_leaves_the_model_as_it_was() -> None:
    model = HFModel(decoder("Llama"))
    before = model.model.config._attn_implementation
    with pytest.raises(IndexError):
        model.prefill(np.array([1, 2, 512]))  # an id that the model does not have
    assert model.model.config._attn_implementation == before
