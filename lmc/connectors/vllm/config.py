"""What a user may set: for an engine, and for one request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lmc.blend.evidence import Outline
from lmc.blend.strategy import Strategy
from lmc.chunking import CHUNKERS, Chunker
from lmc.quality import BLENDS
from lmc.registry import one_line
from lmc.sizes import parse_bytes
from lmc.store import Index
from lmc.store.record import ContextPolicy, variants_kept
from lmc.store.tier import TIERS, TierConfig

TESTED_VLLM = ("0.32.0",)


class Limits(BaseModel):
    """How much one request may ask for.

    Attributes:
        spans: of `chunks`.
        chunk_tokens: longer chunks are cut, whoever made them: each is staged whole.
        values: numbers, words and lists in `blend`, all together. depth: how deep they nest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    spans: int = Field(default=1024, ge=1)
    chunk_tokens: int = Field(default=2048, ge=1)
    values: int = Field(default=10_000, ge=1)
    depth: int = Field(default=6, ge=1)


class Trace(BaseModel):
    """Where one line a finished request is written, for `lmc sim`, `reuse` and `explain`.

    Attributes:
        path: a folder, made when missing, which no other user may write to; `~` is the user's home.
            Several engines may share it.
        max_bytes: of one file, as a number or such as `64MiB`.
        files: how many are kept; the oldest are removed.
        tokens: whether chunks of a prompt stand in it as salted hashes, or its token ids.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1)
    max_bytes: Annotated[int | str, AfterValidator(parse_bytes)] = Field(
        default="64MiB", validate_default=True
    )
    files: int = Field(default=8, ge=1)
    tokens: Literal["hashes", "ids"] = "hashes"


class LMCConfig(BaseModel):
    """Settings of one engine, `kv_connector_extra_config: {"lmc": {...}}`.

    Attributes:
        memory_bytes: host memory for chunks, on each worker.
        policy: which chunk goes when memory is full, one of `lmc.policies.POLICIES`.
        tiers: places behind host memory, in the order in which they are asked, each one of
            `lmc.store.tier.TIERS` with its fields: `{name: disk, path: ..., capacity: 100GiB}`.
        staging_bytes: memory of the device, on each worker, through which chunks are copied out
            of vLLM's pages, a piece at a time; reserved at start, beside what vLLM has.
        window_bytes: memory of the device, on each worker, in which rows in the midst of a prompt
            attend where vLLM keeps windows apart and the last one alone (its hybrid KV cache
            manager): one layer of as much of a prompt as is blended at once. What sees more than
            that is reused as an exact prefix alone. Reserved at start, where it is needed.
        write_queue_bytes: host memory, on each worker and for each tier, for chunks that wait to be
            written into it; more of them are dropped, so that nothing ever waits for a disk.
        fetch_patience_s: after so long what a tier has not brought is computed, and the tiers are
            left alone for a while; after half of it a request is planned without what a tier has
            not said that it has.
        single_flight_s: so long a request waits at most for text that another one, here or in an
            engine that shares a tier, is computing already; 0: it computes it as well.
        exact_variants: exact contexts kept of one content; by default 2, and 64 where `blend`
            moves nothing. Text that prompts repeat inside themselves, and a quality gate that
            refuses to move chunks, want more, or prefixes are lost (`lmc sim --exact-variants`).
        chunker: cuts prompts whose request gives no spans, and what lies between spans.
        context: what a chunk that is moved may have been computed behind: `any` text at all,
            `shared_prefix`: text that the request begins with too, or `isolated`: nothing (but
            the token a prompt begins with). With `any`, who gets a text stored behind one of their
            own is read along with it by others of the same cache salt (docs/security.md). With
            the others the engine computes spans, and chunks that it meets a second time, once more,
            alone, when it has rested or they have come again.
        isolated_tokens: how many such tokens are computed a step, on average and at most, but for a
            chunk that has more; 0 leaves it to clients, who send documents alone.
        blend: the strategy of requests that name none.
        blends: further strategies that requests may name, by names of their own; their fields
            may name files and modules, as `blend` may.
        controls: whether requests may name strategies that exist to check others
            (`full_recompute`, `replay`), which pass the quality gate. For trusted clients only.
        hand_over: whether requests may hand a prompt over to another engine, or be handed one
            (docs/serve.md). For trusted clients only: each fills the tiers with a copy.
        limits: of what a request may ask.
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
        rows_per_step: rows that blending may compute in one step of the engine, all requests
            together, beside what vLLM schedules; a claim of more goes alone. By default a
            sixteenth of what vLLM schedules at most (`max_num_batched_tokens`): docs/serve.md has
            what that costs, and whom.
        trace: where requests are recorded; by default nowhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_bytes: int = Field(default=4 << 30, gt=0)
    policy: dict[str, Any] | str = "lru"
    tiers: tuple[dict[str, Any] | str, ...] = ()
    staging_bytes: int = Field(default=32 << 20, gt=0)
    window_bytes: int = Field(default=256 << 20, gt=0)
    write_queue_bytes: int = Field(default=256 << 20, gt=0)
    fetch_patience_s: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    single_flight_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    exact_variants: int | None = Field(default=None, ge=1)
    chunker: dict[str, Any] | str = "cdc"
    context: ContextPolicy = "isolated"
    isolated_tokens: int = Field(default=128, ge=0)
    blend: dict[str, Any] | str = "epic"
    blends: dict[str, dict[str, Any] | str] = Field(default_factory=dict)
    controls: bool = False
    hand_over: bool = False
    limits: Limits = Limits()
    attention: Literal["auto", "kernels", "backend"] = "auto"
    profile: str | None = None
    min_recovery: float | None = Field(default=0.2, allow_inf_nan=False)
    uncalibrated: Literal["refuse", "allow"] = "refuse"
    min_gain_tokens: int = Field(default=32, ge=1)
    rows_per_step: int | None = Field(default=None, ge=1)
    trace: Trace | None = None

    def build_chunker(self) -> Chunker:
        """A fresh chunker; ValueError for a wrong one."""
        chunker: Chunker = CHUNKERS.build(self.chunker)
        return chunker

    @property
    def variants(self) -> int:
        """Exact contexts kept of one content."""
        return variants_kept(self.exact_variants, build_strategy(self.blend).moves)

    @property
    def what_context_costs(self) -> str:
        """The context policy, and its price, in one line."""
        match self.context:
            case "any":
                return "any: who stores a text says what stands in front of it when others read it"
            case policy if self.isolated_tokens:
                return (
                    f"{policy}: new spans, and chunks met a second time, are computed once more, "
                    f"alone, on average at most {self.isolated_tokens} tokens a step"
                )
            case policy:
                return f"{policy}: only documents that clients send alone can be moved"

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
    for name, blend in config.blends.items():
        if name in BLENDS.entries:
            raise ValueError(f"lmc config: blends.{name}: that is a registered strategy's own name")
        build_strategy(blend)
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


def check_staging(staging_bytes: int, row_bytes: int) -> None:
    """Raise ValueError unless one row of one layer, keys and values, fits into `staging_bytes`."""
    if staging_bytes < row_bytes:
        raise ValueError(
            f"staging_bytes is {staging_bytes}, less than one row of one layer of this model; "
            f"allowed: at least {row_bytes}"
        )


def check_memory(memory_bytes: int, bytes_per_token: int, longest: int) -> None:
    """Raise ValueError unless one chunk of `longest` tokens fits into `memory_bytes`."""
    need = bytes_per_token * longest
    if memory_bytes < need:
        raise ValueError(
            f"memory_bytes is {memory_bytes}, less than one chunk of {longest} tokens of this "
            f"model ({need} bytes); allowed: at least {need}"
        )
