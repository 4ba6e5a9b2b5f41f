"""Digests of weights, and the cache they are kept in."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lmc.model.weights import cache_dir, weights_digest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "lmc"


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/lmc")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_dir() == Path.home() / ".cache" / "lmc"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"one")
    (folder / "b.safetensors").write_bytes(b"two")
    (folder / "config.json").write_text("{}")
    return folder


def test_weights_digest_is_of_names_and_contents(cache: Path, weights: Path) -> None:
    digest = weights_digest(weights)
    assert len(digest) == 32
    copy = shutil.copytree(weights, weights.parent / "copy")
    assert weights_digest(copy) == digest
    (copy / "config.json").write_text('{"other": 1}')
    assert weights_digest(copy) == digest
    (copy / "b.safetensors").write_bytes(b"TWO")
    assert weights_digest(copy) != digest
    (weights / "b.safetensors").rename(weights / "c.safetensors")
    assert weights_digest(weights) != digest


def test_weights_digest_reads_weights_once(
    cache: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = weights_digest(weights)
    monkeypatch.setattr("lmc.model.weights.file_digest", lambda file: pytest.fail("read again"))
    assert weights_digest(weights) == digest


def test_weights_digest_of_links(cache: Path, weights: Path) -> None:
    """As a hub cache has them: links to blobs named by their digest."""
    links = weights.parent / "snapshot"
    links.mkdir()
    (weights.parent / "blob1").write_bytes(b"one")
    (weights.parent / "blob2").write_bytes(b"two")
    (links / "a.safetensors").symlink_to("../blob1")
    (links / "b.safetensors").symlink_to("../blob2")
    assert weights_digest(links) == weights_digest(weights)


def test_weights_digest_of_a_changed_file(cache: Path, weights: Path) -> None:
    digest = weights_digest(weights)
    (weights / "a.safetensors").write_bytes(b"ONE")
    assert weights_digest(weights) != digest
    assert len(json.loads((cache / "digests.json").read_text())) == 2  # replaced, not added


def swapped(file: Path) -> None:
    new = file.with_name("new")
    new.write_bytes(b"ONE")
    os.utime(new, ns=(1, 1))
    new.replace(file)


def written_over(file: Path) -> None:
    file.write_bytes(b"ONE")
    os.utime(file, ns=(1, 1))


def moved_away(file: Path) -> None:
    """The name is another file's now, as old and as large."""
    file.rename(file.with_name("old"))
    file.with_name("old").with_name("b2").write_bytes(b"ONE")
    os.utime(file.with_name("b2"), ns=(1, 1))
    os.link(file.with_name("b2"), file)


@pytest.mark.parametrize("change", [swapped, written_over, moved_away])
def test_weights_of_the_same_size_and_time_are_told_apart(
    cache: Path, weights: Path, change: Callable[[Path], None]
) -> None:
    file = weights / "a.safetensors"
    os.utime(file, ns=(1, 1))
    digest = weights_digest(weights)
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    change(file)
    assert file.stat().st_mtime_ns == 1
    assert weights_digest(weights) != digest


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"{f}": 3}', '{"{f}": [3, 4]}'])
def test_weights_digest_with_a_damaged_cache(cache: Path, weights: Path, text: str) -> None:
    digest = weights_digest(weights)
    (cache / "digests.json").write_text(text.replace("{f}", str(weights / "a.safetensors")))
    assert weights_digest(weights) == digest
    assert json.loads((cache / "digests.json").read_text())


def test_weights_digest_with_a_cache_it_cannot_write(cache: Path, weights: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert len(weights_digest(weights)) == 32


def test_weights_digest_leaves_no_temporary_files(cache: Path, weights: Path) -> None:
    weights_digest(weights)
    assert [p.name for p in cache.iterdir()] == ["digests.json"]


def test_weights_digest_without_weights(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"want a folder with weights \(\*\.safetensors"):
        weights_digest(tmp_path)
