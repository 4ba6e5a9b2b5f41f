"""RoPE as far as moving stored keys needs it: K(p + delta) = R(delta) K(p).

That holds for every variant whose frequencies do not depend on the length of the prompt
(Su et al. 2021, arXiv 2104.09864): plain, linear, llama3 and YaRN scaling. YaRN's magnitude
scale is already inside the stored keys, so a rotation must not apply it again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from lmc.model.layers import layers_of

ROTATABLE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotation frequencies, of all layers that turn alike.

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


@dataclass(frozen=True, eq=False)
class Rotations:
    """How each layer of a model turns its keys.

    Attributes:
        ropes: the different rotations, each of as many dims.
        of: by layer, which of them it has; -1 where keys are not turned (NoPE).
    """

    ropes: tuple[Rope, ...]
    of: tuple[int, ...]

    @property
    def interleaved(self) -> bool:
        """How elements are paired, in all layers alike."""
        return self.ropes[0].interleaved

    def paired(self, interleaved: bool) -> Rotations:
        """The same with this pairing, which no config says; the model's code does."""
        return replace(self, ropes=tuple(replace(r, interleaved=interleaved) for r in self.ropes))

    def angles(self, delta: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin `[n, R / 2]` float32 of the n rotations for a move by `delta` positions; of
        deltas `[C]`, `[n, C, R / 2]`."""
        cos, sin = zip(*(rope.angles(delta) for rope in self.ropes), strict=True)
        return np.stack(cos), np.stack(sin)

    def runs(self) -> list[tuple[int, int, int]]:
        """Layers `[low, high)` that follow each other and turn alike, and by which rotation."""
        ends = [i + 1 for i, pair in enumerate(pairwise(self.of)) if pair[0] != pair[1]]
        return [(a, b, self.of[a]) for a, b in pairwise([0, *ends, len(self.of)])]

    @property
    def fingerprint(self) -> bytes:
        """Digest of all that makes rotated keys of two models incompatible."""
        if set(self.of) == {0}:
            return self.ropes[0].fingerprint
        text = b"".join(rope.fingerprint for rope in self.ropes) + repr(self.of).encode()
        return hashlib.sha256(text).digest()


def rotations_of(config: Any) -> Rotations:
    """Read the rotation of each layer of a Hugging Face text config, as if of halves of a head.

    Args:
        config: a transformers config (`rope_parameters` as of transformers 5).

    Raises:
        ValueError: no RoPE at all, rotations of different numbers of dims, or one whose
            frequencies depend on the prompt's length (dynamic NTK, LongRoPE), so that no rotation
            moves its keys; and what `layers_of` raises.
    """
    if not getattr(config, "rope_parameters", None):
        raise ValueError(
            f"model type {getattr(config, 'model_type', '?')!r} has no RoPE, so its keys cannot "
            f"be moved; rotatable types: {', '.join(ROTATABLE)}"
        )
    layers = layers_of(config)
    names = list(dict.fromkeys(layer.rope for layer in layers if layer.rope is not None))
    if not names:
        raise ValueError(f"no layer of model type {config.model_type!r} turns its keys by RoPE")
    ropes = tuple(_rope(config, name) for name in names)
    if len(turned := {2 * len(rope.inv_freq) for rope in ropes}) > 1:
        raise ValueError(
            f"RoPE turns {' and '.join(map(str, sorted(turned)))} elements of a head, by the kind "
            "of layer: not supported; as many in all layers are"
        )
    at = {name: i for i, name in enumerate(names)}
    return Rotations(ropes, tuple(-1 if x.rope is None else at[x.rope] for x in layers))


def _rope(config: Any, name: str) -> Rope:
    """One of a config's rotations: `default`, or that of a type of layers."""
    parameters = config.rope_parameters
    parameters = parameters if name == "default" else parameters[name]
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters.get("rope_type", "default")
    if kind not in ROTATABLE:
        raise ValueError(
            f"RoPE type {kind!r} cannot be re-rotated (its angles depend on more than the "
            f"distance moved); rotatable types: {', '.join(ROTATABLE)}"
        )
    if kind == "default":
        D = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None)
        D = D or config.hidden_size // config.num_attention_heads
        R = int(D * parameters.get("partial_rotary_factor", 1.0))
        # In float32, as the models themselves do: the moved key must meet the model's own
        # rounding of the frequencies, not the ideal ones.
        exponent = np.arange(0, R, 2, dtype=np.float32) / np.float32(R)
        inv_freq = (1.0 / np.float32(parameters["rope_theta"]) ** exponent).astype(np.float64)
    else:
        which = {} if name == "default" else {"layer_type": name}
        inv_freq = ROPE_INIT_FUNCTIONS[kind](config, "cpu", **which)[0].double().numpy()
    return Rope(inv_freq=inv_freq, interleaved=False, kind=kind)
