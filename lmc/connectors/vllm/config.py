"""What a user may set: for an engine, and for one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmc.blend.evidence import Outline
from lmc.blend.strategy import Strategy
from lmc.chunking import CHUNKERS, Chunker
from lmc.chunking.pieces import split
from lmc.quality import BLENDS
from lmc.registry import one_line
from lmc.store import Index
from lmc.store.tier import TIERS, TierConfig

TESTED_VLLM = ("0.32.0",)


class LMCConfig(BaseModel):
    """Settings of one engine, `kv_connector_extra_config: {"lmc": {...}}`.

    Attributes:
        memory_bytes: host memory for chunks, on each worker.
        policy: which chunk goes when memory is full, one of `lmc.policies.POLICIES`.
        tiers: places behind host memory, in the order in which they are asked, each one of
            `lmc.store.tier.TIERS` with its fields: `{name: disk, path: ..., capacity: 100GiB}`.
        write_queue_bytes: host memory, on each worker, for chunks that wait to be written into a
            tier; more of them are dropped, so that nothing ever waits for a disk.
        fetch_patience_s: after so long what a tier has not brought is computed, and the tiers are
            left alone for a while.
        exact_variants: exact contexts kept of one content. Text that prompts repeat inside
            themselves wants more, or its prefixes are lost (`lmc sim --exact-variants`).
        chunker: cuts prompts whose request gives no spans, and what lies between spans.
        blend: the strategy of requests that name none.
        attention: how recomputed rows attend: `kernels` (lmc's own), `backend` (the engine's, once
            a run of rows), or `auto`: kernels on a GPU, where the backend is the oracle of the
            check at start, and the backend on a CPU.
        profile: path of a quality profile that `lmc calibrate` wrote; by default the model's own is
            looked for, in the user's cache and among those that come with lmc.
        min_recovery: the least share of the quality loss that a strategy must have recovered on
            this model; one that recovers less moves no chunk, and exact reuse goes on. None turns
            the gate off.
        uncalibrated: what becomes of a strategy that no profile tells of.
        min_gain_tokens: rows that blending must save beyond the rows it computes only to
            close gaps; a request that would gain less is served without blending.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_bytes: int = Field(default=4 << 30, gt=0)
    policy: dict[str, Any] | str = "lru"
    tiers: tuple[dict[str, Any] | str, ...] = ()
    write_queue_bytes: int = Field(default=256 << 20, gt=0)
    fetch_patience_s: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    exact_variants: int = Field(default=2, ge=1)
    chunker: dict[str, Any] | str = "cdc"
    blend: dict[str, Any] | str = "epic"
    attention: Literal["auto", "kernels", "backend"] = "auto"
    profile: str | None = None
    min_recovery: float | None = Field(default=0.2, allow_inf_nan=False)
    uncalibrated: Literal["refuse", "allow"] = "refuse"
    min_gain_tokens: int = Field(default=32, ge=1)

    def build_chunker(self) -> Chunker:
        """A fresh chunker; ValueError for a wrong one."""
        chunker: Chunker = CHUNKERS.build(self.chunker)
        return chunker

    def build_tiers(self) -> list[TierConfig]:
        """What is said of each tier; ValueError for a wrong one."""
        return [TIERS.build(tier) for tier in self.tiers]


def load_config(extra: Mapping[str, Any]) -> LMCConfig:
    """The engine's settings out of `kv_connector_extra_config`.

    Raises:
        ValueError: unknown or wrong keys, policy, chunker or strategy, or an unreadable YAML file.
    """
    raw = extra.get("lmc", {})
    if isinstance(raw, str):
        try:
            raw = yaml.safe_load(Path(raw).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"lmc config file {raw!r} cannot be read: {error}") from error
    try:
        config = LMCConfig.model_validate(raw)
    except ValidationError as error:
        valid = ", ".join(LMCConfig.model_fields)
        raise ValueError(f"lmc config: {one_line(error)}; valid keys: {valid}") from error
    Index(config.memory_bytes, policy=config.policy)
    config.build_chunker()
    config.build_tiers()
    build_strategy(config.blend)
    return config


