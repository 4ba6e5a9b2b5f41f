"""`lmc explain` as a shell sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lmc.cli.app import app
from lmc.model.times import prefill_work
from lmc.sim.explain import report_in
from tests.cli.shell import answer, invoke

MAP: list[list[Any]] = [
    [0, 40, "local", None, None],
    [40, 60, "exact", "disk", None],
    [60, 64, "recomputed", "host", "boundary"],
    [64, 90, "moved", "host", None],
    [90, 100, "new", None, "evicted"],
]
REPORT = {
    "prompt_tokens": 100,
    "kinds": {
        "local": 40,
        "local_blended": 0,
        "exact": 20,
        "moved": 26,
        "recomputed": 4,
        "new": 10,
    },
    "compute_fraction": 0.14,
    "flops_fraction": 0.16,
    "bytes": {"host": 30, "disk": 20},
    "strategy": "epic",
    "reason": None,
    "map": MAP,
    "seconds": {"plan": 0.001, "claim": 0.02},
}
RESPONSE = {"id": "chatcmpl-1", "choices": [], "kv_transfer_params": {"lmc": REPORT}}
TIMES = """
fixed_s: 0.5
per_row_s: 0.01
per_pair_s: 0.001
bytes_per_token: 1000
blend_s: 0.1
tiers:
  - {name: host, latency_s: 0.0, bytes_per_s: 1.0e+6}
  - {name: disk, latency_s: 0.25, bytes_per_s: 1.0e+5}
