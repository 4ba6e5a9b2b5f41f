"""What an experiment on a Hugging Face model may say: no engine, no timing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from lmc.blend.encoding import Context, Position
from lmc.experiment.settings import Blend, Strict, Workload, validated
from lmc.quality import BLENDS
from lmc.quality.auto import Auto
from lmc.results.summary import FULL_REUSE

MOST_ARMS = 20


class HFArm(Strict):
    """A strategy, or full prefill in two parts.

    Attributes:
        blend: strategy name and fields.
        context, position: override the experiment's.
        split: full prefill computed in two parts, which shows how much rounding alone changes.
    """

    blend: Blend | None = None
    context: Context | None = None
    position: Position | None = None
    split: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> HFArm:
        if (self.blend is None) == (not self.split):
            raise ValueError("want either `blend: {name: ...}` or `split: true`")
        if self.blend is not None and isinstance(BLENDS.build(self.blend), Auto):
            raise ValueError("blend: got auto, which an engine resolves by its quality profile")
        return self


class HFExperiment(Strict):
    """A whole experiment on a Hugging Face model.

    Attributes:
        model: a name that lmc.model.exports knows, a folder, or a hub name.
        threads: of torch.
        context: how chunks are encoded before they are reused: `isolated`, `anchored` behind the
            system prompt, or as `first_seen` in a prompt with other chunks in front.
        position: `global`: chunks are rotated to where they stand; `local`: all begin where the
            first does.
        answer_tokens: of full prefill's greedy answer, along which every arm is forced.
        workload: one of lmc.workloads.WORKLOADS, with its fields; limit: how many of its prompts
            are measured.
        arms: name -> arm; recovery is that of `full_reuse`.
        compare: pairs of arms whose difference in recovery is printed, with its interval.
    """

    not_hashed: ClassVar[dict[str, Any]] = {"threads": True, "workload": {"limit"}}

    connector: Literal["hf"]
    model: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = Field(default=2, gt=0)
    context: Context = "isolated"
    position: Position = "global"
    answer_tokens: int = Field(default=32, gt=0)
    workload: Workload
    arms: dict[str, HFArm] = Field(max_length=MOST_ARMS)
    compare: list[tuple[str, str]] = Field(default_factory=list)

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


def load_config(path: Path, raw: dict[str, Any]) -> HFExperiment:
    """An experiment out of settings; ValueError that names the file for unknown or wrong keys."""
    return validated(path, HFExperiment, raw)
