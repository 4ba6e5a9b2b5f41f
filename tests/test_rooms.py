"""Rooms: imports go one way, what serves imports nothing that measures, and files stay short.

Read from the sources, so that an import inside a function counts, and so does a "module:Class"
of a registry.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each room may import what stands further left, and what stands beside it in a room of its own.
FLOORS = (
    ("registry", "sizes"),
    ("kernels", "model"),
    ("chunking", "policies"),
    ("store",),
    ("blend",),
    ("quality",),
    ("connectors",),
    ("workloads", "results"),
    ("experiment", "sim"),
    ("plots",),
    ("lmc",),  # lmc/__init__.py, the door
    ("cli",),
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
# The simulator stands on these alone: it needs neither torch nor an engine.
SIM_STANDS_ON = {"registry", "sizes", "model", "chunking", "policies", "store", "blend", "sim"}
PLOTS_STAND_ON = {"sizes", "quality", "results", "sim", "plots"}
LONGEST = 400
# A module that a text names: for a registry, for import_module, for `python -m`.
NAMED = re.compile(r"(lmc(?:\.\w+)+)(?:[:.,].*)?")


def sources() -> list[Path]:
    link = ROOT / "lmc" / "kernels"  # to the folder below
    found = [p for p in sorted((ROOT / "lmc").rglob("*.py")) if link not in p.parents]
    return found + sorted((ROOT / "kernels").glob("*.py"))


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "lmc"


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["lmc", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of everything of lmc's that a source imports, or names for a registry."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name their module in full"
            module = node.module or ""
            # `from lmc import x` takes the room x, or a name of the door.
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield node.lineno, inner if module == "lmc" and _is_room(alias.name) else module
        elif isinstance(node, ast.Constant) and (match := NAMED.fullmatch(str(node.value))):
            yield node.lineno, match[1]


def _is_room(name: str) -> bool:
    return name in FLOOR and name != "lmc"


def arrows() -> list[tuple[Path, int, str, str]]:
    """(file, line, room, room it imports)."""
    found = []
    for path in sources():
        room = room_of(module_of(path))
        for line, module in imported(ast.parse(path.read_text())):
            if module.split(".")[0] == "lmc" and room_of(module) != room:
                found.append((path, line, room, room_of(module)))
    return found


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module_of(path)) for path in sources()}
    assert rooms <= FLOOR.keys(), f"no floor is known of {rooms - FLOOR.keys()}: add it to FLOORS"


def test_imports_go_one_way() -> None:
    upward = [
        f"{path.relative_to(ROOT)}:{line}: {room} imports {other}, which stands above it or beside"
        for path, line, room, other in arrows()
        if FLOOR[other] >= FLOOR[room]
    ]
    assert not upward, "\n".join(upward)


def test_the_simulator_stands_on_what_needs_no_torch() -> None:
    wrong = {other for _, _, room, other in arrows() if room == "sim"} - SIM_STANDS_ON
    assert not wrong, f"sim imports {', '.join(sorted(wrong))}"


def test_figures_stand_on_rows_and_traces() -> None:
    wrong = {other for _, _, room, other in arrows() if room == "plots"} - PLOTS_STAND_ON
    assert not wrong, f"plots imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("room", ["connectors", "experiment"])
def test_engine_and_hugging_face_know_nothing_of_each_other(room: str) -> None:
    for here, there in (("vllm", "hf"), ("hf", "vllm")):
        for path in sorted((ROOT / "lmc" / room / here).glob("*.py")):
            for line, module in imported(ast.parse(path.read_text())):
                assert f".{there}." not in f"{module}.", f"{path.relative_to(ROOT)}:{line}"


def test_the_sources_are_all_read() -> None:
    assert len(sources()) > 190 and len(arrows()) > 400


@pytest.mark.parametrize("path", sources(), ids=lambda path: module_of(path))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


def test_what_serves_neither_prints_nor_draws() -> None:
    wrong = []
    for path in sources():
        if room_of(module_of(path)) in ("cli", "plots", "kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="print")):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: prints")
                case ast.ImportFrom() | ast.Import():
                    modules = (
                        [node.module or ""]
                        if isinstance(node, ast.ImportFrom)
                        else [alias.name for alias in node.names]
                    )
                    wrong += [
                        f"{path.relative_to(ROOT)}:{node.lineno}: imports {module}"
                        for module in modules
                        if module.split(".")[0] in ("rich", "typer", "matplotlib")
                    ]
    assert not wrong, "\n".join(wrong)


def test_an_upward_import_is_seen() -> None:
    """The reader of imports itself: each way in which one may be written."""
    source = (
        "from lmc import plots\nimport lmc.cli.app\ndef f():\n    from lmc.sim.trace import x\n"
        "E = {'a': 'lmc.experiment.run:Run'}\nfrom lmc import __version__\n"
        "import_module('lmc.sim.trace')\nE |= {'b': 'lmc.results.fit:Fit,field=1'}\n"
        "import lmc.store.index as i, os\n"
    )
    found = {
        line: room_of(module)
        for line, module in imported(ast.parse(source))
        if module.startswith("lmc")
    }
    rooms = ["plots", "cli", "", "sim", "experiment", "lmc", "sim", "results", "store"]
    assert found == {line: room for line, room in enumerate(rooms, 1) if room}
