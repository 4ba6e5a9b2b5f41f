"""One registry, and one way to write it down, for everything that is a name with fields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

LONGEST, DEEPEST = 2000, 10  # of a text, and of brackets in it
SHOWN = 200  # characters of a value in a message
OPENING, CLOSING = "([{", ")]}"
SEXAGESIMAL = re.compile(r"[-+\d_.]+(:[\d_.]+)+")
FIELD = re.compile(r"([A-Za-z_]\w*) *=(.*)", re.DOTALL)


def one_line(error: ValidationError) -> str:
    """The errors pydantic found, on one line: field, what is wrong, what was got."""
    parts = []
    for e in error.errors(include_url=False):
        field = ".".join(str(x) for x in e["loc"])
        got = "" if e["type"] == "missing" else f" (got {_shown(e['input'])})"
        parts.append(f"{field}: {e['msg']}{got}" if field else e["msg"])
    return "; ".join(parts)


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, a few of which make a short text a large value."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def _shown(value: Any) -> str:
    """A value as a message shows it: its beginning, where it is long."""
    return _beginning(repr(value))


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=PlainLoader)


@lru_cache(maxsize=256)  # to make one takes longer than to check a config with it
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


class Registry:
    """Name -> "module:Class", imported when it is first built.

    What a config, a command line or a notebook names is written in one of three ways:

        epic                            a name: every field as its class has it
        epic:link_tokens=4              a name and fields; values are YAML, commas go between
        {name: epic, link_tokens: 4}    a mapping, or the text of one

    The first field may go without its name, `epic:4`; and a name may be the user's own
    `module:Class`, fields behind a further colon.

    Args:
        kind: what the entries are, for messages ("chunker").
        entries: name -> "module:Class"; each class is a dataclass whose fields are its config.
        given: fields that no config sets, since whoever builds the object says them.
        has: what every class must have, so that one of another kind is told apart at once.
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, str],
        given: Sequence[str] = (),
        has: Sequence[str] = (),
    ):
        self.kind, self.entries = kind, dict(entries)
        self.given, self.has = tuple(given), tuple(has)

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self.entries)

    def with_entries(self, entries: Mapping[str, str]) -> Registry:
        """A registry of these entries and further ones."""
        return Registry(self.kind, {**self.entries, **entries}, self.given, self.has)

    def parse(self, spec: Mapping[str, Any] | str) -> dict[str, Any]:
        """`{"name": ..., **fields}` out of any of the three ways.

        Raises ValueError for a text that is none of them, and for an unknown name where the
        first field goes without its own.
        """
        if isinstance(spec, Mapping):
            return dict(spec)
        if not isinstance(spec, str):
            raise ValueError(f"{self.kind}: got {_shown(spec)}, want a name, a text or a mapping")
        text = spec.strip()
        if len(text) > LONGEST:
            raise ValueError(
                f"{self.kind}: got a text of {len(text):,} characters, allowed: {LONGEST:,}"
            )
        if deepest(text) > DEEPEST:
            raise ValueError(f"{self.kind}: got {_shown(spec)}, allowed: brackets {DEEPEST} deep")
        if text.startswith("{"):
            return self._mapping(text)
        name, colon, rest = text.partition(":")
        if name not in self.entries and colon:
            attribute, colon, rest = rest.partition(":")
            if not attribute.isidentifier():
                raise self._unknown(name)
            name = f"{name}:{attribute}"
        if colon and not rest.strip():
            raise ValueError(
                f"{self.kind}: got {_shown(spec)}, want fields behind the colon, or none"
            )
        return {"name": name, **(self._fields(name, rest, spec) if colon else {})}

    def split(self, text: str) -> list[str]:
        """Several of them, with commas between: `lru,ttl:seconds=600,belady`.

        A part that is only `field=value` belongs to the one before it.
        """
        specs: list[str] = []
        for part in split_outside(text, ","):
            if FIELD.fullmatch(part.strip()) and specs and ":" in specs[-1]:
                specs[-1] += f",{part}"
            else:
                specs.append(part)
        return [spec.strip() for spec in specs]

    def build(self, spec: Mapping[str, Any] | str, **given: Any) -> Any:
        """A fresh object, its values checked against the field types.

        given: the fields that no config sets, as far as the class has them.

        Raises ValueError as `parse`, for an unknown name or field, and for a wrong value.
        """
        fields = self.parse(spec)
        name = fields.pop("name", None)
        cls = self.load(name)
        valid = self._fields_of(cls)
        if unknown := sorted(map(str, fields.keys() - valid.keys())):
            raise ValueError(
                f"{self.kind} {name!r}: got unknown field {_beginning(', '.join(unknown))}; "
                f"valid: {', '.join(valid) or 'none'}"
            )
        said = {f.name for f in dataclasses.fields(cls)} & given.keys()
        try:
            return _adapter(cls).validate_python(fields | {f: given[f] for f in said})
        except ValidationError as e:
            valid_types = ", ".join(f"{f.name}: {_type_name(f.type)}" for f in valid.values())
            raise ValueError(f"{self.kind} {name!r}: {one_line(e)}; valid: {valid_types}") from e

    def load(self, name: Any) -> Any:
        """The class of a name. Raises ValueError for an unknown one."""
        target = self.entries.get(name, name) if isinstance(name, str) else ""
        module, colon, attribute = target.partition(":")
        if not (module and colon and attribute):
            raise self._unknown(name)
        try:
            cls = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as e:
            valid = "" if name in self.entries else f"; valid without a module: {self._valid}"
            raise ValueError(f"{self.kind} {name!r}: cannot be imported: {e}{valid}") from e
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise ValueError(f"{self.kind} {name!r}: got {cls!r}, want a dataclass")
        if missing := [attribute for attribute in self.has if not hasattr(cls, attribute)]:
            raise ValueError(
                f"{self.kind} {name!r}: got {cls.__name__}, which has no {', '.join(missing)}"
            )
        return cls

    @property
    def _valid(self) -> str:
        return ", ".join(self.names())

    def _unknown(self, name: Any) -> ValueError:
        return ValueError(
            f"unknown {self.kind}: got {_shown(name)}; valid: {self._valid}, "
            "or module:Class for your own"
        )

    def _mapping(self, text: str) -> dict[str, Any]:
        try:
            fields = _yaml(text)
        except (yaml.YAMLError, ValueError) as e:
            raise ValueError(f"{self.kind}: got {_shown(text)}, which is no YAML") from e
        if not (isinstance(fields, dict) and "name" in fields):
            raise ValueError(
                f"{self.kind}: got {_shown(text)}, want {{name: ..., field: value, ...}}"
            )
        return fields

    def _fields(self, name: str, text: str, spec: str) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for i, part in enumerate(split_outside(text, ",")):
            match = FIELD.fullmatch(part.strip())
            if match is None and i:
                raise ValueError(
                    f"{self.kind}: got {_shown(spec)}, want field=value behind the first comma "
                    f"({part.strip()!r} names no field)"
                )
            field, value = match.groups() if match else (self._first_field(name), part)
            if field in fields or field == "name":
                raise ValueError(f"{self.kind}: got {_shown(spec)}, which sets {field} twice")
            try:
                # To YAML 1.1, 2:30 is the number 150.
                sexagesimal = SEXAGESIMAL.fullmatch(value.strip())
                fields[field] = value.strip() if sexagesimal else _yaml(value)
            except (yaml.YAMLError, ValueError) as e:
                raise ValueError(
                    f"{self.kind}: got {_shown(spec)}, whose {field} is no YAML"
                ) from e
        return fields

    def _first_field(self, name: str) -> str:
        fields = list(self._fields_of(self.load(name)))
        if not fields:
            raise ValueError(f"{self.kind} {name!r}: has no fields")
        return fields[0]

    def _fields_of(self, cls: Any) -> dict[str, dataclasses.Field[Any]]:
        fields = dataclasses.fields(cls)
        return {f.name: f for f in fields if f.init and f.name not in self.given}


def split_outside(text: str, separator: str) -> list[str]:
    """Parts of a text between separators that stand in no brackets and no quotes."""
    parts, depth, quote, start = [], 0, "", 0
    before = ""  # the last character that was no space
    for i, c in enumerate(text):
        # A quote or a bracket inside a word, as in a file's name, opens nothing.
        begins = depth > 0 or before in ("", "=", ",", ":")
        before = before if c.isspace() else c
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"" and begins:
            quote = c
        elif c in OPENING and begins:
            depth += 1
        elif c in CLOSING:
            depth -= 1
        elif c == separator and depth <= 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def deepest(text: str) -> int:
    """How deep its brackets nest, whatever stands in quotes."""
    depth = most = 0
    for c in text:
        depth += (c in OPENING) - (c in CLOSING)
        most = max(most, depth)
    return most


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
