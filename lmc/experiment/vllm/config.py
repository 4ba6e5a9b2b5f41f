"""What an experiment on vLLM may say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from lmc.experiment.settings import Blend, Strict, Workload, validated
from lmc.results.summary import FULL_PREFILL


class EngineConfig(Strict):
    """What both engines are started with; see vllm.LLM for the fields not described here.

    Attributes:
        kv_cache_memory_bytes: vLLM's own KV cache, of each engine.
        threads: OpenMP threads of each engine; fixed, or timings cannot be compared.
        preload: a library of the Python environment's lib folder that the engines start with
            (LD_PRELOAD), where it is there.
        environment: further environment variables of the engines.
    """

    dtype: str = "auto"
    block_size: int = Field(default=32, gt=0)
    kv_cache_memory_bytes: int = Field(default=1 << 30, gt=0)
    max_model_len: int = Field(default=2048, gt=0)
    max_num_batched_tokens: int = Field(default=2048, gt=0)
    max_num_seqs: int = Field(default=4, gt=0)
    enforce_eager: bool = True
    seed: int = 0
    threads: int = Field(default=2, gt=0)
    preload: str | None = None
    environment: dict[str, str] = Field(default_factory=dict)


class StockArm(Strict):
    """An arm on vLLM as it is.

    Attributes:
        cache: `none`: every request computes everything. `shared`: vLLM's prefix cache, with
            the documents and the prompts before this one sent to it, as a service would.
            `warmed`: its prefix cache holds the first whole blocks of the prompt, untimed.
        equal_rows_of: with `warmed`, the arm whose computed rows the warmed part leaves.
    """

    cache: Literal["none", "shared", "warmed"]
    equal_rows_of: str | None = None

    @model_validator(mode="after")
    def _warmed_by_rows(self) -> StockArm:
        if (self.cache == "warmed") != (self.equal_rows_of is not None):
            raise ValueError(
                f"cache: {self.cache} with equal_rows_of: {self.equal_rows_of}; allowed: both "
                "`cache: warmed` and `equal_rows_of`, or neither"
            )
        return self


class BlendArm(Strict):
    """An arm on vLLM with lmc.

    Attributes:
        blend: strategy name and fields, as in the connector's config.
        spans: whether the client says where the documents are; if not, the chunker cuts.
    """

    blend: Blend
    spans: bool = True


Arm = Annotated[
    Annotated[StockArm, Tag("stock arm")] | Annotated[BlendArm, Tag("blend arm")],
    Discriminator(lambda arm: "blend arm" if _has_blend(arm) else "stock arm"),
]


def _has_blend(arm: Any) -> bool:
    return isinstance(arm, BlendArm) or (isinstance(arm, dict) and "blend" in arm)


class QualityConfig(Strict):
    """Attributes: tokens: how many reference tokens are forced; 0 measures no quality."""

    tokens: int = Field(default=16, ge=0)


class VLLMExperiment(Strict):
    """A whole experiment on vLLM.

    Attributes:
        model: a name that lmc.model.exports knows, a folder, or a hub name.
        workload: one of lmc.workloads.WORKLOADS, with its fields; limit: how many of its prompts
            are measured.
        lmc: the connector's settings (lmc.connectors.vllm.LMCConfig).
        arms: name -> arm; `full_prefill` is what all are compared with.
        repetitions: how often each prompt is timed with each arm.
    """

    not_hashed: ClassVar[dict[str, Any]] = {"repetitions": True, "workload": {"limit"}}

    model: str
    engine: EngineConfig = EngineConfig()
    lmc: dict[str, Any] = Field(default_factory=dict)
    workload: Workload = Field(default="rag_reorder", validate_default=True)
    arms: dict[str, Arm]
    repetitions: int = Field(default=1, gt=0)
    quality: QualityConfig = QualityConfig()

    @model_validator(mode="after")
    def _arms_fit(self) -> VLLMExperiment:
        full = self.arms.get(FULL_PREFILL)
        if not (isinstance(full, StockArm) and full.cache == "none"):
            raise ValueError(
                f"arms: got {', '.join(self.arms) or 'none'}; all are compared with "
                f"`{FULL_PREFILL}: {{cache: none}}`, which must be among them"
            )
        blends = [name for name, arm in self.arms.items() if isinstance(arm, BlendArm)]
        for name, arm in self.arms.items():
            target = arm.equal_rows_of if isinstance(arm, StockArm) else None
            if target is not None and target not in blends:
                raise ValueError(
                    f"arms.{name}.equal_rows_of: got {target}; valid: {', '.join(blends) or 'none'}"
                )
        return self


def load_config(path: Path, raw: dict[str, Any]) -> VLLMExperiment:
    """An experiment out of settings; ValueError that names the file for unknown or wrong keys."""
    config = validated(path, VLLMExperiment, raw)
    _check_lmc(path, config)
    return config


def _check_lmc(path: Path, config: VLLMExperiment) -> None:
    # The engine would refuse it as well, but only after it has started.
    from lmc.connectors.vllm.config import load_config as load_connector_config

    try:
        load_connector_config({"lmc": config.lmc})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
