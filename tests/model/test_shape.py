"""Sizes read off model configs, against figures computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmc.model.shape import KNOWN, shape, shape_of


@pytest.mark.parametrize(
    ("model", "elements", "billion_weights"),
    [
        ("smollm2-135m", 2 * 30 * 3 * 64, 0.106),
        ("llama-3.1-8b", 2 * 32 * 8 * 128, 6.98),  # 8.03 with embeddings and output
        ("llama-3.1-70b", 2 * 80 * 8 * 128, 68.5),
        ("qwen2.5-7b", 2 * 28 * 4 * 128, 6.53),
        ("deepseek-v3", 61 * (512 + 64), 35.6),  # 37 active with embeddings and output
    ],
)
def test_published_models(model: str, elements: int, billion_weights: float) -> None:
    it = shape(model)
    assert it.bytes_per_token("fp8") == elements
    assert it.bytes_per_token() == 2 * elements
    assert it.cost.linear / 2e9 == pytest.approx(billion_weights, rel=0.01)


def test_attention_flops_count_query_heads_and_mla_unfolded() -> None:
    assert shape("llama-3.1-8b").cost.attention == 4 * 32 * 32 * 128
    assert shape("deepseek-v3").cost.attention == 2 * 61 * 128 * (128 + 64 + 128)


def test_heads_default_to_multi_head_attention() -> None:
    it = shape_of({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64})
    assert (it.G, it.D, it.dtype) == (4, 16, "float32")


def test_a_config_object_of_a_multimodal_model() -> None:
    config = SimpleNamespace(text_config=SimpleNamespace(**KNOWN["qwen3-8b"]))
    assert shape_of(config) == shape("qwen3-8b")


def test_a_folder_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["mistral-7b-v0.3"]))
    assert shape(str(tmp_path)) == shape(str(tmp_path / "config.json")) == shape("mistral-7b-v0.3")


@pytest.mark.parametrize("content", ["[]", "{", '{"num_hidden_layers": 0}', "{}"])
def test_what_is_no_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="model"):
        shape(str(tmp_path))


def test_unknown_model_and_dtype_name_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"'gpt-9'.*llama-3\.1-8b"):
        shape("gpt-9")
    with pytest.raises(ValueError, match=r"'int3'.*fp8"):
        shape("llama-3.1-8b").bytes_per_token("int3")
