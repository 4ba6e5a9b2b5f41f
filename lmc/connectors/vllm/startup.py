"""What an engine says of lmc when it starts: what is on and off, and why. No text of a client."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.platforms import current_platform

from lmc.blend.strategy import Strategy
from lmc.chunking import CHUNKERS
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.gate import Quality
from lmc.connectors.vllm.messages import WorkerHello
from lmc.model.layout import KVLayout
from lmc.policies import POLICIES
from lmc.quality import BLENDS
from lmc.quality.auto import Auto
from lmc.quality.controlled import Controlled
from lmc.quality.gate import described
from lmc.quality.profile import Blend, interpolated, knob_of
from lmc.registry import Registry
from lmc.store.tier import TIERS

logger = init_logger(f"vllm.{__name__}")  # else vLLM prints none of it

LABEL = 11  # characters
ATTENTION = {
    "kernels": "kernels: lmc's own, one launch a layer",
    "backend": "backend: vLLM's own, called once a run of rows",
}


def say(
    vllm_config: Any,
    config: LMCConfig,
    layout: KVLayout,
    hello: WorkerHello,
    quality: Quality,
    weights: bytes | None,
) -> None:
    """Log it; as a warning where something that was asked for is off."""
    model, ranks = vllm_config.model_config.model, vllm_config.parallel_config.world_size
    off = hello.kv_refusal or hello.refusal or isinstance(quality.admitted, str)
    log = logger.warning if off or weights is None else logger.info
    log("\n".join(lines(config, model, layout, ranks, hello, quality, weights)))
    wrong = load_failures(vllm_config.kv_transfer_config.kv_load_failure_policy)
    if wrong and hello.kv_refusal is None:
        logger.warning(wrong)


def lines(
    config: LMCConfig,
    model: str,
    layout: KVLayout,
    ranks: int,
    hello: WorkerHello,
    quality: Quality,
    weights: bytes | None,
) -> list[str]:
    """What is on and off, one thing a line, behind a first line with the versions.

    Args:
        layout: of one rank. ranks: that share the heads of a token.
        hello: what holds for all workers.
        weights: digest of the model's weights, or None where they are in no files.
    """
    try:
        ours = version("lmc-kv")
    except PackageNotFoundError:  # a source tree that is not installed
        ours = "(not installed)"
    bytes_per_token = layout.bytes_per_token
    where = f" on each of {ranks} ranks" if ranks > 1 else ""
    heads = f"G={layout.G}, D={layout.D}" if layout.sides == 2 else f"latents of {layout.D}"
    said = {
        "model": f"{model}, KV {layout.dtype}: L={layout.L}, {heads}, "
        f"{bytes_per_token:,} bytes a token{where}",
        "reuse": _reuse(config, hello, quality),
    }
    if hello.kv_refusal is None:
        said |= {
            "quality": _quality(config, quality),
            "context": config.what_context_costs,
            "chunks": f"{written(CHUNKERS, config.chunker)}, cut at "
            f"{config.limits.chunk_tokens:,} tokens",
            "memory": f"{config.memory_bytes / 2**30:.3g} GiB a rank: "
            f"{config.memory_bytes // bytes_per_token:,} tokens, evicted by "
            f"{written(POLICIES, config.policy)}",
            "tiers": "; ".join(_tiers(config)) or "none: what is stored ends with the engine",
            "requests": _requests(config),
            "attention": _attention(config, hello, latents=layout.sides == 1),
            "weights": _weights(hello, weights),
        }
    head = f"lmc {ours} on vLLM {vllm.__version__}"
    return [head, *(f"  {what:<{LABEL}}{text}" for what, text in said.items())]


def load_failures(policy: str) -> str | None:
    """What is wrong with vLLM's `kv_load_failure_policy`, if anything is."""
    if policy == "recompute":
        return None
    return (
        f"lmc: kv_load_failure_policy is {policy!r}: where a chunk is lost and lmc cannot compute "
        "it in its place, the client's request fails; want 'recompute' in --kv-transfer-config"
    )


