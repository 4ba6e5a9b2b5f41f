"""A real calibration: what is measured, what is kept when it stops, and the command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner

from lmc.blend import STRATEGIES
from lmc.cli.calibrate import calibrate as command
from lmc.connectors.hf.model import HFModel
from lmc.experiment.calibrate import BASE, GRID, calibrate, grid
from lmc.experiment.hf.measure import measure, prepare
from lmc.model.weights import weights_digest
from lmc.quality.profile import find_profile, load_profile
from lmc.workloads.sample import Sample

EPIC = {"name": "epic", "link_tokens": 8}
ALL = {"name": "cacheblend", "ratio": 1.0}


def sample(seed: int) -> Sample:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 512, n).tolist() for n in (6, 24, 20, 5, 3)]
    return Sample(ids[0], ids[1:3], ids[3], ids[4])


def no_step(phase: str, detail: str = "", advance: int = 0) -> None:
    pass


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> HFModel:
    from transformers import AutoModelForCausalLM

    return HFModel(AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval())


def test_what_is_measured_is_what_evaluation_measures(model: HFModel) -> None:
    samples = [sample(0), sample(1)]
    steps: list[tuple[str, str, int]] = []

    def step(phase: str, detail: str = "", advance: int = 0) -> None:
        steps.append((phase, detail, advance))

    after = list(calibrate(model, samples, [BASE, EPIC, ALL], step, answer_tokens=4))
    assert sum(advance for *_, advance in steps) == 6
    assert ("prompt 2", "epic link_tokens=8", 1) in steps
    assert [[row.prompts for row in rows] for rows in after] == [[1] * 3, [2] * 3]

    kl: dict[str, list[float]] = {"full_reuse": [], "epic": []}
    compute = []
    for s in samples:
        case = prepare(model, s, 4)
        for name, config in (("full_reuse", BASE), ("epic", EPIC)):
            row = measure(case, STRATEGIES.build(config), "isolated")
            kl[name].append(row["kl_mean"])
        compute.append(row["compute_fraction"])
    reuse, epic, everything = after[-1]
    assert (reuse.recovery, reuse.low, reuse.high) == (0, 0, 0)
    assert reuse.kl == pytest.approx(np.mean(kl["full_reuse"]))
    assert epic.blend == EPIC
    assert epic.kl == pytest.approx(np.mean(kl["epic"]))
    assert epic.recovery == pytest.approx(1 - sum(kl["epic"]) / sum(kl["full_reuse"]))
    assert epic.compute_fraction == pytest.approx(np.mean(compute))
    assert reuse.kl > 1e-3  # else recovery would be of nothing
    assert everything.recovery == pytest.approx(1, abs=1e-3)


def test_anchored_chunks_are_other_numbers(model: HFModel) -> None:
    def kl(context: Any) -> float:
        (rows,) = calibrate(model, [sample(0)], [BASE], no_step, context, answer_tokens=4)
        return rows[0].kl

    assert kl("anchored") != pytest.approx(kl("isolated"))


@pytest.mark.parametrize(
    ("samples", "configs", "words"),
    [
        ([], [BASE], "samples: got none"),
        ([sample(0)], [EPIC], "want {'name': 'full_reuse'} first"),
        ([sample(0)], [BASE, {"name": "full_recompute"}], "loses no quality"),
        ([sample(0)], [BASE, {"name": "auto"}], "stands for 'lmc'; measure that"),
        ([Sample([], [sample(0).chunks[0]], [1], [])], [BASE], "nothing of it is moved"),
    ],
)
def test_what_cannot_be_measured(model: HFModel, samples: Any, configs: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are the test
        list(calibrate(model, samples, configs, no_step, answer_tokens=2))
    assert words in str(error.value)


def test_the_grid_begins_with_full_reuse_and_has_nothing_twice() -> None:
    everything = grid()
    assert everything[0] == BASE
    assert len(everything) == sum(map(len, GRID.values()))
    assert grid(["epic", EPIC]) == [BASE, *({"name": "epic", **f} for f in GRID["epic"]), EPIC]
    assert grid(["full_reuse", "random"]) == [
        BASE, {"name": "full_reuse", "rotate": False}, {"name": "random"},
    ]  # fmt: skip
    assert grid([{"name": "cacheblend"}, {"name": "cacheblend", "ratio": 0.15}])[1:] == [
        {"name": "cacheblend"}
    ]
    for config in everything:
        STRATEGIES.build(config)
    with pytest.raises(ValueError, match="'epik'"):
        grid(["epik"])


# -- the command -----------------------------------------------------------------------------

SHORT = "{name: pydoc, chunks: 2, chunk_tokens: 64, answer_tokens: 8}"


def invoke(*arguments: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lmc"


@pytest.mark.heavy
def test_a_calibrated_model_is_found_again(smollm2_dir: Path, cache: Path) -> None:
    code, out, err = invoke(
        str(smollm2_dir), "--workload", SHORT, "--prompts", "1", "--context", "anchored",
        "--blend", "{name: epic, link_tokens: 4}",
    )  # fmt: skip
    assert code == 0, err
    (file,) = (cache / "profiles").iterdir()  # and no partial one
    assert f"profile: {file}" in out
    assert "link_tokens 4" in out
    profile = load_profile(file)
    assert profile.workloads == [yaml.safe_load(SHORT)]
    assert (profile.prompts, profile.context, profile.dtype) == (1, "anchored", "float32")
    assert [row.blend["name"] for row in profile.rows] == ["full_reuse", "epic"]

    from transformers import AutoConfig

    from lmc.model.rope import rotations_of

    rope = rotations_of(AutoConfig.from_pretrained(smollm2_dir)).fingerprint
    assert find_profile(weights_digest(smollm2_dir), "float32", rope, "anchored") == profile


@pytest.mark.heavy
def test_a_stop_loses_one_prompt_and_leaves_the_last_profile(
    smollm2_dir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "profile.yaml"
    out.write_text("an earlier one")
    prepared = []

    def stopped_at_the_second(*arguments: Any) -> Any:
        prepared.append(arguments)
        if len(prepared) == 2:
            raise ValueError("stopped")
        return prepare(*arguments)

    monkeypatch.setattr("lmc.experiment.calibrate.prepare", stopped_at_the_second)
    code, _, err = invoke(
        str(smollm2_dir), "--workload", SHORT, "--prompts", "2", "--out", str(out),
        "--blend", "full_reuse",
    )  # fmt: skip
    assert code == 2
    assert err.endswith("lmc: stopped\n")
    assert out.read_text() == "an earlier one"
    assert load_profile(f"{out}.partial").prompts == 1
    assert sorted(os.listdir(out.parent)) == ["lmc", "profile.yaml", "profile.yaml.partial"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "int8"], "--dtype: got 'int8'; valid: float32, float16, bfloat16"),
        (["--context", "alone"], "--context: got 'alone'; valid: isolated, anchored, first_seen"),
        (["--workload", "prose"], "unknown workload: got 'prose'"),
        (["--workload", "{path: x}"], "workload: got '{path: x}', want {name:"),
        (["--workload", "{"], "which is no YAML"),
        (["--blend", "epik"], "unknown blend strategy: got 'epik'"),
        (["--prompts", "65"], "--prompts: got 65, but Pydoc(prompts=64"),
    ],
)
def test_wrong_arguments(smollm2_dir: Path, arguments: list[str], words: str) -> None:
    code, out, err = invoke(str(smollm2_dir), *arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_a_folder_without_weights(tmp_path: Path) -> None:
    code, _, err = invoke(str(tmp_path))
    assert code == 2
    assert "want a folder with weights" in err
