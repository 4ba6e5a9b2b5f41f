"""`lmc model check`: what it says of a model, and that docs/models.md says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from lmc.cli.app import app
from lmc.connectors.hf.check import FAMILIES, check, families

DOCS = Path(__file__).parents[3] / "docs" / "models.md"


def test_the_table_of_families_is_what_the_command_prints() -> None:
    """`lmc model check --families` makes it; the page has nothing behind it."""
    made = families()
    assert DOCS.read_text().endswith("\n\n" + made)
    assert len(FAMILIES) >= 20 and made.count("\n") == len(FAMILIES) + 2


def test_a_model(smollm2_dir: Path) -> None:
    said = CliRunner().invoke(app, ["model", "check", str(smollm2_dir), "--dtype", "bfloat16"])
    assert said.exit_code == 0
    assert "30 full" in said.stdout and "23,040 bytes a token" in said.stdout
    assert "its layers run one by one, and its keys move" in said.stdout


def test_a_config_alone(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma3_text", num_hidden_layers=6).save_pretrained(tmp_path)
    said = CliRunner().invoke(app, ["model", "check", str(tmp_path), "--config-only"])
    assert said.exit_code == 0
    assert "5 sliding (window 4,096), 1 full" in said.stdout
    assert "the same text in front: reused" in said.stdout
    assert "text anywhere: reused" in said.stdout


def test_a_state_is_reused_where_it_is_kept(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen3_next", num_hidden_layers=4).save_pretrained(tmp_path)
    said = CliRunner().invoke(app, ["model", "check", str(tmp_path), "--config-only"])
    assert said.exit_code == 0
    assert "in front: reused from where a state is kept" in said.stdout
    assert "text anywhere: no, layers that keep a state in place of keys: 3 linear" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["model", "check"], "got none"), (["model", "check", "/no/where", "--config-only"], "/no/w")],
)
def test_what_is_no_model(arguments: list[str], message: str) -> None:
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 2 and message in said.stderr


def test_a_dtype_that_is_none() -> None:
    with pytest.raises(ValueError, match="got 'int3'"):
        check(AutoConfig.for_model("llama"), "int3")
