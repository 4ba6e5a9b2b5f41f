"""What each layer of a decoder keeps of a token, and which keys its queries see, as data.

The names are those of Hugging Face configs (`layer_types`, `sliding_window`, `rope_parameters`),
which vLLM reads too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["full", "sliding", "chunked", "latent", "indexed", "linear", "none"]

# Of `layer_types`; what is not here is nobody's that lmc knows.
KINDS: dict[str, Kind] = {
    "full_attention": "full", "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "indexed_attention": "indexed",
    "linear_attention": "linear", "mamba": "linear", "conv": "linear",
    "moe": "none", "mlp": "none",
}  # fmt: skip
# Families whose windows no field lists layer by layer: every so many layers one is full.
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4}
# Where layers with a window stand beside full ones, the full ones do not turn their keys.
_FULL_UNTURNED = ("cohere2", "exaone4")
_SINKS = ("gpt_oss",)  # a learned logit a head that every query sees beside the keys


@dataclass(frozen=True)
class Layer:
    """One layer, as far as KV cache is concerned.

    Attributes:
        kind: full: a query sees every key before it; sliding: the last `window`, itself included;
            chunked: those of its own `window` tokens; latent: full, over what MLA compresses;
            indexed: those of the latents that an index of its own chooses; linear: a state in place
            of keys; none: no attention.
        window: tokens; 0 where there is none.
        heads: kv heads G. key, value: elements of a head. A latent counts as one head whose value
            is its key's.
        rope: name of its rotation among the model's, or None where keys are not turned.
        turned: elements of a head that are rotated.
        sinks: whether it has learned ones.
        cap: of logits, tanh; 0 without.
        shared: the layer whose KV it uses, or None for its own.
    """

    kind: Kind
    window: int = 0
    heads: int = 0
    key: int = 0
    value: int = 0
    rope: str | None = None
    turned: int = 0
    sinks: bool = False
    cap: float = 0.0
    shared: int | None = None

    def first_key(self, rows: Any) -> Any:
        """The first position that queries at positions `rows`, an int or an array, see."""
        if self.kind == "sliding":
            return np.maximum(rows - self.window + 1, 0)
        return rows // self.window * self.window if self.kind == "chunked" else rows * 0

    def keys_seen(self, n: Any) -> Any:
        """Keys that the queries at positions 0..n - 1 see, all together; n as `rows`."""
        if self.kind == "chunked":
            whole, rest = n // self.window, n % self.window
            return (whole * self.window * (self.window + 1) + rest * (rest + 1)) / 2
        near = np.minimum(n, self.window) if self.kind == "sliding" else n
        return near * (near + 1) / 2 + (n - near) * self.window

    @property
    def elements(self) -> int:
        """Of KV that a token has here."""
        return 0 if self.shared is not None else self.heads * (self.key + self.value)


def layers_of(config: Any) -> tuple[Layer, ...]:
    """The layers of a text config, an object of transformers or the dict of a config.json.

    Raises:
        ValueError: a size that the config lacks, or a kind of layer that is not known.
    """
    config = _value(config, "text_config") or config
    L = _size(config, "num_hidden_layers")
    kinds = _kinds(config, L)
    shared = _value(config, "num_kv_shared_layers") or 0
    layers: list[Layer] = []
    for i, kind in enumerate(kinds):
        layer = _layer(config, i, kind)
        if i >= L - shared > 0:  # Gemma 3n and 4: the last layer of its kind that has its own
            own = max(j for j in range(L - shared) if kinds[j] == kind)
            layer = Layer(**{**layer.__dict__, "shared": own})
        layers.append(layer)
    return tuple(layers)


def bytes_by_kind(layers: tuple[Layer, ...], b: int) -> dict[str, int]:
    """KV bytes of a token by kind of layer, at b bytes an element; of those that have any."""
    found: dict[str, int] = {}
    for layer in layers:
        if layer.elements:
            found[layer.kind] = found.get(layer.kind, 0) + layer.elements * b
    return found


def summary(layers: tuple[Layer, ...]) -> str:
    """Such as `15 sliding (window 512), 3 full`."""
    counts: dict[tuple[Kind, int], int] = {}
    for layer in layers:
        counts[layer.kind, layer.window] = counts.get((layer.kind, layer.window), 0) + 1
    return ", ".join(
        f"{n} {kind}" + (f" (window {window:,})" if window else "")
        for (kind, window), n in counts.items()
    )


# -- parts -------------------------------------------------------------------------------


def _layer(config: Any, i: int, kind: Kind) -> Layer:
    if kind in ("linear", "none"):
        return Layer(kind)
    here = _of_layer(config, i)
    rope = _rope_of(config, i, kind)
    if rank := _value(config, "kv_lora_rank"):
        turned = _size(config, "qk_rope_head_dim")
        kind = "latent" if kind == "full" else kind
        return Layer(kind, heads=1, key=rank + turned, rope=rope, turned=turned if rope else 0)
    H, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    D = _value(here, "head_dim") or hidden // H
    G = _value(here, "num_key_value_heads") or H
    factor = _rotated(config, rope) if rope else 0.0
    windows = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
    return Layer(
        kind,
        window=_size(here, windows[kind]) if kind in windows else 0,
        heads=G,
        key=D,
        value=_value(here, "v_head_dim") or D,
        rope=rope,
        turned=int(D * factor),
        sinks=_value(config, "model_type") in _SINKS,
        cap=float(_value(config, "attn_logit_softcapping") or 0.0),
    )


def _kinds(config: Any, L: int) -> list[Kind]:
    named = _value(config, "layer_types") or _value(config, "layers_block_type")
    window = _value(config, "sliding_window")
    if named is None:
        every = _FULL_EVERY.get(str(_value(config, "model_type")))
        every = every or _value(config, "sliding_window_pattern")
        # Qwen2 and its kin carry a width that `use_sliding_window: false` switches off.
        if not window or _value(config, "use_sliding_window") is False:
            return ["full"] * L
        if not every:
            return ["sliding"] * L
        return ["sliding" if (i + 1) % every else "full" for i in range(L)]
    if unknown := sorted({str(name) for name in named} - KINDS.keys()):
        raise ValueError(
            f"model config: got layers of kind {', '.join(unknown)}; known: {', '.join(KINDS)}"
        )
    if len(named) != L:
        raise ValueError(f"model config: got {len(named)} layer_types of {L} layers")
    return [KINDS[str(name)] for name in named]


def _rope_of(config: Any, i: int, kind: Kind) -> str | None:
    """Which of the model's rotations a layer has."""
    turns = _value(config, "no_rope_layers")  # 1 where it does: the field's name says otherwise
    if turns is not None and len(turns) > i and not turns[i]:
        return None
    windowed = _value(config, "sliding_window") is not None
    if kind == "full" and windowed and _value(config, "model_type") in _FULL_UNTURNED:
        return None
    parameters = _value(config, "rope_parameters")
    if not parameters:
        # A config.json of before transformers 5 has the base alone.
        return "default" if _value(config, "rope_theta") or _value(config, "rope_scaling") else None
    if "rope_theta" in parameters or "rope_type" in parameters:
        return "default"
    for name in parameters:
        if KINDS.get(name) == kind:
            return str(name)
    return None


def _rotated(config: Any, rope: str) -> float:
    """Share of a head that is turned."""
    parameters = _value(config, "rope_parameters") or {}
    of = parameters if rope == "default" else parameters[rope]
    factor = of.get("partial_rotary_factor") or _value(config, "partial_rotary_factor")
    return float(factor or 1.0)


def _of_layer(config: Any, i: int) -> Any:
    """Where sizes are that may differ from layer to layer."""
    each = getattr(config, "per_layer_config", None)
    return config if each is None else each[i]


def _value(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _size(config: Any, name: str) -> int:
    found = _value(config, name)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"model config: got {name} {found!r}, want a positive integer")
    return found
