"""An experiment as data: what a YAML file may say, and how it is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from lmc.blend import STRATEGIES
from lmc.results.summary import FULL_PREFILL

# These say how much is measured, not what: changing them continues a results folder.
NOT_HASHED = {"repetitions": True, "workload": {"limit"}}


class Strict(BaseModel):
    """A frozen model that names the valid keys when it is given an unknown one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and (unknown := sorted(set(data) - set(cls.model_fields))):
            raise ValueError(
                f"got unknown key {', '.join(unknown)}; valid: {', '.join(cls.model_fields)}"
            )
        return data


M = TypeVar("M", bound=Strict)


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
    environment: dict[str, str] = {}


class WorkloadConfig(Strict):
    """`rag_reorder`: documents that come back in another order; see lmc.workloads.rag_reorder.

    Attributes:
        seed: another one gives other documents, orders and questions.
        documents: documents in the pool; documents_per_prompt of them stand in a prompt.
        system_tokens, document_tokens, question_tokens: exact lengths.
        prompts: prompts in the workload; limit: how many of them are measured.
    """

    name: Literal["rag_reorder"] = "rag_reorder"
    seed: int = 0
    documents: int = Field(default=8, ge=2)
    documents_per_prompt: int = Field(default=6, ge=2)
    system_tokens: int = Field(default=40, gt=0)
    document_tokens: int = Field(default=256, gt=0)
    question_tokens: int = Field(default=32, gt=0)
    prompts: int = Field(default=6, gt=0)
    limit: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _enough_documents(self) -> WorkloadConfig:
        if self.documents_per_prompt > self.documents:
            raise ValueError(
                f"documents_per_prompt: got {self.documents_per_prompt}, allowed: 2 to "
                f"{self.documents}, the documents in the pool"
            )
        return self

    @property
    def prompt_tokens(self) -> int:
        """T of every prompt."""
        documents = self.documents_per_prompt * self.document_tokens
        return self.system_tokens + documents + self.question_tokens

    @property
    def measured(self) -> int:
        """How many prompts are measured."""
        return min(self.prompts, self.limit or self.prompts)


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

    blend: dict[str, Any]
    spans: bool = True

    @field_validator("blend")
    @classmethod
    def _known_strategy(cls, blend: dict[str, Any]) -> dict[str, Any]:
        STRATEGIES.build(blend)
        return blend


Arm = Annotated[
    Annotated[StockArm, Tag("stock arm")] | Annotated[BlendArm, Tag("blend arm")],
    Discriminator(lambda arm: "blend arm" if _has_blend(arm) else "stock arm"),
]


def _has_blend(arm: Any) -> bool:
    return isinstance(arm, BlendArm) or (isinstance(arm, dict) and "blend" in arm)


class QualityConfig(Strict):
    """Attributes: tokens: how many reference tokens are forced; 0 measures no quality."""

    tokens: int = Field(default=16, ge=0)


class ExperimentConfig(Strict):
    """A whole experiment.

    Attributes:
        model: a name that lmc.model.exports knows, a folder, or a hub name.
        lmc: the connector's settings (lmc.connectors.vllm.LMCConfig).
        arms: name -> arm; `full_prefill` is what all are compared with.
        repetitions: how often each prompt is timed with each arm.
    """

    model: str
    engine: EngineConfig = EngineConfig()
    lmc: dict[str, Any] = {}
    workload: WorkloadConfig = WorkloadConfig()
    arms: dict[str, Arm]
    repetitions: int = Field(default=1, gt=0)
    quality: QualityConfig = QualityConfig()

    @model_validator(mode="after")
    def _arms_and_lengths(self) -> ExperimentConfig:
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
        need = self.workload.prompt_tokens + max(1, self.quality.tokens)
        if need > self.engine.max_model_len:
            raise ValueError(
                f"engine.max_model_len: got {self.engine.max_model_len}, less than the "
                f"{need} tokens of a prompt and its answer"
            )
        return self

    def digest(self) -> str:
        """16 hex digits that name what is measured; the same whatever `NOT_HASHED` says."""
        settings = self.model_dump(mode="json", exclude=NOT_HASHED)  # type: ignore[arg-type]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def read_settings(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """What an experiment file says: `extends: other.yaml` merges into it, a null arm drops one.

    overrides: `a.b=value`, the value in YAML; they come last.

    Raises ValueError for a file that is missing or is not YAML.
    """
    raw = _read(path, [])
    for override in overrides or []:
        _set(raw, override)
    if isinstance(raw.get("arms"), dict):
        raw["arms"] = {name: arm for name, arm in raw["arms"].items() if arm is not None}
    return raw


def validated(path: Path, model: type[M], raw: dict[str, Any]) -> M:
    """Settings as a model; ValueError that names the file for unknown or wrong keys."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}: {_explain(error)}") from error


def load_config(path: Path, overrides: list[str] | None = None) -> ExperimentConfig:
    """Read an experiment on vLLM.

    Raises ValueError for a file that is missing or is not YAML, and for unknown or wrong keys.
    """
    config = validated(path, ExperimentConfig, read_settings(path, overrides))
    _check_lmc(path, config)
    return config


def _read(path: Path, seen: list[Path]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ValueError(f"{path}: extends itself")
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: got {type(raw).__name__}, want a mapping of settings")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    return _merge(_read(path.parent / str(base), [*seen, path.resolve()]), raw)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _set(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *path, last = dotted.split(".")
    if not equals or not all((*path, last)):
        raise ValueError(f"override: got {override!r}, want a.b=value")
    for i, key in enumerate(path):
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise ValueError(
                f"override: got {override!r}, but {'.'.join(path[: i + 1])} is a value"
            )
    try:
        raw[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override: got {override!r}, whose value is not YAML") from error


def _explain(error: ValidationError) -> str:
    lines = []
    for e in error.errors(include_url=False):
        where = ".".join(str(x) for x in e["loc"] if not str(x).endswith(" arm"))
        message = e["msg"].removeprefix("Value error, ")
        got = "" if e["type"] in ("value_error", "missing") else f" (got {e['input']!r})"
        lines.append(f"{where}: {message}{got}" if where else f"{message}{got}")
    return "; ".join(lines)


def _check_lmc(path: Path, config: ExperimentConfig) -> None:
    # The engine would refuse it as well, but only after it has started.
    from lmc.connectors.vllm.config import load_config as load_connector_config

    try:
        load_connector_config({"lmc": config.lmc})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
