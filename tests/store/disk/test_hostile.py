"""Folders that somebody else may have had a hand in: refused, or what is hostile costs nothing."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lmc.store.disk import header as fmt
from tests.store.disk.chunks import Spec, opened, part_of, served

ONE, TWO = (Spec(i, 0, 20) for i in range(2))


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([ONE.item()])
    disk.close()
    os.chmod(tmp_path / "kv", mode)
    with pytest.raises(PermissionError, match=f"may be written by others .*{mode:o}"):
        opened(tmp_path / "kv")
    disk = opened(tmp_path / "kv", read_only=True)
    assert served(disk, ONE)
    disk.close()
    # In such a folder one may be made.
    disk = opened(tmp_path / "kv" / "mine")
    assert disk.put([ONE.item()]) == ["stored"]
    disk.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(0o700)
    os.chown(tmp_path / "kv", 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        opened(tmp_path / "kv")
    assert list((tmp_path / "kv").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "segments",
        "index",
        "lmc-store.json",
        "open.lock",
        "users.lock",
        "writer.lock",
        "flights.lock",
    ],
)
def test_links_in_a_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([ONE.item()])
    disk.close()
    (tmp_path / "kv" / name).rename(tmp_path / "outside")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "outside", tmp_path)}
    (tmp_path / "kv" / name).symlink_to(tmp_path / "outside")
    with pytest.raises((ValueError, OSError)):
        opened(tmp_path / "kv")
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb", "seal"])
def test_links_in_an_index_are_not_followed(tmp_path: Path, name: str) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([ONE.item()])
    disk.close()
    victim, file = tmp_path / "victim", tmp_path / "kv" / "index" / name
    victim.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(victim)
    before = victim.read_bytes()
    disk = opened(tmp_path / "kv")
    assert served(disk, ONE) and disk.put([TWO.item()]) == ["stored"]
    disk.close()
    assert victim.read_bytes() == before


@pytest.mark.parametrize("seq", [2**64 - 1, 2**62])
def test_hostile_segments_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seq: int
) -> None:
    """A hole of terabytes, and numbers of puts that no number may follow."""
    disk = opened(tmp_path / "kv")
    specs = [Spec(i, 0, 20) for i in range(3)]
    disk.put([spec.item() for spec in specs])
    located = dict(disk.folder.catalog.records())[part_of(disk, specs[1])]
    header = located.unpack()
    disk.close()

    with monkeypatch.context() as patch:
        patch.setattr(fmt, "MOST_SEQ", 2**64 - 1)
        hostile = fmt.pack(replace(header, seq=seq))
    file = tmp_path / "kv" / "segments" / f"{located.segment:08d}.seg"
    with open(file, "r+b") as segment:
        segment.seek(located.at)
        segment.write(hostile)
    os.truncate(tmp_path / "kv" / "segments" / "00000001.seg", file.stat().st_size)
    (tmp_path / "kv" / "segments" / "00000007.seg").touch(0o600)
    os.truncate(tmp_path / "kv" / "segments" / "00000007.seg", 8 << 40)
    (tmp_path / "kv" / "index" / "seal").unlink()
    begun = time.monotonic()
    disk = opened(tmp_path / "kv")
    assert time.monotonic() - begun < 20
    assert disk.folder.catalog.next_seq() < fmt.MOST_SEQ // 2
    assert served(disk, specs[0]) and served(disk, specs[2])
    assert disk.put([Spec(9, 0, 20).item()]) == ["stored"]
    disk.close()
