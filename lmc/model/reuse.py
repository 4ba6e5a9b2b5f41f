"""What of a model's KV is reused exactly, what is moved, and what is not, by its config alone.

An engine looks again when it starts, and at the model itself: what differs there is refused too.
"""

from __future__ import annotations

from typing import Any

from lmc.model.layers import layers_of, summary
from lmc.model.rope import rotations_of

# Kinds of layers that keep keys and values of every token, or latents of both, which are stored and
# put back.
KEYS = ("full", "sliding", "chunked", "latent")
STATES = ("linear", "none")  # that keep none: a state in their place, or nothing


def exact_refusal(config: Any, states: bool = False) -> str | None:
    """Why nothing of a model's KV is reused, not even behind the very same text; None if it is.

    Args:
        config: a text config of transformers.
        states: whether layers that keep a state in place of keys are reused too, as they are where
            an engine keeps states at the ends of blocks.
    """
    try:
        layers = layers_of(config)
    except ValueError as e:
        return str(e)
    if states and any(layer.kind in KEYS for layer in layers):
        layers = tuple(layer for layer in layers if layer.kind not in STATES)
    if other := tuple(layer for layer in layers if layer.kind not in KEYS):
        if all(layer.kind in STATES for layer in other):
            return f"layers that keep a state in place of keys: {summary(other)}"
        return f"layers whose KV is not reused yet: {summary(other)}"
    if any(layer.shared is not None for layer in layers):
        return "layers that use the KV of others"
    if len({(layer.heads, layer.key, layer.value) for layer in layers}) > 1:
        return "layers whose KV has different sizes"
    if layers[0].kind != "latent" and layers[0].key != layers[0].value:
        return f"keys of {layers[0].key} elements a head beside values of {layers[0].value}"
    return None


def moved_refusal(config: Any) -> str | None:
    """Why no chunk of a model is moved to another position; None if it is. Args as above."""
    if reason := exact_refusal(config):
        return reason
    try:
        rotations_of(config)
    except ValueError as e:
        return str(e)
    return None
