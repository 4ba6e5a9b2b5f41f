"""Registry: fresh objects, checked fields, errors that name what was got and what is valid."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.registry import Registry


@dataclass(frozen=True)
class Example:
    ratio: float
    layers: Literal["first", "middle"] = "first"
    ids: tuple[int, ...] = ()
    on: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"got ratio {self.ratio}, want 0 to 1")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    # importlib mode does not put this file on sys.path under a name; give it one.
    monkeypatch.setitem(sys.modules, "registry_example", sys.modules[__name__])
    return Registry("thing", {"example": "registry_example:Example", "gone": "no_such_module:X"})


def test_builds_a_fresh_object_each_time(registry: Registry) -> None:
    config = {"name": "example", "ratio": 0.5, "layers": "middle", "ids": [1, 2]}
    first, second = registry.build(config), registry.build(config)
    assert first == second == Example(0.5, "middle", (1, 2))
    assert first is not second
    assert config["name"] == "example"


def test_int_is_taken_as_float(registry: Registry) -> None:
    assert isinstance(registry.build({"name": "example", "ratio": 1}).ratio, float)


def test_users_own_class(registry: Registry) -> None:
    assert registry.build({"name": "registry_example:Example", "ratio": 0}) == Example(0.0)


def test_name_alone() -> None:
    registry = Registry("chunker", {"fixed": "lmc.chunking.fixed:Fixed"})
    assert registry.build("fixed") == registry.build({"name": "fixed"})
    assert registry.names() == ["fixed"]


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ("example:0.5", {"ratio": 0.5}),
        ("example:ratio=0.5,layers=middle", {"ratio": 0.5, "layers": "middle"}),
        (" example:0.5, on=true, ids=[1, 2] ", {"ratio": 0.5, "on": True, "ids": (1, 2)}),
        ("{name: example, ratio: 0.5, ids: [1, 2]}", {"ratio": 0.5, "ids": (1, 2)}),
        ("registry_example:Example:0.5", {"ratio": 0.5}),
        ("registry_example:Example:ratio=0.5,on=true", {"ratio": 0.5, "on": True}),
        ({"name": "example", "ratio": 0.5}, {"ratio": 0.5}),
    ],
)  # fmt: skip
def test_one_syntax(registry: Registry, spec: Any, fields: dict[str, Any]) -> None:
    assert registry.build(spec) == Example(**fields)
    assert registry.build(registry.parse(spec)) == Example(**fields)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("example:", "fields behind the colon, or none"),
        ("registry_example:Example:", "fields behind the colon, or none"),
        ("example:0.5,middle", "field=value behind the first comma"),
        ("example:0.5,ratio=0.4", "sets ratio twice"),
        ("example:name=other", "sets name twice"),
        ("example:8x", "ratio: .*got '8x'"),
        ("example:ratio=[1", "whose ratio is no YAML"),
        ("{name: example", "is no YAML"),
        ("{ratio: 0.5}", "want {name: ...,"),
        ("exampel:0.5", "unknown thing: got 'exampel'; valid: example, gone"),
        (5, "want a name, a text or a mapping"),
        (["example"], "want a name, a text or a mapping"),
        (True, "want a name, a text or a mapping"),
    ],
)
def test_one_syntax_and_what_is_not_it(registry: Registry, spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.build(spec)


def test_several_with_commas_between(registry: Registry) -> None:
    text = "example:0.5,layers=middle,example:ids=[1, 2],gone, example"
    assert registry.split(text) == [
        "example:0.5,layers=middle",
        "example:ids=[1, 2]",
        "gone",
        "example",
    ]


def test_what_the_builder_gives_no_config_sets() -> None:
    policies = Registry("policy", {"ttl": "lmc.policies.recency:Ttl"}, given=["capacity"])
    policy = policies.build("ttl:60", capacity=9)
    assert (policy.capacity, policy.seconds) == (9, 60.0)
    with pytest.raises(ValueError, match="unknown field capacity; valid: seconds"):
        policies.build("ttl:capacity=3", capacity=9)


BOMB = "{name: example, ratio: {" + ", ".join(
    f"f{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9)
) + "}}"  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        "example:" + "[" * 3000,
        "example:" + "[" * 1000 + "]" * 1000,
        "example:" + "[" * 15 + "]" * 15,
        "{name: example, ratio: " + "{a: " * 100 + "1" + "}" * 100 + "}",
        BOMB,
        "example:" + ",".join(f"f{i}=1" for i in range(100)),
        "example:ratio=" + "x" * 1500,
        "example:ratio=2020-99-99",
        "example:!!python/object/apply:os.system [true]",
        "x" * 100_000,
        {"name": "example", **{f"f{i}": 1 for i in range(10_000)}},
        {"name": "example", "ratio": ["x" * 1000] * 1000},
    ],
    ids=range(12),
)
def test_a_hostile_text_costs_little_and_ends_in_a_short_line(
    registry: Registry, spec: Any
) -> None:
    with pytest.raises(ValueError, match="thing") as e:
        registry.build(spec)
    assert len(str(e.value)) < 2000
    assert "\n" not in str(e.value)


def test_a_typo_with_fields_names_what_there_is(registry: Registry) -> None:
    for spec in ("exampel:4", "random:16", "exampel:a-b=3"):
        with pytest.raises(ValueError, match=r"unknown thing: got .*valid: example, gone"):
            registry.build(spec)
    with pytest.raises(ValueError, match=r"cannot be imported.*valid without a module: example"):
        registry.build("exampel:Ratio")


@given(st.text(max_size=30))
def test_no_text_is_more_than_refused(text: str) -> None:
    with suppress(ValueError):
        Registry("thing", {"fixed": "lmc.chunking.fixed:Fixed"}).build(text)


@pytest.mark.parametrize("name", ["nothing", None, 3, "", ":", "a:", ":b"])
def test_unknown_name(registry: Registry, name: object) -> None:
    with pytest.raises(ValueError, match=r"unknown thing: got .*; valid: example, gone") as e:
        registry.build({"name": name})
    assert repr(name) in str(e.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 0.1, "ratoi": 2}, r"unknown field ratoi; valid: ratio, layers, ids, on"),
        ({"ratio": "much"}, r"ratio: .*got 'much'.*valid: ratio: float"),
        ({"ratio": 0.1, "layers": "last"}, r"layers: .*'first' or 'middle'.*got 'last'"),
        ({"ratio": 0.1, "ids": [1, "x"]}, r"ids\.1: .*got 'x'"),
        ({"ratio": 0.1, "on": 7}, r"on: .*got 7"),
        ({}, r"ratio: .*required"),
        ({"ratio": 2}, r"got ratio 2.0, want 0 to 1"),
    ],
)
def test_wrong_fields(registry: Registry, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as e:
        registry.build({"name": "example", **fields})
    assert "\n" not in str(e.value)
    assert "thing 'example'" in str(e.value)


@pytest.mark.parametrize("name", ["gone", "registry_example:Missing", "registry_example:pytest"])
def test_what_cannot_be_built(registry: Registry, name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be imported|want a dataclass"):
        registry.build(name)


def test_light_to_import() -> None:
    code = (
        "import sys, lmc, lmc.registry, lmc.chunking.pieces, lmc.model.exports, lmc.cli.app;"
        "import lmc.chunking as c;"
        "[c.CHUNKERS.build(n) for n in ('cdc', 'explicit', 'fixed')];"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


REGISTRIES = [
    "lmc.blend:STRATEGIES",
    "lmc.quality:BLENDS",
    "lmc.chunking:CHUNKERS",
    "lmc.policies:POLICIES",
    "lmc.store.tier:TIERS",
    "lmc.workloads:WORKLOADS",
    "lmc.sim.readers:FORMATS",
    "lmc.sim.synthetic:GENERATORS",
    "lmc.sim.reuse:CUTS",
]


def registry_of(where: str) -> Registry:
    module, _, name = where.partition(":")
    found: Registry = getattr(import_module(module), name)
    return found


@pytest.mark.parametrize("where", REGISTRIES)
def test_every_registered_class_is_there_and_of_its_kind(where: str) -> None:
    registry = registry_of(where)
    for name in registry.names():
        assert registry.load(name)


@pytest.mark.parametrize("where", REGISTRIES[:-1])
def test_a_class_of_another_kind_is_refused(where: str, registry: Registry) -> None:
    with pytest.raises(ValueError, match="got Example, which has no "):
        registry_of(where).build("registry_example:Example:0.5")


@pytest.mark.parametrize("path", ["it's/a.jsonl", "a (1.jsonl", "a]b", "x{1}", "C:/x y"])
def test_a_quote_or_bracket_inside_a_word_opens_nothing(path: str) -> None:
    registry = Registry("workload", {"passages": "lmc.workloads.passages:Passages"})
    built = registry.build(f"passages:path={path},chunks=2")
    assert (str(built.path), built.chunks) == (path, 2)
