"""What lmc does with a model, as people ask before they have it: `lmc model check`."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lmc.connectors.hf.model import HFModel
from lmc.model.layers import bytes_by_kind, layers_of, summary
from lmc.model.reuse import exact_refusal, moved_refusal
from lmc.model.shape import BYTES

SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
# Beside these, where a model has latents: a key has `head_dim` dims that turn.
SMALL_LATENTS = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24, "v_head_dim": 20,
}  # fmt: skip
# Model types of transformers whose own defaults stand in the table of docs/models.md. Sizes are
# those of a default config, often the family's first model: the kinds of layers are the point.
FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "phi3", "granite",
    "starcoder2", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "apertus", "phi", "stablelm", "glm4",
    "glm4_moe", "smollm3", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss",
    "cohere2", "olmo3", "exaone4", "llama4_text", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "qwen3_next", "qwen3_5_text", "kimi_linear", "minimax", "jamba",
)  # fmt: skip


def check(config: Any, dtype: str | None = None) -> dict[str, Any]:
    """What of a model is reused exactly, moved, or not, and why; KV bytes a token.

    Args:
        config: of transformers; a multimodal one has its text config within.
        dtype: of the KV, one of `BYTES`; by default the config's own.

    Returns:
        layers: in words. bytes: a token, by kind of layer. dtype. exact, moved: None, or why not.
        states: whether the same text is reused all the same, as far as a state of it is kept.

    Raises:
        ValueError: a dtype that is none.
    """
    config = config.get_text_config()
    dtype = dtype or str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    if dtype not in BYTES:
        raise ValueError(f"KV dtype: got {dtype!r}, want one of {', '.join(BYTES)}")
    try:
        layers = layers_of(config)
    except ValueError as e:
        why = dict.fromkeys(("exact", "moved"), str(e))
        return {"layers": "unknown", "bytes": {}, "dtype": dtype, "states": False} | why
    exact = exact_refusal(config)
    return {
        "layers": summary(layers),
        "bytes": bytes_by_kind(layers, BYTES[dtype]),
        "dtype": dtype,
        "exact": exact,
        "states": exact is not None and exact_refusal(config, states=True) is None,
        "moved": moved_refusal(config),
    }


def apart(model: Any) -> str | None:
    """Why a model's chunks cannot be moved and blended, as its own layers say; None if they can."""
    try:
        HFModel(model)
    except ValueError as e:
        text = str(e).partition("ForCausalLM: ")[2] or str(e)
        return re.sub(r" by \S+ \(at most \S+\)", "", text)  # which depends on the machine
    return None


def families() -> str:
    """A table in Markdown of `FAMILIES`.

    Layers and bytes are those of their default configs, in bfloat16; whether chunks are moved was
    tried with a small random model of each.
    """
    lines = [
        "| model type | layers | KV bytes a token | moved and blended on Hugging Face |",
        "|---|---|---|---|",
    ]
    for name in FAMILIES:
        got = check(AutoConfig.for_model(name), "bfloat16")
        sizes = ", ".join(f"{n:,} {kind}" for kind, n in got["bytes"].items()) or "?"
        refusal = got["moved"] or apart(small(name))
        cells = [f"`{name}`", got["layers"], sizes, f"no: {refusal}" if refusal else "yes"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def small(name: str) -> Any:
    """A random model of a family: two layers, or as many as it takes to have each kind of them."""
    torch.manual_seed(0)
    default = AutoConfig.for_model(name)
    kinds = [(layer.kind, layer.rope) for layer in layers_of(default)]
    sizes = SMALL | {"num_hidden_layers": max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))}
    windows = ("sliding_window", "attention_chunk_size")
    sizes |= {window: 16 for window in windows if getattr(default, window, None)}
    if getattr(default, "kv_lora_rank", None):
        sizes |= SMALL_LATENTS
    config = AutoConfig.for_model(name, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
