"""The set-up: the pinned list fits pyproject.toml, and `make setup` fails loudly."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TOML = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = TOML["project"]
PINS = (ROOT / "constraints-cpu.txt").read_text().split()


def pinned() -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in (p.split("==") for p in PINS)}


def test_every_package_is_pinned_once() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in PINS)
    assert len(pinned()) == len(PINS)


def test_pins_satisfy_pyproject() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(r for e in extras if e != "cuda" for r in extras[e])]
    wanted += TOML["dependency-groups"]["cpu"]
    for requirement in map(Requirement, wanted):
        if requirement.name == PROJECT["name"]:  # an extra of ours inside another
            continue
        version = pinned()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, pinned {version}"


def test_nothing_that_breaks_transformers_is_pinned() -> None:
    # Their PyPI builds fail to import beside the CPU torch, and transformers imports them.
    assert not {"torchvision", "torchaudio", "torchcodec"} & pinned().keys()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what `make setup` reads and no environment."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "constraints-cpu.txt").write_text("no-such-package==1.0\n")
    return tmp_path


def make(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    environment.pop("MAKEFLAGS", None)  # of the `make test` that may be running us
    environment.pop("MAKELEVEL", None)
    return subprocess.run(
        ["make", *args], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_an_old_python_is_refused_by_name(checkout: Path) -> None:
    old = checkout / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 || exit 1\n')
    old.chmod(0o755)
    done = make(checkout, "setup", f"PYTHON={old}")
    assert done.returncode != 0
    assert "needs Python 3.11 or 3.12" in done.stderr
    assert "is Python 3.9.1" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_failed_install_is_loud_and_done_again(checkout: Path) -> None:
    for _ in range(2):
        done = make(checkout, "setup")
        assert done.returncode != 0
        assert "setup: packages of constraints-cpu.txt" in done.stdout
        assert "no-such-package" in done.stderr
        assert not (checkout / ".venv/.ready").exists()


def test_a_finished_setup_is_not_repeated(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv/.ready").touch()
    done = make(checkout, "setup")
    assert done.returncode == 0
    assert "setup:" not in done.stdout


def test_ci_is_make_test() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make test"]


def test_the_tests_of_a_file_share_a_process(request: pytest.FixtureRequest) -> None:
    """Else each process starts the engines of each file: pytest-xdist reads it off the id."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("one process, or no --dist loadgroup")
    assert request.node.nodeid.endswith("@tests/test_setup.py")
