"""What of a model's KV is reused exactly, what is moved, and what is not, by its config alone.

An engine looks again when it starts, and at the model itself: what differs there is refused too.
"""

from __future__ import annotations

from typing import Any

from lmc.model.layers import layers_of, summary
from lmc.model.rope import from_config

# Kinds of layers whose KV is stored and put back; what a query sees of others is not built yet.
EXACT = ("full",)


def exact_refusal(config: Any) -> str | None:
    """Why nothing of a model's KV is reused, not even behind the very same text; None if it is.

    Args:
        config: a text config of transformers.
    """
    try:
        layers = layers_of(config)
    except ValueError as e:
        return str(e)
    if other := tuple(layer for layer in layers if layer.kind not in EXACT):
        return f"layers that are not full attention: {summary(other)}"
    if any(layer.shared is not None for layer in layers):
        return "layers that use the KV of others"
    return None


def moved_refusal(config: Any) -> str | None:
    """Why no chunk of a model is moved to another position; None if it is. Args as above."""
    if reason := exact_refusal(config):
        return reason
    try:
        from_config(config)
    except ValueError as e:
        return str(e)
    layers = layers_of(config)
    unturned = sum(layer.rope is None for layer in layers)
    if unturned:
        return f"RoPE in {len(layers) - unturned} layers and none in {unturned}"
    return None
