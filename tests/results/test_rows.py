"""rows.jsonl: appended whole, resumed, and never mixed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lmc.experiment.run import load as load_config
from lmc.experiment.vllm.config import VLLMExperiment
from lmc.results.rows import RowFile, key_of, read_rows


@pytest.fixture
def config(demo: Path) -> VLLMExperiment:
    return load_config(demo)


def _append(folder: Path, config: VLLMExperiment, **row: Any) -> None:
    with RowFile(folder, config) as file:
        file.append({"arm": "epic16", "prompt_id": 0, "repetition": 0, **row})


def test_rows_say_what_they_come_from(tmp_path: Path, config: VLLMExperiment) -> None:
    _append(tmp_path / "new" / "folder", config)
    (row,) = read_rows(tmp_path / "new" / "folder")
    assert key_of(row) == ("epic16", 0, 0)
    assert row["config_hash"] == config.digest()
    assert VLLMExperiment.model_validate(row["config"]) == config
    assert {"torch", "transformers"} <= row["packages"].keys()
    assert "git_commit" in row


def test_a_line_cut_short_is_dropped(tmp_path: Path, config: VLLMExperiment) -> None:
    _append(tmp_path, config)
    with (tmp_path / "rows.jsonl").open("a") as f:
        f.write('{"arm": "epi')
    assert len(read_rows(tmp_path)) == 1
    with RowFile(tmp_path, config) as file:
        assert len(file.rows) == 1
    _append(tmp_path, config, prompt_id=1)
    assert [row["prompt_id"] for row in read_rows(tmp_path / "rows.jsonl")] == [0, 1]


def test_another_configuration_needs_another_folder(
    tmp_path: Path, config: VLLMExperiment, demo: Path
) -> None:
    _append(tmp_path, config)
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds rows of another configuration"):
        RowFile(tmp_path, load_config(demo, ["workload.seed=1"]))
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    with RowFile(tmp_path, load_config(demo, ["repetitions=9"])) as file:
        assert len(file.rows) == 1


def test_one_writer_at_a_time(tmp_path: Path, config: VLLMExperiment) -> None:
    with (
        RowFile(tmp_path, config),
        pytest.raises(ValueError, match="another run is writing"),
    ):
        RowFile(tmp_path, config)


def test_a_folder_that_cannot_be_written(tmp_path: Path, config: VLLMExperiment) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out: cannot write"):
        RowFile(tmp_path / "file", config)
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="out: cannot write"):
            RowFile(tmp_path / "closed", config)


def test_no_rows_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lmc run EXPERIMENT --out FOLDER"):
        read_rows(tmp_path)
