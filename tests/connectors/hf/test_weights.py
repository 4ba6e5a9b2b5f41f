"""Which weights a model in memory has: those of its files, or others, and never the wrong ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmc.connectors.hf.weights import identity_of
from lmc.model.weights import weights_digest


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def config_of(folder: Path) -> str:
    from transformers import AutoConfig

    return str(AutoConfig.from_pretrained(folder).get_text_config().to_json_string())


def as_in_the_files(model: Any, folder: Path) -> bool:
    return identity_of(model) == (config_of(folder), weights_digest(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_as_its_files_have_it(tiny_llama_dir: Path, dtype: torch.dtype) -> None:
    """In any dtype: what the KV's is, the namespace says apart."""
    assert as_in_the_files(loaded(tiny_llama_dir, dtype=dtype), tiny_llama_dir)


def test_tied_weights_and_several_files(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = loaded(tiny_llama_dir)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied", max_shard_size="400KB")
    assert len(list((tmp_path / "tied").glob("*.safetensors"))) > 1
    again = loaded(tmp_path / "tied")
    assert as_in_the_files(again, tmp_path / "tied")
    again.lm_head.weight = torch.nn.Parameter(again.lm_head.weight.detach().clone())
    assert not as_in_the_files(again, tmp_path / "tied")


def harmless(model: Any) -> None:
    model.config.use_cache = False
    model.config.pad_token_id = 3


def other_norm(model: Any) -> None:
    model.config.rms_norm_eps = 1e-3


def one_bit(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.weight.data[7, 7] *= 1 + 2**-20


def zero_and_its_negative(model: Any) -> None:
    weight = model.model.layers[0].input_layernorm.weight
    weight.data[0] = -0.0


def half_a_layer(model: Any) -> None:
    model.model.layers[1].mlp.half()


def norms_in_bfloat16(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.bfloat16()


def another_weight(model: Any) -> None:
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))


def a_view_of_a_known_one(model: Any) -> None:
    known = model.model.layers[0].self_attn.q_proj.weight
    model.register_buffer("extra", known.detach().view(-1)[:5])


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (harmless, True),
        (other_norm, False),
        (one_bit, False),
        (zero_and_its_negative, False),
        (half_a_layer, False),
        (norms_in_bfloat16, False),
        (another_weight, False),
        (a_view_of_a_known_one, False),
    ],
)
def test_a_model_that_was_changed(
    tiny_llama_dir: Path, change: Callable[[Any], None], same: bool
) -> None:
    model, before = loaded(tiny_llama_dir), loaded(tiny_llama_dir)
    change(model)
    assert as_in_the_files(model, tiny_llama_dir) is same
    assert (identity_of(model) == identity_of(before)) is same


def test_two_changed_models_are_told_apart(tiny_llama_dir: Path) -> None:
    one, other = loaded(tiny_llama_dir), loaded(tiny_llama_dir)
    one.lm_head.weight.data[0, 0] += 1
    other.lm_head.weight.data[0, 0] += 2
    assert identity_of(one) != identity_of(other)
    other.lm_head.weight.data[0, 0] -= 1
    assert identity_of(one) == identity_of(other)


def test_files_that_changed_since_or_are_gone(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, folder)
    model = loaded(folder)
    other = loaded(tiny_llama_dir)
    one_bit(other)
    other.save_pretrained(folder)
    assert not as_in_the_files(model, folder)
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    assert identity_of(model)[1] != weights_digest(folder)
    shutil.rmtree(folder)
    assert identity_of(model)[1] == identity_of(model)[1]


def test_a_config_that_the_folder_no_longer_has(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, folder)
    model = loaded(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert not as_in_the_files(model, folder)


def test_weights_that_are_not_loaded(tiny_llama_dir: Path) -> None:
    config = loaded(tiny_llama_dir).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="on the meta device"):
        identity_of(model)