def build_strategy(blend: Mapping[str, Any] | str) -> Strategy:
    """The strategy that a config names.

    Raises:
        ValueError: a wrong one, or one that a paged engine cannot run.
    """
    strategy: Strategy = BLENDS.build(blend)
    check_runs(blend, strategy)
    return strategy


def check_runs(blend: Mapping[str, Any] | str, strategy: Strategy) -> None:
    """Raise ValueError for a strategy that a paged engine cannot run."""
    why = None
    if strategy.dense:
        why = "needs more than a paged engine offers"
    elif strategy.mask != "position":
        why = f"masks by {strategy.mask!r}, an ablation"
    if why:
        raise ValueError(
            f"blend strategy {blend!r} {why}: it runs on Hugging Face models only "
            "(lmc.connectors.hf)"
        )


def check_layers(strategy: Strategy, L: int) -> None:
    """Raise ValueError unless a model of L layers has those that the strategy looks at."""
    strategy.needs(Outline(L=L, T=2, end=1, moved=((0, 1),), new=1))


def check_memory(memory_bytes: int, bytes_per_token: int, longest: int) -> None:
    """Raise ValueError unless one chunk of `longest` tokens fits into `memory_bytes`."""
    need = bytes_per_token * longest
    if memory_bytes < need:
        raise ValueError(
            f"memory_bytes is {memory_bytes}, less than one chunk of {longest} tokens of this "
            f"model ({need} bytes); allowed: at least {need}"
        )


@dataclass(frozen=True)
class RequestOptions:
    """Settings of one request, `kv_transfer_params={"lmc": {...}}`.

    Attributes:
        chunks: spans `(start, end)` the caller knows to be documents, or None.
        strategy: how moved chunks are blended.
        blend: its name. config: what it was built from.
        save: whether this request's KV is stored.
        enabled: false makes the request one that lmc never saw.
    """

    chunks: Sequence[tuple[int, int]] | None
    strategy: Strategy
    blend: str
    config: Mapping[str, Any] | str
    save: bool = True
    enabled: bool = True


def _said(blend: Any) -> Mapping[str, Any] | str:
    """What a client says of a strategy: a registered name, or a mapping; no text to parse."""
    if isinstance(blend, Mapping) or (isinstance(blend, str) and blend in BLENDS.entries):
        return blend
    raise ValueError(
        f"lmc parameter blend: got {blend!r:.200}, want a name or {{name: ..., field: value}}; "
        f"valid: {', '.join(BLENDS.names())}"
    )


_KEYS = {"chunks", "blend", "save", "enabled"}


def parse_request(raw: Any, T: int, config: LMCConfig) -> RequestOptions:
    """Read `kv_transfer_params["lmc"]` of a prompt of T tokens; all keys are optional.

    Raises:
        ValueError: unknown keys, a wrong strategy, or spans that overlap or lie outside.
    """
    raw = {} if raw is None else raw
    if not isinstance(raw, Mapping):
        raise ValueError(f"lmc parameters must be an object, got {type(raw).__name__}")
    if unknown := sorted(map(str, raw.keys() - _KEYS)):
        raise ValueError(
            f"unknown lmc parameter {', '.join(unknown)}; valid: {', '.join(sorted(_KEYS))}"
        )
    for key in ("save", "enabled"):
        if not isinstance(raw.get(key, True), bool):
            raise ValueError(f"lmc parameter {key} must be true or false, got {raw[key]!r}")
    chunks = raw.get("chunks")
    if chunks is not None:
        if not isinstance(chunks, list | tuple):
            raise ValueError(f"lmc parameter chunks must be a list of spans, got {chunks!r}")
        # Cutting checks the spans, whatever the tokens are.
        split(np.zeros(T, np.int64), config.build_chunker(), chunks)
    blend = config.blend if raw.get("blend") is None else _said(raw["blend"])
    return RequestOptions(
        chunks=chunks,
        strategy=build_strategy(blend),
        blend=BLENDS.parse(blend)["name"],
        config=blend,
        save=raw.get("save", True),
        enabled=raw.get("enabled", True),
    )
