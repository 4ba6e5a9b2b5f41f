"""Experiments as data: how a YAML file is read, and what all experiments say alike."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from lmc.model import exports
from lmc.quality import BLENDS
from lmc.workloads import WORKLOADS
from lmc.workloads.sample import Sample


class Strict(BaseModel):
    """A frozen model that names the valid keys when it is given an unknown one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and (
            unknown := sorted(map(str, set(data) - set(cls.model_fields)))
        ):
            raise ValueError(
                f"got unknown key {', '.join(unknown)}; valid: {', '.join(cls.model_fields)}"
            )
        return data

    # What says how much is measured, not what: changing it continues a results folder.
    not_hashed: ClassVar[dict[str, Any]] = {}

    def digest(self) -> str:
        """16 hex digits that name what is measured; the same whatever `not_hashed` says."""
        settings = self.model_dump(mode="json", exclude=self.not_hashed)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


M = TypeVar("M", bound=Strict)


def _resolved_workload(spec: Any) -> dict[str, Any]:
    """Name and all fields of a workload, and `limit`: how many of its prompts are measured."""
    fields = WORKLOADS.parse(spec)
    limit = fields.pop("limit", None)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit: got {limit!r}, want a whole number of at least 1")
    return {**_fields_of(WORKLOADS.build(fields)), "name": fields.get("name"), "limit": limit}


def _fields_of(workload: Any) -> dict[str, Any]:
    return {f.name: getattr(workload, f.name) for f in dataclasses.fields(workload) if f.init}


def _known_strategy(spec: Any) -> dict[str, Any]:
    fields = BLENDS.parse(spec)
    BLENDS.build(fields)
    return fields


Workload = Annotated[dict[str, Any], BeforeValidator(_resolved_workload)]
Blend = Annotated[dict[str, Any], BeforeValidator(_known_strategy)]


def samples_of(workload: Workload, tokenizer: Any) -> list[Sample]:
    """The prompts that are measured; raises ValueError where their lengths leave no room."""
    try:
        samples: list[Sample] = built(workload).samples(tokenizer)
    except ValueError as error:
        raise ValueError(f"workload {workload['name']}: {error}") from error
    if not samples:
        raise ValueError(f"workload {workload['name']}: has no prompts")
    return samples[: workload["limit"]]


def built(workload: Workload) -> Any:
    """The workload itself."""
    return WORKLOADS.build({name: value for name, value in workload.items() if name != "limit"})


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model, by a name of `lmc.model.exports`, its folder or hub name.

    Raises ValueError where it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(exports.resolve(model))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: got {model!r}, which has no tokenizer: {error}") from error


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
        known: Any = base.get(key)
        both = isinstance(value, dict) and isinstance(known, dict)
        merged[key] = _merge(known, value) if both and _same_thing(known, value) else value
    return merged


def _same_thing(known: dict[str, Any], value: dict[str, Any]) -> bool:
    """Not another workload or strategy, which has fields of its own."""
    return bool(value.get("name", known.get("name")) == known.get("name"))


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
