"""Tiny random decoders of each family, and one prompt of a system text, four chunks, a question."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from lmc.blend import STRATEGIES
from lmc.connectors.hf import Blended, HFModel, HFStore, run_blend

# Keys that only some families know. Windows are shorter than a chunk, and than what is in front.
WINDOW = {"sliding_window": 24}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LATENTS = {
    "num_key_value_heads": 4, "first_k_dense_replace": 4, "kv_lora_rank": 48, "q_lora_rank": None,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "head_dim": 16, "v_head_dim": 32,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"] * 2
EXTRA: dict[str, dict[str, Any]] = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Gemma": {},
    "Mistral": WINDOW,
    "SmolLM3": {"no_rope_layers": [1, 1, 0, 1], "pad_token_id": 0},
    "Gemma2": WINDOW | {
        "layer_types": MIXED, "query_pre_attn_scalar": 32,
        "attn_implementation": "eager",  # torch's own attention leaves the cap of logits out
    },
    "Gemma3": WINDOW | {
        "layer_types": MIXED, "query_pre_attn_scalar": 32,
        "rope_parameters": {
            "sliding_attention": ROPE, "full_attention": ROPE | {"rope_theta": 1e6},
        },
    },
    "Cohere2": WINDOW | {"layer_types": MIXED, "logit_scale": 1.0},
    "GptOss": WINDOW | {
        "layer_types": MIXED, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": ROPE,
    },
    # A query sees its own 24 tokens; every fourth layer all, by no rotation, and the more sharply
    # the further on it stands.
    "Llama4": {
        "attention_chunk_size": 24, "no_rope_layers": [1, 1, 1, 0], "moe_layers": [],
        "intermediate_size_mlp": 256, "pad_token_id": 0, "rope_parameters": ROPE, "floor_scale": 16,
    },
    # See images too; of a text, all three axes of a position are one.
    "Qwen2_5_VL": {"rope_parameters": ROPE | {"mrope_section": [4, 6, 6]}},
    "Qwen3VL": {
        "rope_parameters": ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
    },
    "DeepseekV2": LATENTS,
    "DeepseekV3": LATENTS | {"q_lora_rank": 24},
}  # fmt: skip
FAMILIES = tuple(EXTRA)
CONFIGS = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text"}  # what transformers calls some of them

IMAGES = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 128,
    "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0],
}  # fmt: skip

_rng = np.random.default_rng(0)
SYSTEM, *CHUNKS, QUESTION = (_rng.integers(5, 500, n).tolist() for n in (20, 40, 40, 40, 40, 10))
TOKENS = [token for part in (SYSTEM, *CHUNKS, QUESTION) for token in part]
SPANS = [(0, 20), (20, 60), (60, 100), (100, 140), (140, 180)]
T, END = 190, 180


def decoder(family: str, **options: Any) -> Any:
    """A random model, `...ForCausalLM` or what sees images: L=4, H=4, G=2, D=32, 512 ids."""
    import transformers

    fields = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    }
    config_class = getattr(transformers, f"{CONFIGS.get(family, family)}Config")
    fields |= EXTRA.get(family, {}) | options
    sees = "mrope_section" in fields.get("rope_parameters", {})
    config = config_class(**{"text_config": fields, "vision_config": IMAGES} if sees else fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = "ForConditionalGeneration" if sees else "ForCausalLM"
        model = getattr(transformers, family + kind)(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                # As initialised, attention is nearly uniform and wrong KV hardly shows.
                weight.mul_(3.0)
    return model


def tiny(family: str = "Llama") -> HFModel:
    """One model a family for all tests: none of them changes it."""
    return _tiny(family)


def stored(family: str = "Llama", context: Any = "isolated") -> HFStore:
    """The prompt's system text and chunks, encoded as a context policy says; one for all tests."""
    return _stored(family, context)


@cache
def _tiny(family: str) -> HFModel:
    return HFModel(decoder(family))


@cache
def _stored(family: str, context: Any) -> HFStore:
    store = HFStore(tiny(family))
    store.add_chunks(context, SYSTEM, CHUNKS)
    return store


def blended(
    store: HFStore, strategy: Any, tokens: Sequence[int] = TOKENS, **options: Any
) -> Blended:
    """The prompt out of a store, by a strategy as a config has it."""
    return run_blend(store, tokens, SPANS, STRATEGIES.build(strategy), **options)


@torch.inference_mode()
def reference(model: HFModel, tokens: Sequence[int] = TOKENS) -> torch.Tensor:
    """Logits `[T, V]` of the model's own forward."""
    return model.model(torch.tensor([list(tokens)])).logits[0].float()


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())
