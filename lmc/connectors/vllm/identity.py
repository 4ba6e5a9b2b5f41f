"""What this engine's KV is, and what of it lmc can serve."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import vllm
from vllm import envs

from lmc.connectors.vllm.config import TESTED_VLLM, LMCConfig
from lmc.connectors.vllm.groups import LATENT, groups_of, groups_refusal
from lmc.model import identity
from lmc.model.layout import KVLayout
from lmc.model.reuse import exact_refusal, moved_refusal
from lmc.model.rope import Rotations, rotations_of
from lmc.model.weights import folder_of, weights_digest
from lmc.store.compress import LOSSY
from lmc.store.sections import Heads
from lmc.store.tier import TierConfig, opened

# Load formats that read the weight files of the model's own folder, and nothing else.
FROM_FOLDER = (
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "npcache", "pt",
)  # fmt: skip
# Ways of speculative decoding that draft out of a request's tokens: the model's KV is all there is.
DRAFTS_OF_TEXT = ("ngram",)


def check_vllm_version(version: str = vllm.__version__) -> None:
    """Raise RuntimeError unless the connector was tested with this vLLM."""
    if version.split("+")[0] not in TESTED_VLLM:
        raise RuntimeError(
            f"vLLM {version} is not tested with lmc, which uses internals of the block hash "
            f"chain; tested: {', '.join(TESTED_VLLM)}"
        )


def layout_of(vllm_config: Any, kv_cache_config: Any) -> KVLayout:
    """Shape of one token's KV on one rank."""
    groups = groups_of(kv_cache_config)
    spec = groups.specs[0]
    dtype = str(spec.dtype).removeprefix("torch.")
    sides = 1 if type(spec).__name__ == LATENT else 2
    return KVLayout(len(groups.of), spec.num_kv_heads, spec.head_size, dtype, sides)


def rope_of(vllm_config: Any) -> Rotations | str:
    """How the model's layers turn keys, or why its keys cannot be moved."""
    config = vllm_config.model_config.hf_text_config
    return moved_refusal(config) or rotations_of(config)


def engine_refusal(vllm_config: Any, kv_cache_config: Any, config: LMCConfig) -> str | None:
    """Why nothing of this engine's KV is stored or reused; None when it is."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism"
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        return "context parallelism"
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.method not in DRAFTS_OF_TEXT:
        return (
            f"speculative decoding by {drafts.method}: what drafts may have KV of its own, which "
            f"nobody fills for tokens that are loaded; allowed: {', '.join(DRAFTS_OF_TEXT)}"
        )
    if reason := exact_refusal(vllm_config.model_config.hf_text_config, states=True):
        return reason
    try:
        if reason := groups_refusal(kv_cache_config):
            return reason
        groups = groups_of(kv_cache_config)
    except Exception as error:  # names of layers that say nothing of their order
        return f"its KV cache groups are not known: {type(error).__name__}: {error}"
    if groups.states and parallel.tensor_parallel_size > 1:
        return "layers that keep a state, of which each rank has a part"
    codecs = {getattr(tier, "compression", "none") for tier in config.build_tiers()}
    if groups.states and (lossy := sorted(codecs.intersection(LOSSY))):
        return f"layers that keep a state, and a tier of compression {lossy[0]!r}"
    if vllm_config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16"):
        return f"kv cache dtype {vllm_config.cache_config.cache_dtype}"
    return None


def alone_refusal(vllm_config: Any) -> str | None:
    """Why lmc must not run the model's layers by itself in this engine; None when it may.

    As vLLM's `set_forward_context` has it: there a forward waits for all data-parallel ranks, and
    the others do not know of one that serves a request of this rank.
    """
    parallel = vllm_config.parallel_config
    if parallel.is_moe_model is False:  # None: nobody has said
        return None
    if parallel.data_parallel_size > 1 or parallel.use_sequence_parallel_moe:
        return (
            "data parallelism with experts: a forward of one rank waits for all others "
            f"(data_parallel_size {parallel.data_parallel_size})"
        )
    return None


def namespace_of(vllm_config: Any, kv_cache_config: Any, rope: Rotations | str) -> bytes:
    """Digest of all that makes KV incompatible, but for what differs by request.

    As `lmc.model.identity` has it, so that a notebook finds what an engine stored, but for latents.
    Weights that
    cannot be read from files (dummy weights, a model that is only on a hub) get a namespace of
    their own process, which is safe and never shared.
    """
    model = vllm_config.model_config
    engine: dict[str, Any] = {}
    if model.quantization is not None:  # perhaps of weights that are not so in their files
        said = getattr(model, "quantization_config", None)
        engine["quantization"] = [model.quantization, repr(said)]
    layout = layout_of(vllm_config, kv_cache_config)
    if layout.sides == 1:
        # What turns of latents lies in another order than transformers has it in.
        by = "transformers" if model.using_transformers_backend() else "vllm"
        engine["latents"] = [by, layout.D]
    if isinstance(rope, str):  # its angles may depend on how long prompts can get
        engine["max_model_len"] = getattr(model, "max_model_len", None)
    return identity.namespace_of(
        model.hf_text_config.to_json_string(),
        weights_of(vllm_config) or os.urandom(32),
        layout.dtype,
        rope if isinstance(rope, Rotations) else None,
        computed_in=str(model.dtype).removeprefix("torch."),
        engine=json.dumps(engine, sort_keys=True) if engine else "",
    )


def heads_of(layout: KVLayout, rank: int, vllm_config: Any) -> Heads:
    """Which of the model's kv heads a rank has: [start, end) and how many there are."""
    if layout.sides == 1:  # every rank has all of a latent
        return (0, 1, 1)
    total = vllm_config.model_config.get_total_num_kv_heads()
    ranks = vllm_config.parallel_config.tensor_parallel_size
    rank %= ranks
    # With more ranks than heads, several have the same one.
    start = rank * layout.G if total >= ranks else rank * total // ranks
    return (start, start + layout.G, total)


def open_tiers(
    config: LMCConfig, layout: KVLayout, rank: int, vllm_config: Any
) -> list[tuple[TierConfig, Any]]:
    """The tiers behind host memory, opened for one rank, each with what the config says of it.

    Raises:
        ValueError, OSError: one that cannot be opened.
    """
    label = f"{Path(vllm_config.model_config.model).name} {layout.dtype}"
    said = config.build_tiers()
    variants, heads = config.variants, heads_of(layout, rank, vllm_config)
    tiers = opened(said, layout, heads=heads, exact_variants=variants, label=label)
    return list(zip(said, tiers, strict=True))


def weights_of(vllm_config: Any) -> bytes | None:
    """Digest of the model's weights, or None where they are in no files that can be read."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format not in FROM_FOLDER or envs.VLLM_USE_MODELSCOPE:
        return None
    try:
        return weights_digest(folder_of(model.model, model.revision, load.download_dir))
    except (ValueError, OSError):
        return None
