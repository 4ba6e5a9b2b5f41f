"""A run: what is asked of the engines, resuming, refusing, and one small run on vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmc.experiment.run import run
from lmc.experiment.vllm.engines import Request
from lmc.results.rows import key_of, read_rows

Asked = list[tuple[str, Request | str]]
SMALL = ["workload.limit=2", "repetitions=1"]


def _timed(asked: Asked) -> list[Request]:
    """Requests that were asked for one token and store nothing, the warm-up left out."""
    return [
        r
        for _, r in asked
        if isinstance(r, Request) and r.max_tokens == 1 and not (r.lmc or {}).get("save")
    ]


def test_every_arm_prompt_and_repetition_once(tmp_path: Path, demo: Path, pretended: Asked) -> None:
    run(demo, tmp_path, ["workload.limit=2", "repetitions=2"])
    keys = [key_of(row) for row in read_rows(tmp_path)]
    assert len(keys) == len(set(keys)) == 8 * 2 * 2
    for repetition in (0, 1):
        for prompt_id in (0, 1):  # arms alternate within a prompt
            start = 8 * (2 * repetition + prompt_id)
            assert {key[1:] for key in keys[start : start + 8]} == {(prompt_id, repetition)}
    assert keys[:8] != [(arm, 0, 0) for arm, _, _ in keys[8:16]]


def test_each_arm_finds_the_cache_it_should(tmp_path: Path, demo: Path, pretended: Asked) -> None:
    run(demo, tmp_path, [*SMALL, "quality.tokens=0"])
    timed = _timed(pretended)
    full = [r.salt for r in timed if r.salt.startswith("full_prefill/")]
    assert len(full) == len(set(full)) == 2
    for name, request in pretended:
        if name == "lmc" and isinstance(request, Request):
            assert request.lmc is not None
            measured = len(request.token_ids) == 1616
            assert request.lmc["save"] is not measured
            assert request.reset is measured
            assert ("chunks" in request.lmc) == (request.salt != "epic16_cdc")
    # 40 rows were reported, so 1568 tokens, 49 blocks of 32, leave as many for vLLM.
    warmed = [len(r.token_ids) for r in timed if r.salt.startswith("prefix_equal_rows/")]
    assert warmed == [1568, 1616] * 2
    shared = [len(r.token_ids) for r in timed if r.salt == "prefix_caching/0"]
    assert shared == [*[304] * 8, 1616, *[304] * 8, 1616, 1616]


@pytest.mark.parametrize("workload", ["chain:limit=2", "pydoc:prompts=2,chunks=2,chunk_tokens=64"])
def test_any_workload_is_run(
    tmp_path: Path, demo: Path, pretended: Asked, workload: str, smollm2_dir: Path
) -> None:
    rows = run(demo, tmp_path, [f"workload='{workload}'", "quality.tokens=0"])
    assert len(rows) == 8 * 2
    assert {row["workload"] for row in rows} == {workload.partition(":")[0]}
    stored = [r for name, r in pretended if isinstance(r, Request) and (r.lmc or {}).get("save")]
    chunks = 6 if workload.startswith("chain") else 4
    assert len({tuple(r.token_ids) for r in stored}) == chunks


def test_a_stopped_run_goes_on(tmp_path: Path, demo: Path, pretended: Asked) -> None:
    run(demo, tmp_path, SMALL)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:11]) + '{"arm')
    pretended.clear()
    run(demo, tmp_path, SMALL)
    rows = read_rows(tmp_path)
    assert list(map(key_of, rows)) == [key_of(json.loads(line)) for line in lines]
    pretended.clear()
    run(demo, tmp_path, SMALL)
    assert pretended == []
    run(demo, tmp_path, [*SMALL, "repetitions=2"])
    assert len(read_rows(tmp_path)) == 32


@pytest.mark.parametrize(
    "override",
    [
        "workload.question_tokens=5",
        "arms.epic16.blend.name=x",
        "model=/nowhere",
        "engine.x=1",
        "lmc.memory_bytes=1000000",
        "engine.max_model_len=1608",
    ],
)
def test_bad_input_changes_nothing(
    tmp_path: Path, demo: Path, pretended: Asked, override: str
) -> None:
    with pytest.raises(ValueError, match=r"got|less than one chunk of 256 tokens"):
        run(demo, tmp_path / "out", [override])
    assert pretended == []
    assert not (tmp_path / "out").exists()


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_a_small_run_on_vllm(tmp_path: Path, demo: Path) -> None:
    sizes = ["workload.limit=2", "workload.document_tokens=64", "repetitions=1", "quality.tokens=4"]
    run(demo, tmp_path, sizes)
    rows = read_rows(tmp_path)
    assert len(rows) == 16
    T = 48 + 6 * 64 + 32
    for row in rows:
        assert row["prompt_tokens"] == T == sum(row["kinds"].values()), row["arm"]
        assert 0 < row["compute_fraction"] <= 1
        assert 0 < row["flops_fraction"] <= 1
        assert row["ttft_s"] > 0
        assert row["cpu_s"] > 0
        assert row["reason"] is None
        assert row["kl_last"] >= 0

    def mean(arm: str, column: str) -> Any:
        values = [row[column] for row in rows if row["arm"] == arm]
        return sum(values) / len(values)

    def found(arm: str) -> Any:
        return 1 - sum(row["kinds"]["new"] / T for row in rows if row["arm"] == arm) / 2

    assert mean("full_prefill", "compute_fraction") == 1
    for arm in ("prefix_caching", "prefix_equal_rows", "full_recompute"):
        assert mean(arm, "kl_mean") < 1e-7, arm
        assert mean(arm, "greedy_agreement") == 1, arm
        assert mean(arm, "logprob_error") < 1e-4, arm
    assert found("epic16") == found("full_reuse") >= 0.9
    assert found("epic16_cdc") > found("prefix_caching")  # moved, where nobody says where it is
    assert mean("full_reuse", "compute_fraction") < mean("epic16", "compute_fraction") < 0.5
    equal = mean("prefix_equal_rows", "compute_fraction") - mean("epic16", "compute_fraction")
    assert abs(equal) * T <= 16  # half a block
