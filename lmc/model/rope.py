"""RoPE as far as moving stored keys needs it: K(p + delta) = R(delta) K(p).

That holds for every variant whose frequencies do not depend on the length of the prompt
(Su et al. 2021, arXiv 2104.09864): plain, linear, llama3 and YaRN scaling. YaRN's magnitude
scale is already inside the stored keys, so a rotation must not apply it again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

ROTATABLE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotation frequencies of one model.

    Attributes:
        inv_freq: `[R / 2]` float64, radians per position; R <= D dims are rotated.
        interleaved: pairs are (2i, 2i + 1) when true, (i, i + R/2) (NeoX) when false.
        kind: the scaling's name in the model config.
    """

    inv_freq: np.ndarray
    interleaved: bool
    kind: str

    def angles(self, delta: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin `[R / 2]` float32 of a move by `delta` positions; of deltas `[C]`, of each.

        The product delta · inv_freq is taken in float64: in float32 it is off by up to
        6e-3 rad at delta = 1e5.
        """
        angle = np.multiply.outer(delta, self.inv_freq)
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    @property
    def fingerprint(self) -> bytes:
        """Digest of all that makes rotated keys of two models incompatible."""
        text = f"{self.kind}|{self.interleaved}|".encode() + self.inv_freq.tobytes()
        return hashlib.sha256(text).digest()


def from_config(config: Any, *, interleaved: bool = False) -> Rope:
    """Read the rotation of a Hugging Face text config.

    Args:
        config: a transformers config (`rope_parameters` as of transformers 5).
        interleaved: the pairing, which a config does not say; the model's code does.

    Raises:
        ValueError: no RoPE at all, one per layer type, or one whose frequencies depend on
            the prompt's length (dynamic NTK, LongRoPE), so that no rotation moves its keys.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ValueError(
            f"model type {getattr(config, 'model_type', '?')!r} has no RoPE, so its keys cannot "
            f"be moved; rotatable types: {', '.join(ROTATABLE)}"
        )
    if "rope_theta" not in parameters:
        raise ValueError(
            f"RoPE differs between layer types {sorted(parameters)}: not supported; "
            f"one of {', '.join(ROTATABLE)} for all layers is"
        )
    kind = parameters.get("rope_type", "default")
    if kind not in ROTATABLE or "mrope_section" in parameters:
        kind = "mrope" if "mrope_section" in parameters else kind
        raise ValueError(
            f"RoPE type {kind!r} cannot be re-rotated (its angles depend on more than the "
            f"distance moved); rotatable types: {', '.join(ROTATABLE)}"
        )
    if kind == "default":
        D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        R = int(D * parameters.get("partial_rotary_factor", 1.0))
        # In float32, as the models themselves do: the moved key must meet the model's own
        # rounding of the frequencies, not the ideal ones.
        exponent = np.arange(0, R, 2, dtype=np.float32) / np.float32(R)
        inv_freq = (1.0 / np.float32(parameters["rope_theta"]) ** exponent).astype(np.float64)
    else:
        inv_freq = ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0].double().numpy()
    return Rope(inv_freq=inv_freq, interleaved=interleaved, kind=kind)
