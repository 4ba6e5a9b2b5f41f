"""`lmc plan`: what it prints, draws and refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from lmc.cli.app import app

run = CliRunner().invoke


@pytest.fixture
def trace(tmp_path):
    """Documents in ever other orders, behind one system prompt."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, 1000, 600).tolist() for _ in range(8)]
    system = random.integers(0, 1000, 64).tolist()
    path = tmp_path / "rag.jsonl"
    with path.open("w") as file:
        for i in range(40):
            order = random.permutation(8)[:4]
            ids = [*system, *(t for d in order for t in documents[d]), i]
            file.write(json.dumps({"timestamp": i, "tokens": ids}) + "\n")
    return path


def test_one_command_says_memory_hits_and_what_moving_adds(trace, tmp_path):
    figure = tmp_path / "plan.png"
    done = run(app, ["plan", str(trace), "--target", "80%", "--plot", str(figure)])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("A prefix cache can find ")
    assert " points, " in lines[0] and " of it moved; for 80% of that it needs" in lines[0]
    assert "rag.jsonl: 40 requests" in done.stdout
    assert figure.stat().st_size > 10_000


def test_json_has_the_same_and_is_finite(trace):
    options = ["--policy", "sieve,belady", "--tiers", "64MiB+1GiB"]
    done = run(app, ["plan", str(trace), "--json", *options])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout, parse_constant=lambda x: pytest.fail(x))
    assert [row["share"] for row in found["targets"]] == [0.5, 0.8, 0.9, 0.95, 1.0]
    rates = [row["anywhere_rate"] for row in found["targets"]]
    assert rates == sorted(rates)
    best = found["targets"][-1]
    assert best["anywhere_rate"] > 0.6 > best["prefix_rate"]
    assert {p["policy"] for p in found["policies"]} == {"sieve", "belady"}
    served = sum(t["anywhere_rate"] for t in found["tiers"])
    assert 0 < served <= best["anywhere_rate"] + 1e-9


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_number_is_cut(trace, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    done = run(app, ["plan", str(trace), "--policy", "sieve", "--tiers", "64MiB+1GiB"])
    assert done.exit_code == 0, done.output
    assert "…" not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "0"], "target: got '0', want a share such as 80%"),
        (["--target", "180%"], "target: got '180%'"),
        (["--plot", "figure.doc"], "plot: got 'figure.doc', want a file that ends in .pdf"),
        (["--plot", "nowhere/x.png"], "there is no folder nowhere"),
        (["--tiers", "64parsec"], "64parsec"),
        (["--model", "llama-9"], "llama-9"),
    ],
)
def test_wrong_options_are_named_before_the_trace_is_read(trace, options, message):
    trace.write_text("no trace at all")
    done = run(app, ["plan", str(trace), *options])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output
