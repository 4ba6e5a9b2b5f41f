"""Quality profiles: how much of the loss of full reuse each strategy recovers, on one model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import yaml
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lmc.blend import STRATEGIES
from lmc.blend.encoding import Context
from lmc.blend.strategy import Strategy
from lmc.model.weights import cache_dir
from lmc.registry import one_line

Blend = Mapping[str, Any] | str  # name and fields, as `blend` in a config has them
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

SHIPPED = Path(__file__).with_name("profiles")


class Measured(BaseModel):
    """One strategy on all prompts.

    Attributes:
        blend: its name and fields.
        recovery: 1 - mean KL / that of full_reuse: 1 is full prefill, 0 no better than reuse
            without recompute.
        low, high: the 95% interval of it, by bootstrap over prompts.
        compute_fraction: row-layers computed, probe included, over those of full prefill; mean.
        kl: KL(full prefill || strategy), nats an answer token, mean.
        prompts: how many were measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    blend: dict[str, Any]
    recovery: float
    low: float
    high: float
    compute_fraction: float = Field(ge=0)
    kl: float = Field(ge=0)
    prompts: int = Field(ge=1)

    @cached_property
    def strategy(self) -> Strategy:
        """A strategy of these fields; ValueError where its class has changed since."""
        strategy: Strategy = STRATEGIES.build(self.blend)
        return strategy

    @field_validator("blend")
    @classmethod
    def _named(cls, blend: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(blend.get("name"), str):
            raise ValueError("want the name of a strategy and its fields")
        return blend

    @model_validator(mode="after")
    def _ordered(self) -> Measured:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, above high, {self.high}")
        return self


Curve = list[tuple[Any, Measured]]  # (value of the knob, row), ascending; None without a knob


class QualityProfile(BaseModel):
    """What `lmc calibrate` found out about one model.

    Attributes:
        model: its name. weights: BLAKE3 of its weight files (`lmc.model.weights.weights_digest`).
        dtype: it ran in. rope: fingerprint of its rotation.
        lmc_version, git_commit: what measured it.
        workloads: the prompts, as `lmc.workloads.WORKLOADS` names them.
        prompts: of all workloads together.
        context: how the chunks had been encoded (`lmc.blend.encoding.Context`).
        rows: one a strategy and value of its knob.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    weights: Digest
    dtype: str
    rope: Digest
    lmc_version: str
    git_commit: str | None
    workloads: list[dict[str, Any]]
    prompts: int = Field(ge=1)
    context: Context
    rows: list[Measured] = Field(min_length=1)

    @field_validator("rows")
    @classmethod
    def _buildable(cls, rows: list[Measured]) -> list[Measured]:
        seen: list[Strategy] = []
        for row in rows:
            # A file is no reason to import a user's module; a request that names it is.
            if row.blend["name"] not in STRATEGIES.entries:
                continue
            if row.strategy in seen:
                raise ValueError(f"{row.blend} is there twice")
            seen.append(row.strategy)
        return rows

    def curve(self, blend: Blend, strategy: Strategy) -> Curve:
        """The rows that equal a strategy in all fields but the knob, by ascending knob.

        blend: the config that `strategy` was built from. A knob that is no number, such as a list
        of ratios, counts as one more field.
        """
        knob = strategy.knob if is_number(knob_of(strategy)) else None
        found: Curve = []
        for row in self.rows:
            if _target(row.blend) != _target(blend):
                continue
            try:
                same = row.strategy
                value = None if knob is None else knob_of(same)
                if knob is not None and is_number(value):
                    same = dataclasses.replace(same, **{knob: knob_of(strategy)})
            except ValueError:  # a user's class that has changed was not measured as it is
                continue
            if same == strategy:
                found.append((value, row))
        return sorted(found, key=lambda pair: pair[0] or 0)

    def require(self, weights: bytes, dtype: str, rope: bytes, context: Context) -> None:
        """Raise ValueError unless it is of this model and dtype, and of chunks encoded so."""
        for what, ours, theirs in (
            ("weights", self.weights, weights.hex()),
            ("dtype", self.dtype, dtype),
            ("rope", self.rope, rope.hex()),
        ):
            if ours != theirs:
                raise ValueError(
                    f"the quality profile is of another model, {self.model} in {self.dtype}: "
                    f"its {what} is {ours}, this model's {theirs}"
                )
        if self.context != context:
            raise ValueError(
                f"the quality profile of {self.model} was measured with chunks encoded "
                f"{self.context}, and here they are {context}: "
                f"run `lmc calibrate MODEL --context {context}`"
            )

    @property
    def file_name(self) -> str:
        """The name under which `find_profile` finds it."""
        name = "".join(c if c.isalnum() or c in "._" else "-" for c in self.model)
        key = _key(bytes.fromhex(self.weights), self.dtype, bytes.fromhex(self.rope))
        return f"{name}-{self.dtype}-{key}{_suffix(self.context)}.yaml"

    def save(self, path: Path) -> None:
        """Write it as YAML; the file is replaced whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=".profile-") as work:
            new = Path(work) / path.name
            new.write_text(yaml.safe_dump(self.model_dump(), sort_keys=False, width=100))
            new.replace(path)


