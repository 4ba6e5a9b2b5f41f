"""Profiles made by hand."""

from __future__ import annotations

from typing import Any

from lmc.quality.profile import Measured, QualityProfile

WEIGHTS, ROPE = bytes(range(32)), bytes(reversed(range(32)))
MODEL = (WEIGHTS, "float32", ROPE)


def measured(blend: dict[str, Any], recovery: float) -> Measured:
    return Measured(
        blend=blend,
        recovery=recovery,
        low=recovery - 0.1,
        high=recovery + 0.1,
        compute_fraction=0.1,
        kl=0.5,
        prompts=16,
    )


def profile(*rows: Measured) -> QualityProfile:
    return QualityProfile(
        model="tiny/model",
        weights=WEIGHTS.hex(),
        dtype="float32",
        rope=ROPE.hex(),
        lmc_version="0.1.0",
        git_commit=None,
        workloads=[{"name": "pydoc"}],
        prompts=16,
        context="isolated",
        rows=list(rows),
    )


def epic(link_tokens: int, recovery: float) -> Measured:
    return measured({"name": "epic", "link_tokens": link_tokens}, recovery)


def cacheblend(ratio: float, recovery: float, tensor: str = "v") -> Measured:
    return measured({"name": "cacheblend", "tensor": tensor, "ratio": ratio}, recovery)


FULL = profile(
    measured({"name": "full_reuse"}, 0.0),
    measured({"name": "full_reuse", "rotate": False}, -2.0),
    epic(32, 0.6),
    epic(4, 0.2),
    epic(16, 0.5),
    cacheblend(0.05, 0.3, "k"),
    cacheblend(0.15, 0.4),
    cacheblend(0.35, 0.8),
)
