"""What `lmc serve` gives to vLLM, and what it refuses before vLLM starts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="it is vLLM that serves")

from lmc.cli.serve import arguments_of, plain_command


def test_what_vllm_is_given(tmp_path: Path) -> None:
    config = tmp_path / "lmc.yaml"
    config.write_text("memory_bytes: 1048576\n")
    arguments = arguments_of("/m", config, ["--port", "1", "--dtype=float32"])
    assert arguments[0] == "/m" and arguments[-3:] == ["--port", "1", "--dtype=float32"]
    transfer = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"] == {"lmc": str(config)}
    assert transfer["kv_load_failure_policy"] == "recompute"
    assert shlex.split(plain_command(arguments))[-len(arguments) :] == arguments


def test_an_exported_model_goes_by_its_name_and_in_its_dtype(smollm2_dir: Path) -> None:
    arguments = arguments_of("smollm2", None, ["--dtype=bfloat16"])
    assert arguments[0] == str(smollm2_dir)
    assert arguments[-3:] == ["--served-model-name", "smollm2", "--dtype=bfloat16"]
    assert arguments_of("smollm2", None, [])[-2:] == ["--dtype", "float32"]


@pytest.mark.parametrize(
    "option",
    [
        ["--api-key", "secret"], ["--api_key=secret"], ["--api-key", "secret", "secret2"],
        ["--api-key=secret", "secret2"], ["--api-ke", "secret"], ["--hf-token", "secret"],
        ["--hf_tok=secret"], ["--ssl-keyfile-password", "secret"],
    ],
)  # fmt: skip
def test_a_key_is_not_printed(option: list[str]) -> None:
    printed = plain_command(arguments_of("/m", None, [*option, "--port", "1"]))
    assert "secret" not in printed and printed.endswith("... --port 1")


@pytest.mark.parametrize(
    "option",
    [
        "--kv-transfer-config",
        "--kv_transfer_config={}",
        "--worker-cls=x",
        "--kv-transfer-conf={}",
        "--worker-cl",
        "--model",
    ],
)
def test_what_is_set_here_is_not_set_twice(option: str) -> None:
    with pytest.raises(ValueError, match="which lmc serve sets itself"):
        arguments_of("/m", None, [option])


@pytest.mark.parametrize(
    "option", [["--ssl-keyfile", "key.pem"], ["--tokenizer", "/t"], ["--max-num-seqs=3", "--api"]]
)
def test_what_is_no_key_is_printed(option: list[str]) -> None:
    assert plain_command(arguments_of("/m", None, option)).endswith(" ".join(option))


def test_settings_that_are_wrong_are_told_before_anything_starts(tmp_path: Path) -> None:
    config = tmp_path / "lmc.yaml"
    config.write_text("memory_byte: 1\n")
    with pytest.raises(ValueError, match="memory_byte"):
        arguments_of("/m", config, [])
    with pytest.raises(ValueError, match="cannot be read"):
        arguments_of("/m", tmp_path / "none", [])