def load_profile(path: Path | str) -> QualityProfile:
    """Read a profile. Raises ValueError for a file that is missing, no YAML, or not a profile."""
    try:
        fields = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: is not YAML: {error}") from error
    try:
        return QualityProfile.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{path}: is no quality profile: {one_line(error)}") from error


def find_profile(
    weights: bytes,
    dtype: str,
    rope: bytes,
    context: Context = "isolated",
    path: Path | str | None = None,
) -> QualityProfile | None:
    """The profile of a model, or None: `path`, or the user's newest, or the one that lmc ships.

    Args:
        context: how the chunks are encoded that it must tell of.

    Raises ValueError for one that cannot be read, is of another model or of other chunks.
    """
    if path is not None:
        profile = load_profile(path)
        profile.require(weights, dtype, rope, context)
        return profile
    name = f"*-{_key(weights, dtype, rope)}{_suffix(context)}.yaml"
    folders = [SHIPPED]
    with contextlib.suppress(OSError):  # a user without a home has none of his own
        folders.insert(0, user_profiles())
    for folder in folders:
        if files := list(folder.glob(name)):
            newest = max(files, key=lambda file: file.stat().st_mtime)
            return find_profile(weights, dtype, rope, context, newest)
    return None


def _suffix(context: str) -> str:
    return "" if context == "isolated" else f"-{context}"


def user_profiles() -> Path:
    """Where `lmc calibrate` puts profiles; raises as `cache_dir`."""
    return cache_dir() / "profiles"


def knob_of(strategy: Strategy) -> Any:
    """What a strategy's knob is set to; None without one."""
    return None if strategy.knob is None else getattr(strategy, strategy.knob)


def is_number(value: Any) -> bool:
    """Whether values of a knob such as this one can be interpolated."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def interpolated(curve: Curve, value: Any) -> tuple[float, float, float] | None:
    """Recovery, low and high at a value of the knob; None where nothing was measured.

    Linear between two measured values; above the greatest as there, since more rows are
    recomputed; below the least nothing is known.
    """
    if not curve:
        return None
    rows = [row for _, row in curve]
    known = [knob for knob, _ in curve]
    if known[0] is None:
        return rows[0].recovery, rows[0].low, rows[0].high
    if value < known[0]:
        return None
    columns = ([r.recovery for r in rows], [r.low for r in rows], [r.high for r in rows])
    recovery, low, high = (float(np.interp(value, known, column)) for column in columns)
    return recovery, low, high


def least_knob(curve: Curve, min_recovery: float) -> Any:
    """The least value of the knob whose recovery, interpolated, reaches a bound; None if none does.

    Whole numbers stay whole; others are rounded up to a thousandth.
    """
    for i, (value, row) in enumerate(curve):
        if row.recovery < min_recovery:
            continue
        if i == 0:
            return value
        before, worse = curve[i - 1]
        part = (min_recovery - worse.recovery) / (row.recovery - worse.recovery)
        steps = 1 if isinstance(value, int) else 1000
        first = math.ceil((before + part * (value - before)) * steps)
        # Where the bound is met just at a step, floating point may miss it by a hair.
        for nearest in (first, first + 1):
            rounded = type(value)(nearest / steps)
            reached = interpolated(curve, rounded)
            if rounded < value and reached and reached[0] >= min_recovery:
                return rounded
        return value
    return None


def best(curve: Curve) -> tuple[Any, Measured]:
    """The row of a curve that recovers most."""
    return max(curve, key=lambda pair: pair[1].recovery)


def _target(blend: Blend) -> str:
    name = STRATEGIES.parse(blend)["name"]
    return STRATEGIES.entries.get(name, name)


def _key(weights: bytes, dtype: str, rope: bytes) -> str:
    return blake3(weights + rope + dtype.encode()).hexdigest()[:12]
