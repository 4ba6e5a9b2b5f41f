"""Layers as data: what configs of families say, and of sizes that they lack."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmc.model.cost import PrefillCost
from lmc.model.layers import Layer, bytes_by_kind, layers_of, summary
from lmc.model.reuse import exact_refusal, moved_refusal
from lmc.model.shape import KNOWN, shape_of

SIZES = {
    "num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}  # fmt: skip
MIXED = ["sliding_attention"] * 5 + ["full_attention"]


def kinds(**fields: Any) -> list[str]:
    return [layer.kind for layer in layers_of(SIZES | fields)]


@pytest.mark.parametrize("model", KNOWN)
def test_bytes_are_those_of_the_shape(model: str) -> None:
    layers = layers_of(KNOWN[model])
    assert (
        sum(bytes_by_kind(layers, 2).values()) == shape_of(KNOWN[model]).bytes_per_token("fp8") * 2
    )


def test_windows() -> None:
    assert kinds() == ["full"] * 6
    assert kinds(sliding_window=8) == ["sliding"] * 6
    assert kinds(sliding_window=8, use_sliding_window=False) == ["full"] * 6
    assert kinds(sliding_window=8, layer_types=MIXED) == ["sliding"] * 5 + ["full"]
    # Files of before configs listed their layers.
    assert kinds(sliding_window=8, model_type="gemma3_text") == ["sliding"] * 5 + ["full"]
    assert kinds(sliding_window=8, model_type="gemma2") == ["sliding", "full"] * 3
    (first, *_, last) = layers_of(SIZES | {"sliding_window": 8, "layer_types": MIXED})
    assert (first.window, last.window) == (8, 0)
    assert summary(layers_of(SIZES | {"sliding_window": 8, "layer_types": MIXED})) == (
        "5 sliding (window 8), 1 full"
    )


def test_rotations_of_their_own_and_none() -> None:
    each = {
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        "full_attention": {
            "rope_theta": 1e6,
            "rope_type": "default",
            "partial_rotary_factor": 0.25,
        },
    }
    mixed = SIZES | {"sliding_window": 8, "layer_types": MIXED}
    layers = layers_of(mixed | {"rope_parameters": each})
    assert (layers[0].rope, layers[0].turned) == ("sliding_attention", 16)
    assert (layers[5].rope, layers[5].turned) == ("full_attention", 4)
    nope = layers_of(SIZES | {"no_rope_layers": [1, 1, 0] * 2})
    assert [layer.rope for layer in nope] == ["default", "default", None] * 2
    cohere = layers_of(mixed | {"model_type": "cohere2"})
    assert (cohere[0].rope, cohere[5].rope) == ("default", None)
    assert layers_of(SIZES | {"rope_parameters": None})[0].rope is None
    assert layers_of(SIZES | {"rope_parameters": None, "rope_theta": 1e4})[0].rope == "default"


def test_latents_states_and_what_is_shared() -> None:
    latent = {"kv_lora_rank": 32, "qk_rope_head_dim": 8}
    assert {layer.elements for layer in layers_of(SIZES | latent)} == {40}
    linear = layers_of(SIZES | {"layer_types": ["linear_attention"] * 3 + ["full_attention"] * 3})
    assert [layer.elements for layer in linear] == [0] * 3 + [64] * 3
    turns = ["sliding_attention", "full_attention"] * 3
    fields = {"num_kv_shared_layers": 2, "sliding_window": 8, "layer_types": turns}
    shared = layers_of(SIZES | fields)
    assert [layer.shared for layer in shared] == [None] * 4 + [2, 3]
    assert sum(bytes_by_kind(shared, 2).values()) == 4 * 64 * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention"] * 5 + ["hyena"]}, "layers of kind hyena; known: full"),
        ({"layer_types": ["full_attention"] * 5}, "got 5 layer_types of 6 layers"),
        ({"num_hidden_layers": 0}, "got num_hidden_layers 0"),
        ({"layer_types": MIXED, "sliding_window": "4k"}, "got sliding_window '4k'"),
    ],
)
def test_what_is_not_known_is_a_reason(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="model config") as caught:
        layers_of(SIZES | fields)
    assert message in str(caught.value)
    config = SimpleNamespace(**(SIZES | fields))
    assert message in (exact_refusal(config) or "") and message in (moved_refusal(config) or "")


def test_what_is_refused_is_refused_for_that_alone() -> None:
    def refusals(**fields: Any) -> tuple[str | None, str | None]:
        config = SimpleNamespace(**(SIZES | {"model_type": "some"} | fields))
        return exact_refusal(config), moved_refusal(config)

    assert refusals() == (None, None)
    assert refusals(no_rope_layers=[1, 1, 0] * 2) == (None, None)
    assert refusals(sliding_window=8) == (None, None)
    dynamic = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    exact, moved = refusals(rope_parameters=dynamic)
    assert exact is None and "RoPE type 'dynamic' cannot be re-rotated" in str(moved)
    exact, moved = refusals(layer_types=["linear_attention"] * 6)
    assert exact == moved == "layers that keep a state in place of keys: 6 linear"


@pytest.mark.parametrize("layer", [Layer("full"), Layer("sliding", 7), Layer("chunked", 5)])
def test_what_rows_see_adds_up(layer: Layer) -> None:
    """A row sees keys from the first to itself; a window's own width is the most that it sees."""
    rows = np.arange(40)
    seen = rows + 1 - layer.first_key(rows)
    assert (seen >= 1).all() and seen.max() <= (layer.window or 40)
    assert [layer.keys_seen(n) for n in range(41)] == [0, *np.cumsum(seen)]
    assert layer.keys_seen(np.arange(41)).tolist() == [0, *np.cumsum(seen)]


def test_windows_make_late_rows_cheap() -> None:
    layers = (Layer("sliding", 10), Layer("full"))
    cost = PrefillCost(linear=0.0, attention=1.0, layers=layers)
    assert cost.flops(30, 31) == (10 + 31) / 2
    assert cost.of_layer(0, np.array([30, 31]), 2) == 10
    assert cost.fraction([(0, 40, 1.0)], 40) == 1.0
    assert PrefillCost(0.0, 1.0).flops(30, 31) == 31