def written(registry: Registry, spec: Mapping[str, Any] | str) -> str:
    """A name with the fields that were given, on one line."""
    fields = registry.parse(spec)
    name = str(fields.pop("name"))
    return " ".join([name, *(f"{field}={value}" for field, value in fields.items())])


def _reuse(config: LMCConfig, hello: WorkerHello, quality: Quality) -> str:
    if hello.kv_refusal is not None:
        return f"nothing is stored or reused: {hello.kv_refusal}"
    if hello.refusal is not None:
        return f"exact prefixes only: {hello.refusal}"
    default = written(BLENDS, config.blend)
    if quality.moves:
        return f"exact prefixes, and chunks moved by {default}"
    if isinstance(quality.admitted, str):
        return f"exact prefixes; by default no chunk is moved: the gate refuses {default}"
    return f"exact prefixes; by default no chunk is moved: {default} moves none"


def _quality(config: LMCConfig, quality: Quality) -> str:
    profile, strategy = quality.profile, quality.strategy
    if config.min_recovery is None:
        return "no gate (min_recovery: null): any strategy moves chunks, measured or not"
    gate = f"min_recovery {config.min_recovery:g}, no profile"
    if profile is not None:
        gate = (
            f"min_recovery {config.min_recovery:g}, profile of {profile.model} in {profile.dtype} "
            f"({profile.context} chunks, {profile.prompts} prompts)"
        )
    if isinstance(quality.admitted, str):
        return f"{gate}: refused: {quality.admitted}"
    if strategy.control or not strategy.moves:
        return f"{gate}: {written(BLENDS, config.blend)} passes, it loses nothing"
    blend, judged = _judged(config, quality, quality.admitted)
    name = described(blend, judged)
    found = profile and interpolated(profile.curve(blend, judged), knob_of(judged))
    if not found:
        return f"{gate}: {name} passes unmeasured (uncalibrated: allow)"
    recovery, low, high = found
    return f"{gate}: {name} passes, it recovers {recovery:.2f} [{low:.2f}, {high:.2f}]"


def _judged(config: LMCConfig, quality: Quality, admitted: Strategy) -> tuple[Blend, Strategy]:
    """What the gate looked up in the profile."""
    match quality.strategy:
        case Auto() as auto:
            return auto.strategy, admitted
        case Controlled() as controlled:
            return controlled.least
    return config.blend, admitted


def _tiers(config: LMCConfig) -> list[str]:
    """Of a tier of somebody's own only what each has: its fields may be a password."""
    said = []
    for i, (spec, tier) in enumerate(zip(config.tiers, config.build_tiers(), strict=True), 1):
        name = TIERS.parse(spec)["name"]
        fields = ("path", "capacity", "compression") if name in TIERS.entries else ()
        known = [f"{field} {getattr(tier, field)}" for field in fields if hasattr(tier, field)]
        said.append(", ".join([f"{i}. {name}", *known, f"write {tier.write}"]))
    return said


def _requests(config: LMCConfig) -> str:
    limits = config.limits
    further = f"; may name {', '.join(config.blends)}" if config.blends else ""
    controls = "; and controls, which pass the gate" if config.controls else ""
    return (
        f"at most {limits.spans:,} spans, {limits.values:,} values {limits.depth} deep in blend"
        f"{further}{controls}"
    )


def _attention(config: LMCConfig, hello: WorkerHello, latents: bool) -> str:
    if not hello.computes:
        return "none: no rows are computed; what is lost is vLLM's to compute"
    way = "kernels" if latents else config.attention  # there is no other for them
    if way == "auto":
        way = "kernels" if current_platform.is_cuda_alike() else "backend"
    return ATTENTION[way]


def _weights(hello: WorkerHello, weights: bytes | None) -> str:
    if weights is None:
        known = "cannot be digested: nothing that is stored will be found after a restart"
    else:
        known = f"{weights.hex()[:16]}, of their files"
    if hello.watched:
        return f"{known}; changes are noticed"
    return f"{known}; nobody notices changes: a reset of the prefix cache leaves all behind"
