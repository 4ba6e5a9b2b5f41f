"""What all commands print alike: no number cut, JSON that any program reads, help with examples."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from typer.main import get_command

from lmc.cli.app import app
from lmc.cli.output import print_json, size
from tests.cli.shell import answer, invoke


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "a_trace_with_a_name_that_is_rather_long.jsonl.gz"
    assert invoke("trace", "make", "agents:sessions=6", "--out", path)[0] == 0
    return path


def commands() -> Iterator[tuple[str, click.Command]]:
    def below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        for part, each in (inner or {}).items():
            yield from below(f"{name} {part}", each)

    return below("lmc", get_command(app))


HELP = {name: command.help or "" for name, command in commands()}


@pytest.mark.parametrize("name", HELP)
def test_help_has_an_example(name: str) -> None:
    assert f"For example: {name}" in HELP[name]


ANSWERS = [
    ("trace", "info"),
    ("reuse", "--scope", "trace"),
    ("sim", "--policy", "lru,s3fifo", "--capacity", "1MiB+1GiB,64GiB", "--times", "8xh100"),
    ("sim", "--metric", "store", "--capacity", "1GiB,inf", "--chunker", "cdc:64"),
    ("sim", "--capacity", "all", "--unit", "bytes"),
    ("sim", "--capacity", "all", "--metric", "store", "--chunker", "cdc:64"),
    ("lint", "--profile", "h100"),
    ("plan", "--policy", "sieve", "--tiers", "1GiB+64GiB", "--profile", "h100"),
]


@pytest.mark.parametrize("width", ["40", "80", "120"])
@pytest.mark.parametrize("command", ANSWERS, ids=" ".join)
def test_no_number_is_cut(
    trace: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], width: str
) -> None:
    wide = printed(command, trace, monkeypatch, "400")
    narrow = printed(command, trace, monkeypatch, width)
    assert "…" not in narrow
    assert narrow.split() == wide.split()  # titles wrap; nothing else differs


def printed(
    command: tuple[str, ...], trace: Path, monkeypatch: pytest.MonkeyPatch, width: str
) -> str:
    monkeypatch.setenv("COLUMNS", width)
    code, out, err = invoke(*on(trace, command))
    assert code == 0, err
    return out


def on(trace: Path, command: tuple[str, ...]) -> list[object]:
    """The command about a trace."""
    words = 2 if command[0] == "trace" else 1
    return [*command[:words], trace, *command[words:]]


@pytest.mark.parametrize("command", ANSWERS, ids=" ".join)
def test_bad_lines_are_told_beside_json(
    tmp_path: Path, trace: Path, command: tuple[str, ...]
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(gzip.decompress(trace.read_bytes()) + b"{\n")
    code, out, err = invoke(*on(broken, command), "--json")
    assert code == 0, err
    json.loads(out, parse_constant=lambda x: pytest.fail(x))
    assert "1 lines were left out" in err


def test_capacities_come_back_as_they_were_given(trace: Path) -> None:
    code, out, err = invoke("sim", trace, "--capacity", "1GiB,1GB,1TiB,0.5GiB+1TiB,inf")
    assert code == 0, err
    for given in ("1GiB ", "1GB ", "1TiB ", "0.5GiB+1TiB ", "inf "):
        assert f" {given}" in out
    rows = answer("sim", trace, "--capacity", "1GiB,1GB")
    assert [row["capacity"] for row in rows] == [1 << 30, 10**9]
    assert {row["unit"] for row in rows} == {"bytes"}


def test_json_is_finite(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1.5, math.inf, (math.nan,)], "b": {"c": -math.inf}})
    found = json.loads(capsys.readouterr().out, parse_constant=lambda x: pytest.fail(x))
    assert found == {"a": [1.5, None, [None]], "b": {"c": None}}


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (1 << 10, "1.0 KiB"), (1 << 60, "1,048,576 TiB")]
)
def test_sizes(n: int, text: str) -> None:
    assert size(n) == text


def test_who_reads_no_further_is_told_nothing(trace: Path) -> None:
    """`lmc sim … | head -1`"""
    code = "from lmc.cli.app import app; app()"
    command = [sys.executable, "-c", code, "sim", str(trace), "--capacity", "all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"lmc:" not in process.stderr.read()
