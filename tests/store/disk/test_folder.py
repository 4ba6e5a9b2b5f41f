"""What a store's folder is to others: its rights, its tenants, and folders that are no stores."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lmc.store.disk import seal
from lmc.store.disk.place import FORMAT_FILE, format_digest
from tests.store.disk.chunks import (
    NAMESPACES,
    Spec,
    after,
    find,
    held,
    opened,
    right,
    served,
)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder: when it was changed, and what is in it."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in paths
    }


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([Spec(i, 0, 20).item() for i in range(5)])
    disk.close()
    for path in [tmp_path / "kv", *(tmp_path / "kv").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_no_name_of_a_chunk_is_a_path(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv", label="../../label\0/etc/passwd")
    record, rows = Spec(1, 0, 20).item()
    hostile = b"../../../tmp/escaped\0".ljust(32, b"/")
    bad = replace(record, key=hostile, context=hostile, namespace=hostile)
    assert disk.put([(bad, rows)]) == ["stored"]
    got = disk.get(bad)
    assert got is not None and right(got, Spec(1, 0, 20))
    disk.close()
    assert [path.name for path in tmp_path.iterdir()] == ["kv"]
    names = {path.name for path in (tmp_path / "kv").rglob("*")}
    assert not [name for name in names if "escaped" in name or "label" in name]


def test_a_tenant_cannot_read_anothers_chunk(tmp_path: Path) -> None:
    """Not by looking, and not with a record that names the other's key and tokens."""
    disk = opened(tmp_path / "kv")
    _, theirs = NAMESPACES
    spec = Spec(2, 0, 20, tenant=0)
    tail = Spec(4, 1, 10, tail=True, tenant=0)
    disk.put([spec.item(), tail.item()])
    record = spec.record()
    assert [r.id for r in find(disk, record)] == [record.id]
    assert find(disk, replace(record, namespace=theirs)) == []
    assert [r.id for r in after(disk, tail.record())] == [tail.record().id]
    assert after(disk, tail.record(), theirs) == []
    assert disk.get(replace(record, namespace=theirs)) is None
    other_key = replace(Spec(2, 0, 20, tenant=1).record(), context=record.context)
    assert other_key.tokens == record.tokens and disk.get(other_key) is None
    # The salt itself is in no file.
    disk.close()
    data = b"".join(p.read_bytes() for p in (tmp_path / "kv").rglob("*") if p.is_file())
    assert b"salt of tenant" not in data
    disk = opened(tmp_path / "kv")
    assert served(disk, spec) is True  # and is not taken from its owner
    disk.close()


def test_a_folder_of_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    disk = opened(folder)
    disk.put([Spec(1, 0, 20).item()])
    disk.close()
    newer = {"lmc_store_format": 3, "xxh3_64": format_digest(3, ""), "new": "field"}
    (folder / FORMAT_FILE).write_text(json.dumps(newer))
    before = snapshot(folder)
    for read_only in (False, True):
        with pytest.raises(ValueError, match=r"store of format 3, .* reads format 2\)"):
            opened(folder, read_only=read_only)
    assert snapshot(folder) == before


def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"no store and not empty \(it has thesis.tex\)"):
        opened(tmp_path)
    assert snapshot(tmp_path) == before
    with pytest.raises(ValueError, match="holds no store"):
        opened(tmp_path / "missing", read_only=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("damage", ["", "{", '{"lmc_store_format": 3, "xxh3_64": "0"}', "[]", "\0"])
def test_a_damaged_format_file_costs_nothing(tmp_path: Path, damage: str) -> None:
    disk = opened(tmp_path / "kv")
    disk.put([Spec(1, 0, 20).item()])
    disk.close()
    (tmp_path / "kv" / FORMAT_FILE).write_text(damage)
    disk = opened(tmp_path / "kv")
    assert served(disk, Spec(1, 0, 20)) is True
    disk.close()
    text = json.loads((tmp_path / "kv" / FORMAT_FILE).read_text())
    assert text["lmc_store_format"] == 2


def test_capacity_is_checked_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="capacity: got 4096 bytes, allowed: at least 1048576"):
        opened(tmp_path / "kv", 4096)
    with pytest.raises(ValueError, match="compression: got 'gzip'"):
        opened(tmp_path / "kv", compression="gzip")
    assert list(tmp_path.iterdir()) == []


def test_it_needs_neither_torch_nor_vllm(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.store.disk.chunks import *; "
        f"d = opened(Path({str(tmp_path / 'kv')!r})); s = Spec(1, 0, 20); "
        "assert put(d, s) and served(d, s); d.close(); "
        "assert not {'torch', 'vllm', 'triton'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("n", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_all_is_served_after_a_restart(tmp_path: Path, n: int) -> None:
    """After a clean end, and after one that left no seal; `benchmarks/` say how soon."""
    specs = [Spec(i, 0, 4) for i in range(n)]
    disk = opened(tmp_path / "kv", 256 << 20)
    for i in range(0, n, 500):
        assert {*disk.put([spec.item() for spec in specs[i : i + 500]])} == {"stored"}
    disk.close()
    for crashed in (False, True):
        if crashed:
            (tmp_path / "kv" / "index" / "seal").unlink()
        disk = opened(tmp_path / "kv", 256 << 20)
        assert disk.counts["index_rebuilt"] == crashed
        assert len(held(disk)) == n
        assert all(served(disk, spec) for spec in specs)
        disk.close()


def test_an_index_that_shrank_is_whole_all_the_same(tmp_path: Path) -> None:
    """LMDB may count pages that it never wrote; others would take the file for one cut short."""
    specs = [Spec(i, 0, 30) for i in range(212)]
    for n in (212, 150, 40):
        disk = opened(tmp_path / str(n))
        disk.put([spec.item() for spec in specs])
        disk.evict([spec.record() for spec in specs[:n]])
        assert seal.complete(tmp_path / str(n) / "index")
        disk.close()
        disk = opened(tmp_path / str(n))
        assert disk.counts["index_rebuilt"] == 0
        disk.close()
