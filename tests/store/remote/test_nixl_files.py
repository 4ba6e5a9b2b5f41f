"""Files that NIXL moves: what is wrong with them is a miss that is counted, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmc.store.remote.keyed import Keyed
from lmc.store.remote.nixl_files import NixlFiles, NixlFilesConfig
from tests.store.disk.chunks import LAYOUT, Spec
from tests.store.remote.kept import SPECS, found, put, served
from tests.store.remote.servers import valkey

pytest.importorskip("nixl", reason="the extra [nixl]")


def opened(folder: Path, **fields: Any) -> Keyed:
    return NixlFilesConfig(str(folder), valkey().url, prefix=str(folder), **fields).open(LAYOUT)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Keyed]:
    tier = opened(tmp_path / "files")
    yield tier
    tier.close()


def files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def test_others_that_mount_the_folder_find_it_and_nothing_is_left_half_done(
    tier: Keyed, tmp_path: Path
) -> None:
    big = Spec(9, 0, 4000)  # more than what is read at once
    assert put(tier, *SPECS, big) == ["stored"] * 5
    assert len(files(tmp_path / "files")) == 5
    other = opened(tmp_path / "files")
    assert all(found(other, spec) and served(other, spec) for spec in (*SPECS, big))
    other.evict([spec.record() for spec in SPECS])
    assert len(files(tmp_path / "files")) == 1
    assert not served(tier, SPECS[0]) and served(tier, big)
    other.close()


@pytest.mark.parametrize("how", ["cut", "empty", "changed", "gone", "folder gone"])
def test_damage_is_a_miss_and_is_put_again(tier: Keyed, tmp_path: Path, how: str) -> None:
    assert put(tier, SPECS[0]) == ["stored"]
    (file,) = files(tmp_path / "files")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if how in ("cut", "empty", "changed"):
        file.write_bytes({"cut": data[:-7], "empty": b"", "changed": data}[how])
    elif how == "gone":
        file.unlink()
    else:
        shutil.rmtree(tmp_path / "files")
    assert not served(tier, SPECS[0])
    assert any(kind.split(":")[0] in ("damaged", "missing") for kind in tier.counts), tier.counts
    assert put(tier, SPECS[0]) == ["stored"] and served(tier, SPECS[0])


def test_a_folder_that_is_none_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path: got nothing"):
        NixlFilesConfig("", valkey().url)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        opened(tmp_path / "file")
    for plugin in ("NOPE", "GDS"):  # of which this machine has no driver
        with pytest.raises(ValueError, match=f"plugin: {plugin} of NIXL does not run here"):
            NixlFiles(tmp_path, plugin, 1.0)  # type: ignore[arg-type]


def test_a_file_system_that_is_full_is_full(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=3m", "lmc", str(folder)]
    if os.geteuid() or subprocess.run(made, capture_output=True).returncode:
        pytest.skip("mounting wants root")
    tier = opened(folder)
    try:
        big = [Spec(i, 0, 4000) for i in range(6)]  # 1 MB each
        outcomes = [put(tier, spec)[0] for spec in big]
        assert outcomes[0] == "stored" and outcomes[-1] in ("full", "failed")
        there = [spec for spec, outcome in zip(big, outcomes, strict=True) if outcome == "stored"]
        assert all(served(tier, spec) for spec in there) and not found(tier, big[-1])
        assert len(files(folder)) == len(there)
        tier.evict([there[0].record()])
        assert put(tier, big[-1]) == ["stored"] and served(tier, big[-1])
    finally:
        tier.close()
        subprocess.run(["umount", str(folder)], check=True)
