"""What a newcomer meets: names of `import lmc`, commands and files that the documents name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from typer.testing import CliRunner

import lmc
from lmc.cli.app import app
from lmc.cli.errors import EXTRAS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what is gone
TEXTS += [*sorted((ROOT / "experiments").glob("*.yaml")), ROOT / "Makefile"]
# `lmc x y`: up to two words behind the command, as far as they are commands.
COMMAND = re.compile(r"(?:^|[`(/ ])lmc ((?:[a-z]+)(?: [a-z]+)?)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
PLACE = re.compile(r"`((?:lmc|tests|kernels|docs|experiments|benchmarks|notebooks)/[\w./]*)`")


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_lmc_costs_next_to_nothing() -> None:
    heavy = "{'torch', 'vllm', 'transformers', 'numpy', 'pydantic', 'matplotlib', 'rich', 'typer'}"
    assert python(f"import sys, lmc; print({heavy} & set(sys.modules))").strip() == "set()"


@pytest.mark.parametrize("name", lmc.__all__)
def test_every_name_of_the_door_is_there(name: str) -> None:
    assert getattr(lmc, name) is not None
    assert name in dir(lmc)


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'blnd'; it has Answer, .*answer"):
        _ = lmc.blnd  # type: ignore[attr-defined]


@pytest.mark.heavy
def test_the_connector_imports_nothing_that_measures() -> None:
    code = (
        "import sys, lmc.connectors.vllm.connector, lmc.connectors.vllm.worker_cls\n"
        "print(sorted(m for m in sys.modules if m.startswith("
        "('lmc.sim', 'lmc.plots', 'lmc.experiment', 'lmc.workloads', 'lmc.results', 'lmc.cli'))))"
    )
    assert python(code).splitlines()[-1] == "[]"


def commands() -> set[str]:
    """What stands behind `lmc` and begins as a command does; prose goes on otherwise."""
    groups = {group.name for group in app.registered_groups}
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    found = set()
    for page in TEXTS:
        for match in COMMAND.finditer(page.read_text()):
            first, *rest = match[1].split()
            if first in groups:
                found.add(f"{first} {rest[0]}" if rest else first)
            elif first in known:
                found.add(first)
    return found


def test_the_documents_name_commands() -> None:
    assert {"run", "calibrate", "sim", "store ls", "workload solvable"} <= commands()


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_that_the_documents_name_is_there(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    places = [page.parent / link for link in LINK.findall(text) if "//" not in link]
    places += [ROOT / place for place in PLACE.findall(text) if "PLACE" not in place]
    missing = [str(place.relative_to(ROOT)) for place in map(Path.resolve, places)
               if not place.exists()]  # fmt: skip
    assert not missing


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("numba", ["sim", "TRACE", "--capacity", "all"], "sim"),
        ("ijson", ["trace", "info", "TRACE"], "sim"),
        ("matplotlib", ["sim", "TRACE", "--plot", "x.png"], "sim"),
        ("lmdb", ["store", "ls", "."], "store"),
        ("transformers", ["workload", "show", "chain"], "hf"),
        ("torch", ["calibrate", "smollm2"], "hf"),
        ("vllm", ["run", "EXPERIMENT", "--out", "OUT"], "cuda"),
    ],
)
def test_what_is_not_installed_is_named_with_the_line_that_installs_it(
    module: str, command: list[str], extra: str, tmp_path: Path
) -> None:
    (tmp_path / "TRACE").write_text('{"timestamp": 0, "tokens": [1, 2, 3]}\n' * 4)
    (tmp_path / "EXPERIMENT").write_text(
        f"extends: {ROOT / 'experiments' / 'demo.yaml'}\nworkload: {{limit: 1}}\n"
    )
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {module!r}:\n"
        f"            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from lmc.cli.app import app\n"
        "app(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("lmc: this needs the extra"), done.stderr
    assert f"[{extra}]" in done.stderr and module in done.stderr
    assert f"pip install '.[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        brought = {re.match(r"[\w-]+", requirement)[0] for requirement in extras[extra]}  # type: ignore[index]
        assert packages <= brought, extra


def test_a_strategy_of_ones_own_is_found_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from lmc.blend.epic import Epic\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Epic):\n"
        "    pass\n"
    )
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "tokens": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]}\n' * 3)
    done = subprocess.run(
        [Path(sys.executable).parent / "lmc", "sim", str(trace), "--metric", "store", "--unit",
         "bytes", "--blend", "mine:Mine:link_tokens=4", "--json"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"hit_rate"' in done.stdout
