import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, SmolLM3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lmc.model.rope import rotations_of

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


def config_with(**rope: object) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters=rope,
    )


def rotate(k: torch.Tensor, cos: np.ndarray, sin: np.ndarray) -> torch.Tensor:
    a, b = k.chunk(2, dim=-1)
    c, s = torch.from_numpy(cos), torch.from_numpy(sin)
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("delta", [1, 257, 1500, -900])
def test_moved_key_equals_the_key_computed_there(kind: str, delta: int) -> None:
    config = config_with(**SCALINGS[kind])
    embedding = LlamaRotaryEmbedding(config)
    raw = torch.randn(1, 1, 5, 32, generator=torch.Generator().manual_seed(0))
    start = 1000 if delta < 0 else 7

    def at(position: int) -> torch.Tensor:
        cos, sin = embedding(raw, torch.arange(position, position + 5)[None])
        return apply_rotary_pos_emb(raw, raw, cos, sin)[1]

    moved = rotate(at(start), *rotations_of(config).ropes[0].angles(delta))
    # YaRN's magnitude is in both sides once: a rotation that applied it again would be off.
    torch.testing.assert_close(moved, at(start + delta), atol=3e-4, rtol=3e-4)


def test_fingerprint_tells_rotations_apart() -> None:
    fingerprints = {rotations_of(config_with(**s)).fingerprint for s in SCALINGS.values()}
    fingerprints.add(rotations_of(config_with(**SCALINGS["default"])).paired(True).fingerprint)
    assert len(fingerprints) == len(SCALINGS) + 1


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "'dynamic'"),
        (
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": 512,
            },
            "'longrope'",
        ),
    ],
)
def test_length_dependent_rotation_is_refused_by_name(rope: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}.*default, linear, llama3, yarn"):
        rotations_of(config_with(**rope))


def test_model_without_rope_is_refused() -> None:
    class NoRope:
        model_type = "gpt2"

    with pytest.raises(ValueError, match="'gpt2' has no RoPE"):
        rotations_of(NoRope())


def test_each_layer_turns_by_its_own_rotation() -> None:
    config = Gemma3TextConfig(
        hidden_size=128, num_attention_heads=4, head_dim=32, num_hidden_layers=7,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    )  # fmt: skip
    rotations = rotations_of(config)
    assert rotations.of == (0, 0, 0, 0, 0, 1, 0)
    assert rotations.runs() == [(0, 5, 0), (5, 6, 1), (6, 7, 0)]
    raw = torch.randn(1, 1, 5, 32, generator=torch.Generator().manual_seed(0))
    embedding = Gemma3RotaryEmbedding(config)
    cos, sin = rotations.angles(333)
    for which, name in enumerate(("sliding_attention", "full_attention")):
        here, there = (
            apply_rotary_pos_emb(raw, raw, *embedding(raw, torch.arange(at, at + 5)[None], name))[1]
            for at in (7, 340)
        )
        moved = rotate(here, cos[which], sin[which])
        torch.testing.assert_close(moved, there, atol=3e-4, rtol=3e-4)


def test_layers_that_turn_none_are_told_apart() -> None:
    fields = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "num_hidden_layers": 4,
              "pad_token_id": 0, "rope_parameters": SCALINGS["default"]}  # fmt: skip
    every, some = (SmolLM3Config(**fields, no_rope_layers=x) for x in ([1] * 4, [1, 0, 0, 1]))
    assert rotations_of(some).runs() == [(0, 1, 0), (1, 3, -1), (3, 4, 0)]
    assert rotations_of(some).fingerprint != rotations_of(every).fingerprint
    # What all layers share is what it was: what is stored is found again.
    assert rotations_of(every).fingerprint == rotations_of(every).ropes[0].fingerprint
    with pytest.raises(ValueError, match="no layer of model type 'smollm3' turns its keys"):
        rotations_of(SmolLM3Config(**fields, no_rope_layers=[0] * 4))
