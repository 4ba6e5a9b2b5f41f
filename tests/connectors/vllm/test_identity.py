from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from transformers import LlamaConfig

from lmc.connectors.vllm.config import TESTED_VLLM
from lmc.connectors.vllm.identity import check_vllm_version, namespace_of, rope_of


def test_installed_vllm_is_a_tested_one() -> None:
    check_vllm_version()
    assert vllm.__version__.split("+")[0] in TESTED_VLLM


def test_untested_vllm_is_refused_naming_both() -> None:
    with pytest.raises(RuntimeError, match=r"vLLM 0\.33\.1 is not tested.*tested: 0\.32\.0"):
        check_vllm_version("0.33.1")
    check_vllm_version("0.32.0+cpu")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with two revisions of one model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    repo = tmp_path / "models--org--m"
    (repo / "refs").mkdir(parents=True)
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        folder = repo / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(commit.encode())
        (folder / "config.json").write_text("{}")
        (repo / "refs" / revision).write_text(commit)
    return tmp_path


def namespace(hub: Path, **changed: Any) -> bytes:
    """Of an engine on a model of `hub`, but for what is changed of its settings."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, **(
        {"rope_parameters": changed["rope"]} if "rope" in changed else {}
    ))  # fmt: skip
    model = SimpleNamespace(
        model="org/m",
        revision=changed.get("revision"),
        quantization=changed.get("quantization"),
        quantization_config=changed.get("quantization_config"),
        max_model_len=changed.get("max_model_len", 1024),
        dtype=changed.get("dtype", torch.bfloat16),
        hf_text_config=config,
    )
    load = SimpleNamespace(
        load_format=changed.get("load_format", "auto"),
        download_dir=str(hub),
    )
    spec = SimpleNamespace(dtype=changed.get("kv", torch.bfloat16), num_kv_heads=2, head_size=16)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["0", "1"])
    vllm_config = SimpleNamespace(model_config=model, load_config=load)
    groups = SimpleNamespace(kv_cache_groups=[group])
    return namespace_of(vllm_config, groups, rope_of(vllm_config))


def test_engines_whose_kv_differs_share_nothing(hub: Path) -> None:
    same = namespace(hub)
    assert namespace(hub, revision="main") == same
    assert namespace(hub, revision="a" * 40, max_model_len=2048) == same
    others: list[dict[str, Any]] = [
        {"revision": "v2"},
        {"quantization": "fp8"},
        {"quantization": "fp8", "quantization_config": {"linear": "int8"}},
        {"dtype": torch.float32},
        {"kv": torch.float16},
        {"dtype": torch.float32, "kv": torch.float32},
        {"rope": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ]
    assert len({same, *(namespace(hub, **other) for other in others)}) == len(others) + 1


def test_angles_that_depend_on_the_length(hub: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    lengths = [namespace(hub, rope=rope, max_model_len=n) for n in (1024, 1024, 4096)]
    assert lengths[0] == lengths[1] != lengths[2]


@pytest.mark.parametrize(
    "unknown", [{"load_format": "dummy"}, {"load_format": "tensorizer"}, {"revision": "nowhere"}]
)
def test_weights_that_nobody_can_read_are_shared_with_nobody(
    hub: Path, unknown: dict[str, Any]
) -> None:
    assert namespace(hub, **unknown) != namespace(hub, **unknown)
