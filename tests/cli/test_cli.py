"""The command line, as a shell sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

import lmc
from lmc.cli.app import app
from lmc.model import exports


def invoke(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, args)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """In place of lmc.experiment.run: keeps what it was called with, raises `error` if set."""
    module = ModuleType("lmc.experiment.run")
    module.calls, module.error = [], None

    def load(experiment: Path, overrides: list[str]) -> None:
        module.calls.append((experiment, overrides))
        if module.error:
            raise module.error

    def run(config: None, out: Path, progress: Any) -> list[Any]:
        module.calls.append(out)
        return []

    module.load, module.run = load, run
    monkeypatch.setitem(sys.modules, "lmc.experiment.run", module)
    monkeypatch.setattr("lmc.cli.run.report", lambda *arguments: None)
    return module


def test_version() -> None:
    assert invoke("--version") == (0, f"{lmc.__version__}\n", "")


def test_run(experiment: Any) -> None:
    code, out, err = invoke("run", "x.yaml", "--out", "o", "--set", "a.b=1", "--set", "c=[2, 3]")
    assert (code, out, err) == (0, "", "")
    assert experiment.calls == [(Path("x.yaml"), ["a.b=1", "c=[2, 3]"]), Path("o")]


def test_run_without_overrides(experiment: Any) -> None:
    assert invoke("run", "x.yaml", "--out", "o")[0] == 0
    assert experiment.calls == [(Path("x.yaml"), []), Path("o")]


def test_run_needs_out(experiment: Any) -> None:
    code, _, err = invoke("run", "x.yaml")
    assert code == 2
    assert "--out" in err


class Config(BaseModel):
    ratio: float


def pydantic_error() -> Exception:
    try:
        Config(ratio="much")
    except ValueError as e:
        return e
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("workload.limit: got 0,\n  want at least 1"), "limit: got 0, want at least 1"),
        (FileNotFoundError(2, "No such file or directory", "x.yaml"), "'x.yaml'"),
        (ModuleNotFoundError("No module named 'vllm'"), "No module named 'vllm'"),
        (pydantic_error(), "ratio: Input should be a valid number"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_wrong_input_is_one_line(experiment: Any, error: Exception, message: str) -> None:
    experiment.error = error
    code, out, err = invoke("run", "x.yaml", "--out", "o")
    assert (code, out) == (2, "")
    assert err.startswith("lmc: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_bug_keeps_its_traceback(experiment: Any) -> None:
    experiment.error = RuntimeError("a bug")
    result = CliRunner().invoke(app, ["run", "x.yaml", "--out", "o"])
    assert result.exception is experiment.error


def test_model_export_prints_the_path_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "export", lambda name, download: tmp_path / name)
    assert invoke("model", "export", "smollm2") == (0, f"{tmp_path / 'smollm2'}\n", "")


def test_model_export_of_an_unknown_model() -> None:
    code, out, err = invoke("model", "export", "gpt-5")
    assert (code, out) == (2, "")
    assert err == "lmc: model: got 'gpt-5'; valid: smollm2, gemma3-270m, qwen2.5-coder-0.5b\n"


def test_the_installed_command() -> None:
    lmc_command = Path(sys.executable).parent / "lmc"
    done = subprocess.run([lmc_command, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{lmc.__version__}\n"
