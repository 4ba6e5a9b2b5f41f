"""One registry for everything a config names: chunkers, policies, tiers, strategies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from pydantic import TypeAdapter, ValidationError


def one_line(error: ValidationError) -> str:
    """The errors pydantic found, on one line: field, what is wrong, what was got."""
    parts = []
    for e in error.errors(include_url=False):
        field = ".".join(str(x) for x in e["loc"])
        got = "" if e["type"] == "missing" else f" (got {e['input']!r})"
        parts.append(f"{field}: {e['msg']}{got}" if field else e["msg"])
    return "; ".join(parts)


def assigned(assignments: Sequence[str]) -> dict[str, str]:
    """Fields for `Registry.build` out of `--set FIELD=VALUE`; its types say what a value may be.

    Raises ValueError for one that is not of that form, or that would set the name.
    """
    fields = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not (name and equals) or name == "name":
            raise ValueError(f"--set: got {text!r}, want FIELD=VALUE such as documents=500")
        fields[name] = value
    return fields


class Registry:
    """Name -> "module:Class", imported when it is first built.

    kind: what the entries are, for messages ("chunker").
    entries: name -> "module:Class"; each class is a dataclass whose fields are its config.
    """

    def __init__(self, kind: str, entries: dict[str, str]):
        self.kind, self.entries = kind, entries

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self.entries)

    def build(self, config: Mapping[str, Any] | str) -> Any:
        """A fresh object from `{"name": ..., **fields}`, or from a name alone.

        The name may be the user's own "module:Class". Values are checked against the field types.
        Raises ValueError for an unknown name or field and for a wrong value.
        """
        fields = {"name": config} if isinstance(config, str) else dict(config)
        name = fields.pop("name", None)
        cls = self.load(name)
        valid = {f.name: f for f in dataclasses.fields(cls) if f.init}
        if unknown := sorted(map(str, fields.keys() - valid.keys())):
            raise ValueError(
                f"{self.kind} {name!r}: got unknown field {', '.join(unknown)}; "
                f"valid: {', '.join(valid) or 'none'}"
            )
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as e:
            valid_types = ", ".join(f"{f.name}: {_type_name(f.type)}" for f in valid.values())
            raise ValueError(f"{self.kind} {name!r}: {one_line(e)}; valid: {valid_types}") from e

    def load(self, name: Any) -> Any:
        """The class of a name. Raises ValueError for an unknown one."""
        target = self.entries.get(name, name) if isinstance(name, str) else ""
        module, colon, attribute = target.partition(":")
        if not (module and colon and attribute):
            raise ValueError(
                f"unknown {self.kind}: got {name!r}; valid: {', '.join(self.names())}, "
                "or module:Class for your own"
            )
        try:
            cls = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as e:
            raise ValueError(f"{self.kind} {name!r}: cannot be imported: {e}") from e
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise ValueError(f"{self.kind} {name!r}: got {cls!r}, want a dataclass")
        return cls


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