"""


def file(folder: Path, value: Any, name: str = "r.json") -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def trace(folder: Path) -> Path:
    rows = [
        {"lmc_trace": 1, "time": float(i), "request": f"id{i}", "output_tokens": 5} | REPORT
        for i in range(3)
    ]
    rows[1]["reason"] = "gain_below_minimum"
    return file(folder, "{torn\n" + "".join(json.dumps(row) + "\n" for row in rows), "t.jsonl")


@pytest.mark.parametrize("value", [RESPONSE, RESPONSE["kv_transfer_params"], REPORT])
def test_a_response_or_its_report(tmp_path: Path, value: Any) -> None:
    said = answer("explain", file(tmp_path, value))
    assert said["map"] == MAP and said["kinds"] == REPORT["kinds"]
    assert said["causes"] == {"boundary": 4, "evicted": 10}
    assert said["tiers"] == {"disk": 20, "host": 30}
    assert "estimated_seconds" not in said


def test_text_shows_kinds_tiers_causes_and_seconds(tmp_path: Path) -> None:
    code, out, err = invoke("explain", file(tmp_path, RESPONSE))
    assert (code, err) == (0, "")
    assert "100 tokens, 14.0% of rows computed, strategy epic" in out
    bar = out.splitlines()[1]
    assert len(bar) == 80 and set(bar) == set("LERMN") and bar.startswith("L" * 32 + "E" * 16)
    assert any("evicted" in line and "10.0%" in line for line in out.splitlines())
    assert "evicted: it was stored, and gave way to others\n" in out
    assert "0.0200  claim" in out and "Estimated" not in out


def test_standard_input() -> None:
    result = CliRunner().invoke(app, ["explain", "--json"], input=json.dumps(RESPONSE))
    assert result.exit_code == 0
    assert json.loads(result.stdout)["map"] == MAP


def test_what_was_saved_is_estimated_where_there_is_a_time_model(tmp_path: Path) -> None:
    times = file(tmp_path, TIMES, "times.yaml")
    said = answer("explain", file(tmp_path, REPORT), "--times", times)["estimated_seconds"]

    def seconds(rows: float, pairs: float) -> float:
        return 0.5 + 0.01 * rows + 0.001 * pairs

    full, engine = (seconds(*map(float, prefill_work(100, held))) for held in (0, 40))
    assert said["full"] == pytest.approx(full)
    assert said["engine"] == pytest.approx(engine)
    pairs = sum(range(61, 65)) + sum(range(91, 101))
    mine = seconds(14, pairs) + 0.1 + 30 * 1e-3 + 0.25 + 20 * 1e-2
    assert said["lmc"] == pytest.approx(mine)
    assert said["saved"] == pytest.approx(engine - mine)
    code, out, _ = invoke("explain", file(tmp_path, REPORT), "--times", times)
    assert code == 0 and "Estimated by the time model" in out and "saved by lmc" in out
    nowhere = TIMES.replace("name: disk", "name: tape")
    code, _, err = invoke("explain", file(tmp_path, REPORT), "--times",
                          file(tmp_path, nowhere, "x.yaml"))  # fmt: skip
    assert code == 2 and "'disk'; the model has: host, tape" in err


def test_rows_that_differ_by_layer_count_as_evenly_spread() -> None:
    runs = [[0, 50, "moved", "host", "chosen_by_layer"], [50, 60, "new", None, "never_seen"]]
    kinds = {"moved": 40, "recomputed": 10, "new": 10}
    changed = {"prompt_tokens": 60, "map": runs, "kinds": kinds}
    rows, pairs = report_in(REPORT | changed).computed()
    assert rows == pytest.approx(20)
    assert pairs == pytest.approx(0.2 * sum(range(1, 51)) + sum(range(51, 61)))


def test_a_recorded_trace(tmp_path: Path) -> None:
    path = trace(tmp_path)
    assert answer("explain", path)["request"] == "id2"
    assert answer("explain", path, "--request", 2)["request"] == "id1"
    assert answer("explain", tmp_path, "--request", "id0")["request"] == "id0"
    code, out, err = invoke("explain", path, "--request", "id1")
    assert code == 0 and "not blended: gain_below_minimum" in " ".join(out.split())
    assert "1 lines were left out, the first: t.jsonl:1: not JSON" in err
    code, _, err = invoke("explain", path, "--request", "7")
    assert code == 2 and "no request '7' among 3 recorded ones" in err


def test_it_is_drawn(tmp_path: Path) -> None:
    figure = tmp_path / "map.png"
    assert invoke("explain", file(tmp_path, REPORT), "--plot", figure)[0] == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_many_runs_are_listed_only_if_asked(tmp_path: Path) -> None:
    runs = [
        [i, i + 1, *(("new", None, "lost") if i % 2 else ("moved", "host", None))]
        for i in range(100)
    ]
    path = file(tmp_path, REPORT | {"map": runs})
    assert "100 runs: --runs lists them" in invoke("explain", path)[1]
    assert len(invoke("explain", path, "--runs")[1].splitlines()) > 100


def changed(place: int, field: int, value: Any) -> dict[str, Any]:
    runs = [list(run) for run in MAP]
    runs[place][field] = value
    return REPORT | {"map": runs}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "no report of lmc"),
        ({"id": "x"}, "no report of lmc"),
        ({"kv_transfer_params": None}, "no report of lmc"),
        ({k: v for k, v in REPORT.items() if k != "map"}, '"explain": true'),
        (REPORT | {"map": None}, '"explain": true'),
        (REPORT | {"prompt_tokens": 99}, "ends at 100, want 99"),
        (REPORT | {"prompt_tokens": 0}, "greater than or equal to 1"),
        (REPORT | {"map": [[0, 100, "new", None]]}, "map.0"),
        (REPORT | {"seconds": {"plan": float("inf")}}, "finite"),
        (REPORT | {"kinds": {"x": 1}}, "kinds: got 'x'; valid: local"),
        (changed(1, 0, 41), "behind 40, want runs without gaps"),
        (changed(1, 1, 40), "want runs without gaps"),
        (changed(1, 2, "found"), "kind 'found'; valid: local"),
        (changed(4, 4, "bored"), "cause 'bored'; valid: never_seen"),
    ],
)
def test_what_is_no_report(tmp_path: Path, value: Any, message: str) -> None:
    code, _, err = invoke("explain", file(tmp_path, value))
    assert code == 2 and message in err and len(err) < 3000


def test_wrong_arguments(tmp_path: Path) -> None:
    code, _, err = invoke("explain", tmp_path / "missing.json")
    assert code == 2 and "No such file" in err
    code, _, err = invoke("explain", file(tmp_path, REPORT), "--request", 1)
    assert code == 2 and "goes with a recorded trace" in err
    code, _, err = invoke("explain", file(tmp_path, "{}\n{}", "x.jsonl").parent)
    assert code == 2 and "no request among 0 recorded ones; 3 lines are none" in err


anything = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)


@given(st.sampled_from(sorted(REPORT)), anything)
def test_a_hostile_report_is_a_value_error(key: str, value: Any) -> None:
    try:
        report = report_in(REPORT | {key: value})
    except ValueError:
        return
    assert report.map[-1].end == report.prompt_tokens
    report.computed(), report.loaded()
