"""Sizes of a model as far as KV cache and prefill cost need them, read off its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmc.model.cost import PrefillCost
from lmc.model.layers import Layer, layers_of
from lmc.model.layout import KVLayout

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True)
class ModelShape:
    """A decoder.

    Attributes:
        L: layers; H: query heads; G: kv heads; D: head dim.
        latent: elements that MLA keeps per token and layer in place of K and V; 0 without MLA.
        dtype: of its weights as the config has it, the default for its KV.
        cost: FLOPs of prefill.
    """

    L: int
    H: int
    G: int
    D: int
    latent: int
    dtype: str
    cost: PrefillCost

    def bytes_per_token(self, dtype: str | None = None) -> int:
        """2 · L · G · D · b bytes of KV, or L · latent · b with MLA.

        dtype: of the KV, one of `BYTES`; default the model's own. Raises ValueError for another.
        """
        dtype = dtype or self.dtype
        if dtype not in BYTES:
            raise ValueError(f"KV dtype: got {dtype!r}, want one of {', '.join(BYTES)}")
        return self.L * (self.latent or 2 * self.G * self.D) * BYTES[dtype]

    def layout(self, dtype: str) -> KVLayout:
        """What is stored of it, all heads; raises as `KVLayout`."""
        if self.latent:
            return KVLayout(self.L, 1, self.latent, dtype, sides=1)
        return KVLayout(self.L, self.G, self.D, dtype)


def shape_of(config: Any) -> ModelShape:
    """Read a Hugging Face text config, an object or the dict of its config.json.

    FLOPs are those of a gated decoder: 2 per active weight and row, and per row, key and layer
    4 · H · D, or 2 · H · (what a head multiplies for QK and for PV) with MLA, whose prefill
    unfolds the latents (DeepSeek-V2, arXiv 2405.04434). A mixture of experts counts its active
    experts in every layer.

    Raises ValueError naming a size that the config lacks.
    """

    def value(name: str) -> Any:
        return text.get(name) if isinstance(text, Mapping) else getattr(text, name, None)

    def size(name: str, default: int | None = None) -> int:
        found = value(name) or default
        if not isinstance(found, int) or found < 1:
            raise ValueError(f"model config: got {name} {found!r}, want a positive integer")
        return found

    text = config
    text = value("text_config") or config  # a multimodal model keeps the decoder's apart

    L, H = size("num_hidden_layers"), size("num_attention_heads")
    hidden = size("hidden_size")
    G = size("num_key_value_heads", default=H)
    D = size("head_dim", default=hidden // H)
    inner = size("intermediate_size", default=4 * hidden)
    if experts := value("num_experts_per_tok"):
        inner = (experts + (value("n_shared_experts") or 0)) * size(
            "moe_intermediate_size", default=inner
        )
    latent = 0
    if rank := value("kv_lora_rank"):
        nope, rope = size("qk_nope_head_dim"), size("qk_rope_head_dim")
        v, q = size("v_head_dim"), value("q_lora_rank")
        latent = rank + rope
        queries = (hidden + H * (nope + rope)) * q if q else hidden * H * (nope + rope)
        attention = hidden * latent + rank * H * (nope + v) + H * v * hidden + queries
        pair = H * (nope + rope + v)
    else:
        attention = hidden * (2 * H * D + 2 * G * D)
        pair = 2 * H * D
    return ModelShape(
        L=L,
        H=H,
        G=G,
        D=D,
        latent=latent,
        dtype=str(value("dtype") or value("torch_dtype") or "float32").removeprefix("torch."),
        cost=PrefillCost(
            linear=2.0 * L * (attention + 3 * hidden * inner),
            attention=2.0 * L * pair,
            layers=_seen(text),
        ),
    )


def _seen(config: Any) -> tuple[Layer, ...]:
    """Layers, where some see less than all keys; none where it is not known."""
    try:
        layers = layers_of(config)
    except ValueError:
        return ()
    return layers if any(layer.window for layer in layers) else ()


def shape(model: str) -> ModelShape:
    """The shape of a model: a name of `KNOWN`, its config.json, or a folder that holds one.

    Raises ValueError for what is none of these, naming the known models.
    """
    if model in KNOWN:
        return shape_of(KNOWN[model])
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(
            f"model: got {model!r}, want a config.json, a folder that holds one, or one of "
            f"{', '.join(sorted(KNOWN))} ({e})"
        ) from e
    if not isinstance(config, dict):
        raise ValueError(f"model: got {model!r}, want a JSON object with the model's sizes")
    return shape_of(config)


def _gqa(L: int, hidden: int, H: int, G: int, D: int, inner: int, dtype: str) -> dict[str, Any]:
    return {
        "num_hidden_layers": L,
        "hidden_size": hidden,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": D,
        "intermediate_size": inner,
        "dtype": dtype,
    }


# From the config.json that each model was published with.
KNOWN: dict[str, dict[str, Any]] = {
    "smollm2-135m": _gqa(30, 576, 9, 3, 64, 1536, "bfloat16"),
    "llama-3.1-8b": _gqa(32, 4096, 32, 8, 128, 14336, "bfloat16"),
    "llama-3.1-70b": _gqa(80, 8192, 64, 8, 128, 28672, "bfloat16"),
    "qwen2.5-7b": _gqa(28, 3584, 28, 4, 128, 18944, "bfloat16"),
    "qwen3-8b": _gqa(36, 4096, 32, 8, 128, 12288, "bfloat16"),
    "mistral-7b-v0.3": _gqa(32, 4096, 32, 8, 128, 14336, "bfloat16"),
    "deepseek-v3": {
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "dtype": "bfloat16",
    },
}
