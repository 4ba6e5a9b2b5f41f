"""Traces written, made and told of by commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lmc.cli.trace import trace_app
from lmc.sim.readers import read
from lmc.sim.synthetic.questions import Rag
from lmc.sim.trace import Request
from lmc.sim.writing import save
from tests.sim.made import SMALL, facts, small


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("name", SMALL)
def test_save_and_read(name: str, suffix: str, tmp_path: Path) -> None:
    requests = small(name)
    path = tmp_path / f"trace.jsonl{suffix}"
    assert save(requests, path) == len(requests)
    reading = read(path, strict=True)
    assert facts(list(reading)) == facts(requests)
    assert reading.format == "tokens"
    packed = not path.read_bytes().startswith(b"{")
    assert packed == bool(suffix)
    assert list(tmp_path.iterdir()) == [path]


def test_save_writes_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("old")
    lengths_only = Request(0.0, "", 3, 1)
    with pytest.raises(ValueError, match="request 21 has no token ids"):
        save([*small("rag"), lengths_only], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_trace_make_and_info(tmp_path: Path) -> None:
    run = CliRunner().invoke
    path = tmp_path / "t.jsonl.zst"
    made = run(trace_app, ["make", "rag:count=30,documents=9,reorder=false", "--out", str(path)])
    assert made.exit_code == 0, made.output
    assert "30 requests of rag" in made.output
    assert "as it was made: prefix " in made.output
    rag = list(Rag(count=30, documents=9, reorder=False).requests())
    assert facts(list(read(path))) == facts(rag)

    answer = json.loads(run(trace_app, ["info", str(path), "--json"]).stdout)
    lengths = [r.input_tokens for r in rag]
    assert answer["format"] == "tokens"
    assert (answer["requests"], answer["sessions"], answer["bad_count"]) == (30, 30, 0)
    assert answer["duration_s"] == rag[-1].timestamp - rag[0].timestamp
    assert answer["input_tokens"]["total"] == sum(lengths)
    assert answer["input_tokens"]["max"] == max(lengths)
    assert answer["input_tokens"]["p50"] == np.percentile(lengths, 50)
    assert "reuse of text" in answer["asks"]
    table = run(trace_app, ["info", str(path)]).output
    assert f"{sum(lengths):,}" in table and "reuse of text" in table


def test_trace_info_of_blocks_and_lengths(tmp_path: Path) -> None:
    run = CliRunner().invoke
    blocks, lengths = tmp_path / "b.jsonl", tmp_path / "l.csv"
    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
    blocks.write_text(f"{json.dumps(row)}\n[red]\n{json.dumps(row)}\n")
    answer = json.loads(run(trace_app, ["info", str(blocks), "--json"]).stdout)
    assert (answer["asks"], answer["unique_blocks"]) == ("prefix hit rates", 2)
    assert (answer["sessions"], answer["bad_count"], answer["bad"][0]["line"]) == (None, 1, 2)
    assert "b.jsonl:2" in run(trace_app, ["info", str(blocks)]).output

    lengths.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,7,1\n")
    answer = json.loads(run(trace_app, ["info", str(lengths), "--json"]).stdout)
    assert (answer["asks"], answer["unique_blocks"]) == ("lengths and times alone", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make", "rag:count=3,documents", "--out", "t"], "want field=value"),
        (["make", "rag:sed=1", "--out", "t"], "unknown field sed"),
        (["make", "nope", "--out", "t"], "unknown generator"),
        (["info", "t"], "no such trace"),
        (["info", "bad.jsonl", "--format", "mooncake", "--strict"], "bad.jsonl:1: "),
    ],
)
def test_trace_says_what_is_wrong_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{\n")
    result = CliRunner().invoke(trace_app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "t").exists()
