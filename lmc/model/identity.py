"""What makes the KV of two models the same KV: one namespace, whoever computes it."""

from __future__ import annotations

from typing import Any

from blake3 import blake3

from lmc.model.rope import Rotations

FORMAT_VERSION = 1  # of stored KV; a change makes all that was stored before unfindable


def first_token(config: Any) -> int | None:
    """The token that a model's prompts begin with, as far as its text config says so."""
    token = getattr(config, "bos_token_id", None)
    return token if isinstance(token, int) else None


def namespace_of(
    config_json: str,
    weights: bytes,
    dtype: str,
    rope: Rotations | None,
    *,
    computed_in: str | None = None,
    engine: str = "",
) -> bytes:
    """Digest, 32 bytes, of all that makes KV incompatible, but for what differs by request.

    Args:
        config_json: of the text model, as transformers writes it.
        weights: digest of its weights.
        dtype: of its KV.
        rope: its rotation; None where its keys cannot be moved.
        computed_in: dtype of the model's activations, where it is not that of the KV.
        engine: what else of the engine changes KV (quantisation of weights as they are loaded).
    """
    digest = blake3(b"lmc-kv" + bytes([FORMAT_VERSION]))
    digest.update(config_json.encode())
    digest.update(weights)
    digest.update(dtype.encode())
    digest.update(rope.fingerprint if rope is not None else b"no rope")
    if computed_in not in (None, dtype):
        digest.update(f"|computed in {computed_in}".encode())
    if engine:
        digest.update(f"|engine {engine}".encode())
    return digest.digest()
