"""`lmc run` on a Hugging Face model: real runs of a few short prompts, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lmc.cli.app import app
from lmc.cli.tables import comparisons, hf_quality
from lmc.experiment.hf.config import HFExperiment
from lmc.experiment.run import load as load_config
from lmc.results.rows import read_rows

SETTINGS: dict[str, Any] = {
    "connector": "hf",
    "model": "smollm2",
    "threads": 1,
    "answer_tokens": 4,
    "workload": {
        "name": "pydoc",
        "limit": 2,
        "chunks": 2,
        "chunk_tokens": 56,
        "answer_tokens": 4,
    },
    "arms": {
        "full_prefill_split": {"split": True},
        "full_reuse": {"blend": {"name": "full_reuse"}},
        "full_recompute": {"blend": {"name": "full_recompute"}},
        "lmc@0.30": {"blend": {"name": "lmc", "compute": 0.3}},
        "anchored": {"blend": {"name": "full_reuse"}, "context": "anchored"},
    },
    "compare": [["full_recompute", "lmc@0.30"]],
}


def experiment(folder: Path, **changes: Any) -> Path:
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    return file


def run(file: Path, out: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["run", str(file), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.heavy
def test_rows_table_and_figure_and_goes_on_where_it_stopped(
    tmp_path: Path, smollm2_dir: Path
) -> None:
    file, out = experiment(tmp_path), tmp_path / "out"
    run(file, out, "--set", "workload.limit=1")
    first = read_rows(out)
    assert len(first) == 5
    printed = run(file, out)
    rows = read_rows(out)
    assert rows[:5] == first  # measured once
    assert {(row["arm"], row["prompt_id"]) for row in rows} == {
        (arm, prompt) for arm in SETTINGS["arms"] for prompt in range(2)
    }
    by_arm = {row["arm"]: row for row in rows if row["prompt_id"] == 0}
    for exact in ("full_prefill_split", "full_recompute"):
        assert by_arm[exact]["kl_mean"] < 1e-9
        assert by_arm[exact]["top1_agreement"] == 1
        assert max(by_arm[exact]["attention_error"]) < 1e-4
        assert by_arm[exact]["delta_nll"] == pytest.approx(0, abs=1e-5)
    assert max(by_arm["full_recompute"]["v_deviation"]) < 1e-4
    reuse, ours = by_arm["full_reuse"], by_arm["lmc@0.30"]
    assert reuse["kl_mean"] > 1e-3
    assert reuse["compute_fraction"] == pytest.approx(32 / reuse["prompt_tokens"])
    assert sum(reuse["kinds"].values()) == reuse["prompt_tokens"] == 40 + 2 * 56 + 32
    assert reuse["compute_fraction"] < ours["compute_fraction"] <= 0.3
    assert len(reuse["v_deviation"]) == len(reuse["attention_error"]) == 30
    # The first chunk behind the same system prompt is exact when it was encoded there.
    assert by_arm["anchored"]["kinds"]["exact"] == 40 + 56
    assert "recovery of full_recompute - lmc@0.30: +" in printed
    assert (out / "pareto.png").stat().st_size > 10_000


def test_table_and_comparisons_from_rows() -> None:
    arms = {"full_reuse": {"blend": {}}, "a": {"blend": {}}, "b": {"blend": {}}}
    rows = [
        {
            "arm": arm, "prompt_id": prompt, "kl_mean": kl * (1 + prompt), "compute_fraction": 0.1,
            "flops_fraction": 0.2, "top1_agreement": 1.0, "top5_overlap": 1.0, "delta_nll": 0.0,
            "config": {"arms": arms},
        }
        for prompt in range(4)
        for arm, kl in (("full_reuse", 0.4), ("a", 0.1), ("b", 0.2))
    ]  # fmt: skip
    shown = hf_quality(rows)
    assert list(shown.columns[-1].cells) == [
        "0.00 [0.00, 0.00]",
        "0.75 [0.75, 0.75]",
        "0.50 [0.50, 0.50]",
    ]
    assert comparisons(rows, [("a", "b"), ("a", "missing")]) == [
        "recovery of a - b: +0.25 [+0.25, +0.25]"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"epic": {"blend": {"name": "epic"}}}}, "recovery is that of `full_reuse"),
        ({"arms": SETTINGS["arms"] | {"x": {}}}, "either `blend: {name: ...}` or `split: true`"),
        ({"arms": SETTINGS["arms"] | {"x": {"blend": {"name": "nope"}}}}, "'nope'.*cacheblend"),
        ({"workload": {"name": "nope"}}, "'nope'.*pydoc"),
        ({"workload": {"name": "pydoc", "chunk": 2}}, "unknown field chunk.*chunks"),
        ({"context": "alone"}, "context.*isolated.*anchored.*first_seen"),
        ({"compare": [["full_reuse", "x"]]}, "compare: got x; valid: anchored, full_prefill_split"),
        ({"engine": {}}, "unknown key engine; valid: connector, model"),
        (
            {"arms": {"full_reuse": SETTINGS["arms"]["full_reuse"]}
             | {f"a{i}": {"blend": {"name": "epic"}} for i in range(20)}},
            "at most 20",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(experiment(tmp_path, **changes))


def test_digest_names_what_is_measured_and_not_how_much() -> None:
    config = HFExperiment.model_validate(SETTINGS)
    assert config.model_copy(update={"threads": 2}).digest() == config.digest()
    more = {**config.workload, "limit": 9}
    assert config.model_copy(update={"workload": more}).digest() == config.digest()
    assert config.model_copy(update={"context": "anchored"}).digest() != config.digest()
