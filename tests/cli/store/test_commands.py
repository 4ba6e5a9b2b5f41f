"""lmc store as a shell sees it, on small stores that a Disk has written."""

from __future__ import annotations

import errno
import json
import os
import struct
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from lmc.cli.output import size
from lmc.cli.store.app import Kind
from lmc.cli.store.inspect import existing
from lmc.cli.store.upkeep import verify_all
from lmc.store.disk.folder import Folder
from lmc.store.disk.place import FORMAT_FILE, format_digest
from lmc.store.record import Origin
from lmc.store.wire import namespace_digest
from tests.cli.store.toys import (
    FLOAT,
    A,
    B,
    answer,
    chunk,
    contents,
    fill,
    flip,
    invoke,
    opened,
    place,
    stored,
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    fill(tmp_path / "store")
    return tmp_path / "store"


# -- ls and stat ---------------------------------------------------------------------------------


def test_ls_adds_up_by_namespace_label_and_origin(store: Path) -> None:
    rows = answer("ls", store)
    records = answer("ls", store, "--by", "none")
    assert len(records) == 8 + 8 + 16
    assert len({(r["namespace"], r["label"], r["origin"]) for r in rows}) == len(rows) == 12
    for row in rows:
        same = [r for r in records if all(r[k] == row[k] for k in ("namespace", "label", "origin"))]
        first = {r["record"]: r for r in same}.values()
        assert row["records"] == len(same)
        assert row["chunks"] == len(first)
        assert row["tokens"] == sum(r["tokens"] for r in first)
        for name in ("bytes", "stored_bytes", "hits"):
            assert row[name] == sum(r[name] for r in same)
        assert row["oldest"] == min(r["created"] for r in same)
    assert sum(row["hits"] for row in rows) == 4
    assert {r["namespace"] for r in records} == {namespace_digest(n).hex() for n in (A, B)}


def test_ls_takes_a_namespace_an_origin_and_a_limit(store: Path) -> None:
    records = answer("ls", store, "--by", "none")
    b = namespace_digest(B).hex()
    some = answer("ls", store, "--by", "none", "--namespace", b[:12], "--origin", "exact")
    assert some == [r for r in records if r["namespace"] == b and r["origin"] == "exact"] != []
    assert answer("ls", store, "--by", "none", "--limit", 3) == records[:3]
    code, out, _ = invoke("ls", store, "--by", "none", "--limit", 3)
    assert code == 0
    assert "3 of 32 rows" in out
    assert records[2]["id"][:12] in out
    assert "1-2 of 2" in out  # the heads of the second of two ranks
    assert [row["origin"] for row in answer("ls", store, "--by", "origin")].count("exact") == 1


def test_ls_prints_each_namespace_once(store: Path) -> None:
    code, out, err = invoke("ls", store)
    assert (code, err) == (0, "")
    for namespace, label in ((A, "toy 0"), (A, "toy 1"), (B, "toy 2")):
        line = f"{namespace_digest(namespace).hex()[:12]}  {label} "
        assert out.count(line) == 1


def test_a_label_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    with opened(tmp_path / "s", layout=FLOAT, label="\x1b[2J[red]x") as disk:
        assert stored(disk, [chunk(0, FLOAT, A)])
    _, out, _ = invoke("ls", tmp_path / "s")
    assert "\x1b" not in out
    assert "?[2J[red]x" in out


def test_stat_adds_up(store: Path) -> None:
    facts = answer("stat", store)
    records = answer("ls", store, "--by", "none")
    files = list((store / "segments").iterdir())
    assert facts["records"] == len(records)
    assert facts["segments"] == len(files)
    assert facts["file_bytes"] == sum(f.stat().st_size for f in files)
    assert facts["live_bytes"] == sum(r["stored_bytes"] for r in records)
    assert facts["dead_bytes"] == 0
    codecs = {row["codec"]: row for row in facts["codecs"]}
    assert codecs["none"]["ratio"] == 1
    assert codecs["none"]["error"] == codecs["shuffle_zstd"]["error"] == 0
    assert 3 < codecs["int8"]["ratio"] < 4
    assert 0.001 < codecs["int8"]["error"] < 0.02
    assert [(r["kind"], r["dtype"], r["heads"], r["records"]) for r in facts["layouts"]] == [
        ("kv", "bfloat16", 2, 16), ("kv", "float32", 2, 16)
    ]  # fmt: skip
    code, out, _ = invoke("stat", store)
    assert code == 0
    assert size(facts["file_bytes"]) in out
    with opened(store) as disk:
        disk.evict_ids([bytes.fromhex(records[0]["id"])])
    gone = [r for r in records if r["record"] == records[0]["record"]]
    assert len(gone) == 2  # the other rank's part goes with it
    assert answer("stat", store)["dead_bytes"] == sum(r["stored_bytes"] for r in gone)


# -- verify --------------------------------------------------------------------------------------


def test_verify_reads_all(store: Path) -> None:
    found = answer("verify", store)
    facts = answer("stat", store)
    assert (found["records"], found["bytes"]) == (facts["records"], facts["live_bytes"])
    assert (found["faults"], found["opening"]) == ([], {})
    assert invoke("verify", store)[1].startswith("32 sound records")


@pytest.mark.parametrize("where", ["header", "payload"])
def test_verify_finds_a_flipped_byte(store: Path, where: str) -> None:
    id = answer("ls", store, "--by", "none")[5]["id"]
    file, header, payload = place(store, id)
    flip(file, header + 90 if where == "header" else payload + 100)
    code, out, _ = invoke("verify", store, "--json")
    (fault,) = json.loads(out)["faults"]
    assert code == 1
    assert (fault["id"], fault["reason"], fault["quarantined"]) == (id, where, True)
    assert id not in {r["id"] for r in answer("ls", store, "--by", "none")}
    assert answer("stat", store)["quarantined"] == {where: 1}
    code, out, _ = invoke("verify", store)
    assert code == 0
    assert out.startswith("31 sound records")


def test_verify_says_what_it_cannot_quarantine(store: Path) -> None:
    id = answer("ls", store, "--by", "none")[0]["id"]
    file, _, payload = place(store, id)
    flip(file, payload)
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    folder = Folder(store, read_only=True)
    (fault,) = verify_all(folder).faults
    folder.close()
    assert (fault.id.hex(), fault.reason, fault.quarantined) == (id, "payload", False)
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before


def test_verify_reports_what_a_new_index_leaves_out(store: Path) -> None:
    file, header, _ = place(store, answer("ls", store, "--by", "none")[20]["id"])
    flip(file, header + 90)
    (store / "index" / "seal").unlink()  # as a crash leaves it
    code, out, err = invoke("verify", store)
    assert code == 1
    assert out.startswith("31 sound records")
    assert "without 1 unreadable header" in err


def test_an_entry_of_the_index_that_is_damaged(store: Path) -> None:
    folder = existing(store)
    with folder.catalog.change() as change:
        id, located = next(iter(folder.catalog.records()))
        value = struct.pack(">IQ", located.segment, located.at) + located.header[:-1] + b"?"
        change._txn.put(id, value, db=change._db["records"])
    folder.close()
    assert len(answer("ls", store, "--by", "none")) == 31
    code, out, err = invoke("verify", store)
    assert code == 1
    assert f"{id.hex()[:12]} in segment {located.segment}: index, not quarantined" in out
    assert f"1 index fault: delete {store}/index" in err
    for file in (store / "index").iterdir():
        file.unlink()
    assert answer("verify", store)["records"] == 32


def test_a_folder_that_cannot_be_written_is_read(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a disk that is mounted so: root may write anywhere else."""
    real = os.open

    def mounted_read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        elsewhere = "/lmc-index-" in str(path)  # where a reader has an index of its own
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not elsewhere:
            raise OSError(errno.EROFS, "Read-only file system", path)
        return real(path, flags, *rest, **named)

    before = answer("ls", store)
    monkeypatch.setattr(os, "open", mounted_read_only)
    assert answer("ls", store) == before
    assert answer("stat", store)["records"] == 32
    assert answer("verify", store)["records"] == 32
    (store / "index" / "seal").unlink()  # a crash: an index is made elsewhere
    assert sum(row["records"] for row in answer("ls", store)) == 32
    code, out, err = invoke("gc", store)
    assert (code, out) == (2, "")
    assert "Read-only file system" in err


# -- gc ------------------------------------------------------------------------------------------


def test_gc_of_a_namespace_gives_its_bytes_back(store: Path) -> None:
    before = contents(store)
    bytes_before = answer("stat", store)["file_bytes"]
    b = namespace_digest(B).hex()
    gone = sum(r["stored_bytes"] for r in answer("ls", store, "--by", "none", "--namespace", b))
    code, out, err = invoke("gc", store, "--namespace", b[:6])
    assert (code, err) == (0, "")
    assert out.startswith("16 records forgotten; ")
    facts = answer("stat", store)
    assert facts["file_bytes"] == facts["live_bytes"] == bytes_before - gone
    assert sum(f.stat().st_size for f in (store / "segments").iterdir()) == facts["file_bytes"]
    kept = {id: value for id, value in before.items() if value[0]["namespace"] != b}
    assert contents(store) == kept


def test_gc_beside_an_engine(store: Path) -> None:
    chunks = [chunk(900 + i, FLOAT, A, origin="exact") for i in range(8)]
    with opened(store, layout=FLOAT) as disk:
        assert stored(disk, chunks)
        assert invoke("gc", store, "--namespace", namespace_digest(B).hex())[0] == 0
        for record, (section,) in chunks:
            got = disk.get(record)
            assert got is not None
            assert np.array_equal(got[0].parts[0], section.parts[0])
        assert stored(disk, [chunk(950 + i, FLOAT, A, origin="exact") for i in range(8)])
    assert answer("verify", store)["records"] == 32


def test_gc_alone_only_compacts(store: Path) -> None:
    records = answer("ls", store, "--by", "none")
    with opened(store) as disk:
        disk.evict_ids([bytes.fromhex(r["id"]) for r in records[::3]])
    gone = {r["record"] for r in records[::3]}
    left = sum(r["record"] not in gone for r in records)
    code, out, _ = invoke("gc", store)
    assert code == 0
    assert out.startswith("0 records forgotten; ")
    facts = answer("stat", store)
    assert (facts["dead_bytes"], facts["records"]) == (0, left)
    assert answer("verify", store)["records"] == facts["records"]


def test_gc_down_to_a_size_forgets_the_least_recently_used(store: Path) -> None:
    records = answer("ls", store, "--by", "none")
    used = {r["id"]: max(r["created"], r["last_read"] or 0) for r in records}
    half = sum(r["stored_bytes"] for r in records) // 2
    assert invoke("gc", store, "--to", half)[0] == 0
    kept = {r["id"] for r in answer("ls", store, "--by", "none")}
    live = answer("stat", store)["file_bytes"]
    assert 0 < len(kept) < len(records)
    assert half - max(r["stored_bytes"] for r in records) < live <= half
    assert max(used[id] for id in used.keys() - kept) <= min(used[id] for id in kept)


def test_gc_of_what_is_old(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, read_since = chunk(800, FLOAT, A, origin="exact"), chunk(801, FLOAT, A, origin="exact")
    with opened(store, layout=FLOAT) as disk:
        with monkeypatch.context() as m:
            then = time.time() - 8 * 86400
            m.setattr(time, "time", lambda: then)
            assert stored(disk, [old, read_since])
        assert disk.get(read_since[0]) is not None
    assert invoke("gc", store, "--older-than", "9d")[1].startswith("0 records forgotten")
    assert invoke("gc", store, "--older-than", "7d", "--origin", "blended")[1].startswith("0 ")
    assert invoke("gc", store, "--older-than", "7d")[1].startswith("1 record forgotten")
    with opened(store, layout=FLOAT) as disk:
        assert disk.contains([old[0], read_since[0]]) == [False, True]


def test_gc_forgets_what_was_quarantined(store: Path) -> None:
    file, _, payload = place(store, answer("ls", store, "--by", "none")[0]["id"])
    flip(file, payload)
    assert invoke("verify", store)[0] == 1
    code, out, _ = invoke("gc", store, "--quarantined")
    assert code == 0
    assert out.startswith("0 records forgotten, 1 quarantined; ")
    facts = answer("stat", store)
    assert (facts["quarantined"], facts["dead_bytes"], facts["records"]) == ({}, 0, 31)


# -- errors --------------------------------------------------------------------------------------

COMMANDS = [["ls"], ["stat"], ["verify"], ["gc"], ["export", "OUT"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "which is not there"),
        ("file", "which is no folder"),
        ("empty", "holds no store"),
        ("other", "is no store and not empty"),
        ("newer", "is a store of format 99"),
    ],
)
def test_what_is_no_store_is_left_alone(
    tmp_path: Path, command: list[str], what: str, message: str
) -> None:
    path = tmp_path / "store"
    if what == "file":
        path.write_text("x")
    elif what != "missing":
        path.mkdir()
    if what == "other":
        (path / "thesis.tex").write_text("x")
    if what == "newer":
        text = {"lmc_store_format": 99, "xxh3_64": format_digest(99, "")}
        (path / FORMAT_FILE).write_text(json.dumps(text))
    before = sorted(tmp_path.rglob("*"))
    name, *rest = command
    code, out, err = invoke(name, path, *(str(tmp_path / r) for r in rest))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "--namespace", "zz"], "no namespaces begin with 'zz'"),
        (["ls", "--namespace", ""], "2 namespaces begin with ''"),
        (["gc", "--namespace", "zz"], "no namespaces begin with 'zz'"),
        (["gc", "--older-than", "7"], "--older-than: got '7'"),
        (["gc", "--older-than", "d"], "--older-than: got 'd'"),
        (["gc", "--to", "few"], "got 'few'"),
        (["gc", "--to", "0"], "got '0'"),
    ],
)
def test_wrong_arguments_change_nothing(store: Path, arguments: list[str], message: str) -> None:
    name, *rest = arguments
    code, out, err = invoke(name, store, *rest)
    assert (code, out) == (2, "")
    assert message in err
    assert answer("stat", store)["records"] == 32


def test_origins_are_those_of_records() -> None:
    assert get_args(Kind) == get_args(Origin)
