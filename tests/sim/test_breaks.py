"""Where prompts part: found where generators put it, and costing what the truth says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmc.model.gpus import gpu_times
from lmc.model.shape import shape
from lmc.sim.breaks import GRAIN, Break, breaks
from lmc.sim.synthetic import GENERATORS, Truth
from lmc.sim.trace import Request
from tests.cli.shell import answer, invoke


def of(name: str, **fields: Any) -> tuple[list[Break], Truth]:
    truth = Truth()
    requests = list(truth.watch(GENERATORS.build({"name": name, **fields}).requests()))
    return breaks(requests), truth


@pytest.mark.parametrize("name", ["clock", "rag", "relay", "skills", "tools"])
def test_places_cost_what_is_known_to_have_moved(name: str) -> None:
    found, truth = of(name)
    lost = sum(b.tokens.total() for b in found)
    assert lost == pytest.approx(truth.tokens["moved"], rel=0.01)


def test_a_clock_is_one_place() -> None:
    found, truth = of("clock")
    first = found[0]
    assert (first.at, first.part) == (40, "clock")
    assert first.tokens["changed_prefix"] == pytest.approx(truth.tokens["moved"], rel=0.01)
    assert not first.tokens["other_order"]
    assert len({tuple(way) for way in first.examples}) == 3


def test_headers_part_at_the_start() -> None:
    found, _ = of("skills")
    assert (len(found), found[0].at, found[0].part, found[0].requests) == (1, 0, "header", 199)


def test_documents_in_another_order() -> None:
    found, _ = of("rag", spread=0.0)
    assert (found[0].at, found[0].part[:8]) == (200, "document")
    total = sum((b.tokens for b in found), start=type(found[0].tokens)())
    # Changed is what comes behind documents that are new themselves.
    assert total["other_order"] > 4 * total["changed_prefix"]


def test_close_digits_are_one_place() -> None:
    rng = np.random.default_rng(0)
    head, body = rng.integers(1000, 2000, 65), rng.integers(1000, 2000, 500)
    trace = []
    for i in range(20):
        tokens = np.concatenate([head, [i // 10, 10 + i], body]).astype(np.int32)
        trace.append(Request(float(i), "", len(tokens), 1, tokens=tokens))
    (place,) = breaks(trace)
    assert GRAIN * 2 <= place.at == 65
    assert (place.requests, place.tokens) == (19, {"changed_prefix": 19 * 500})
    assert place.before == head[-12:].tolist()


def test_seconds_are_those_of_the_tokens_behind() -> None:
    rng = np.random.default_rng(0)
    body = rng.integers(0, 999, 4000)
    trace = [
        Request(float(i), "", 4001, 1, tokens=np.concatenate([[1000 + i], body]).astype(np.int32))
        for i in range(2)
    ]
    times = gpu_times("h100", shape("llama-3.1-8b"))
    (place,) = breaks(trace, times=times)
    full = times.per_row_s * 4000 + times.per_pair_s * 4000 * 4001 / 2
    assert place.seconds == pytest.approx(full, rel=1e-3)


def test_seconds_of_text_far_behind_are_those_of_its_rows() -> None:
    rng = np.random.default_rng(0)
    known = rng.integers(0, 999, 500)
    new = rng.integers(2000, 3000, (2, 9500))
    trace = [
        Request(float(i), "", 10_000, 1, tokens=np.concatenate([n, known]).astype(np.int32))
        for i, n in enumerate(new)
    ]
    times = gpu_times("h100", shape("llama-3.1-8b"))
    (place,) = breaks(trace, times=times)
    pairs = sum(range(9501, 10_001))
    assert place.seconds == pytest.approx(times.per_row_s * 500 + times.per_pair_s * pairs)


@pytest.mark.parametrize("head", range(24, 40))
def test_a_clock_of_several_tokens_is_one_place_wherever_it_stands(head: int) -> None:
    rng = np.random.default_rng(0)
    front, body = rng.integers(1000, 2000, head), rng.integers(1000, 2000, 500)
    trace = []
    for i in range(60):  # hours, a colon, minutes, a colon, seconds
        clock = [1, 10 + i // 20, 2, 30 + i % 20, 2, 60 + i]
        tokens = np.concatenate([front, clock, body]).astype(np.int32)
        trace.append(Request(float(i), "", len(tokens), 1, tokens=tokens))
    first, *others = breaks(trace)
    assert first.tokens.total() > 20 * sum(b.tokens.total() for b in others)


def test_a_trace_of_empty_prompts(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "tokens": []}\n')
    assert invoke("lint", trace)[0] == 0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="token ids alone"):
        breaks([Request(0.0, "", 3, 1)])
    with pytest.raises(ValueError, match="window 0"):
        breaks([], window=0)


def test_the_command(tmp_path: Path) -> None:
    trace = tmp_path / "clock.jsonl"
    assert invoke("trace", "make", "clock:count=40", "--out", trace)[0] == 0
    code, out, err = invoke("lint", trace, "--profile", "8xh100", "--top", 1)
    assert (code, err) == (0, "")
    assert "prompt tokens had been in earlier prompts" in out
    assert "clock" in out and "changed_prefix: a prefix cache" in out and "\n1  behind '" in out
    said = answer("lint", trace, "--profile", "8xh100")
    assert said["breaks"][0]["gpu_seconds"] == pytest.approx(8 * said["breaks"][0]["seconds"])
    assert 0 < said["again"] < 1 and said["places"] == len(said["breaks"])


def test_names_of_a_file_are_no_terminal_codes(tmp_path: Path) -> None:
    trace = tmp_path / "bad.jsonl"
    body = list(range(200))
    rows = [
        {"timestamp": i, "tokens": [1000 + i, *body], "segments": [["[red]\x1b[2J", 0, 201]]}
        for i in range(3)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = invoke("lint", trace)
    assert code == 0, err
    assert "\x1b[2J" not in out and "[red]" in out
