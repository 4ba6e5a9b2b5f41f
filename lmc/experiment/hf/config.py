"""An experiment on a Hugging Face model: strategies on the quality-compute plane, no engine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lmc.blend import STRATEGIES
from lmc.blend.encoding import Context, Position
from lmc.experiment.vllm.config import Strict, read_settings, validated
from lmc.results.summary import FULL_REUSE
from lmc.workloads import WORKLOADS

MOST_ARMS = 20
# These say how much is measured, not what: changing them continues a results folder.
NOT_HASHED = {"limit", "threads"}


class HFArm(Strict):
    """A strategy, or full prefill in two parts.

    Attributes:
        blend: strategy name and fields.
        context, position: override the experiment's.
        split: full prefill computed in two parts, which shows how much rounding alone changes.
    """

    blend: dict[str, Any] | None = None
    context: Context | None = None
    position: Position | None = None
    split: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> HFArm:
        if (self.blend is None) == (not self.split):
            raise ValueError("want either `blend: {name: ...}` or `split: true`")
        if self.blend is not None:
            STRATEGIES.build(self.blend)
        return self


class HFExperiment(Strict):
    """A whole experiment.

    Attributes:
        model: a name that lmc.model.exports knows, a folder, or a hub name.
        threads: of torch.
        context: how chunks are encoded before they are reused: `isolated`, `anchored` behind the
            system prompt, or as `first_seen` in a prompt with other chunks in front.
        position: `global`: chunks are rotated to where they stand; `local`: all begin where the
            first does.
        answer_tokens: of full prefill's greedy answer, along which every arm is forced.
        workload: one of lmc.workloads.WORKLOADS, with its fields.
        limit: how many of its prompts are measured.
        arms: name -> arm; recovery is that of `full_reuse`.
        compare: pairs of arms whose difference in recovery is printed, with its interval.
    """

    connector: Literal["hf"]
    model: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = Field(default=2, gt=0)
    context: Context = "isolated"
    position: Position = "global"
    answer_tokens: int = Field(default=32, gt=0)
    workload: dict[str, Any]
    limit: int = Field(default=32, gt=0)
    arms: dict[str, HFArm] = Field(max_length=MOST_ARMS)
    compare: list[tuple[str, str]] = Field(default_factory=list)

    @field_validator("workload")
    @classmethod
    def _known_workload(cls, workload: dict[str, Any]) -> dict[str, Any]:
        WORKLOADS.build(workload)
        return workload

    @model_validator(mode="before")
    @classmethod
    def _limit_in_workload(cls, data: Any) -> Any:
        """`workload.limit` is where the other experiments have it."""
        if isinstance(data, dict) and isinstance(data.get("workload"), dict):
            workload = dict(data["workload"])
            if "limit" in workload:
                data = {**data, "limit": workload.pop("limit"), "workload": workload}
        return data

    @model_validator(mode="after")
    def _known_arms(self) -> HFExperiment:
        reuse = self.arms.get(FULL_REUSE)
        if reuse is None or reuse.blend != {"name": "full_reuse"}:
            raise ValueError(
                f"arms: got {', '.join(self.arms) or 'none'}; recovery is that of "
                f"`{FULL_REUSE}: {{blend: {{name: full_reuse}}}}`, which must be among them"
            )
        for name in (name for pair in self.compare for name in pair):
            if name not in self.arms:
                raise ValueError(f"compare: got {name}; valid: {', '.join(self.arms)}")
        return self

    def digest(self) -> str:
        """16 hex digits that name what is measured; the same whatever `NOT_HASHED` says."""
        settings = self.model_dump(mode="json", exclude=NOT_HASHED)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: Path, overrides: list[str] | None = None) -> HFExperiment:
    """Read an experiment; ValueError for a bad file, and for unknown or wrong keys."""
    return validated(path, HFExperiment, read_settings(path, overrides))
