"""lmc store export and import: the same chunks come back, or the file is refused."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cli.store import chunk_file
from lmc.cli.store.inspect import existing
from lmc.cli.store.transfer import export_chunks, import_chunks
from lmc.store.wire import namespace_digest
from tests.cli.store.toys import (
    BFLOAT,
    CAPACITY,
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
    windowed,
)
from tests.store.disk.chunks import find


@pytest.fixture
def store(tmp_path: Path) -> Path:
    fill(tmp_path / "store")
    return tmp_path / "store"


def test_a_store_survives_export_and_import(store: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "x.safetensors", tmp_path / "other"
    code, out, err = invoke("export", store, file)
    assert (code, err) == (0, "")
    assert "32 records" in out
    assert file.stat().st_mode & 0o777 == 0o600
    code, out, err = invoke("import", other, file)
    assert (code, err) == (0, "")
    assert "32 records" in out
    assert contents(other) == contents(store)
    assert answer("verify", other)["records"] == 32
    # What an engine then asks for by its namespace, it gets.
    record, (section,) = chunk(3, FLOAT, A)
    with opened(other, layout=FLOAT) as disk:
        assert [found.context for found in find(disk, record)] == [record.context]
        assert find(disk, replace(record, namespace=B)) == []
        got = disk.get(record)
        assert got is not None
        assert np.array_equal(got[0].parts[0], section.parts[0])
    code, out, _ = invoke("import", other, file)
    assert code == 0
    assert "0 records, 0 B of KV; 32 add nothing to what is there" in out
    assert contents(other) == contents(store)


def test_safetensors_reads_what_is_exported(store: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="it reads bfloat16, numpy does not")
    from safetensors import safe_open

    file = tmp_path / "x.safetensors"
    assert invoke("export", store, file)[0] == 0
    want = contents(store)
    with safe_open(file, "pt") as f:
        assert set(f.keys()) == {f"{id}.0" for id in want}
        for id, (facts, kv) in want.items():
            tensor = f.get_tensor(f"{id}.0")
            start, end, _ = facts["heads"]
            layout = replace(FLOAT if facts["label"] != "toy 2" else BFLOAT, G=end - start)
            assert (*tensor.shape,) == layout.shape(facts["tokens"])
            assert tensor.dtype == getattr(torch, layout.dtype)
            assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == kv


def test_records_of_several_groups_travel(tmp_path: Path) -> None:
    chunks = [windowed(i) for i in range(3)]
    with opened(tmp_path / "store", layout=FLOAT, compression="int8") as disk:
        assert stored(disk, chunks)
    want = contents(tmp_path / "store")
    assert invoke("export", tmp_path / "store", tmp_path / "x")[0] == 0
    assert invoke("import", tmp_path / "other", tmp_path / "x")[0] == 0
    assert contents(tmp_path / "other") == want
    with opened(tmp_path / "other", layout=FLOAT) as disk:
        for record, sections in chunks:
            got = disk.get(record)
            assert got is not None
            assert [form for form, _ in got] == [form for form, _ in sections]


def test_export_of_one_namespace_and_of_the_latest(store: Path, tmp_path: Path) -> None:
    a = namespace_digest(A).hex()
    file, other = tmp_path / "x.safetensors", tmp_path / "other"
    records = answer("ls", store, "--by", "none", "--namespace", a)
    limit = sum(r["bytes"] for r in records[:3])
    assert invoke("export", store, file, "--namespace", a[:8], "--limit-bytes", limit)[0] == 0
    assert invoke("import", other, file)[0] == 0
    assert contents(other).keys() == {r["id"] for r in records[:3]}
    code, _, err = invoke("export", store, tmp_path / "y", "--limit-bytes", 1)
    assert code == 2
    assert "nothing is exported" in err
    assert {p.name for p in tmp_path.iterdir()} == {"store", "other", "x.safetensors"}


def test_export_leaves_out_what_is_damaged(store: Path, tmp_path: Path) -> None:
    records = answer("ls", store, "--by", "none")
    file, _, payload = place(store, records[9]["id"])
    flip(file, payload + 5)
    code, out, err = invoke("export", store, tmp_path / "x")
    assert code == 1
    assert "31 records" in out
    assert "1 are damaged and were left out" in err
    assert invoke("import", tmp_path / "other", tmp_path / "x")[0] == 0
    assert contents(tmp_path / "other").keys() == {r["id"] for r in records} - {records[9]["id"]}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A file of three records, and what the store had."""
    path = tmp_path_factory.mktemp("exported")
    with opened(path / "store", layout=BFLOAT, label="toy") as disk:
        assert stored(disk, [chunk(i, BFLOAT, A) for i in range(3)])
    folder = existing(path / "store")
    assert export_chunks(folder, path / "x").records == 3
    folder.close()
    return path / "x", contents(path / "store")


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_the_same(
    exported: tuple[Path, dict], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file, want = exported
    good = file.read_bytes()
    begin = 8 + int.from_bytes(good[:8], "little")
    kind = data.draw(st.sampled_from(["header", "tensor", "cut", "longer"]))
    at = data.draw(st.integers(begin if kind == "tensor" else 0, len(good) - 1))
    if kind == "header":
        at %= begin
    bad = {
        "cut": good[:at],
        "longer": good + bytes(1 + at % 9),
    }.get(kind) or good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    tmp_path = tmp_path_factory.mktemp("damaged")
    (tmp_path / "x").write_bytes(bad)
    try:
        import_chunks(tmp_path / "store", tmp_path / "x", CAPACITY)
    except ValueError:
        assert not (tmp_path / "store").exists()
        return
    # A blank for another blank: JSON has four.
    assert kind == "header"
    assert chr(good[at]).isspace()
    assert chr(bad[at]).isspace()
    assert contents(tmp_path / "store") == want


def rewritten(good: bytes, change: Callable[[dict, str], None]) -> bytes:
    """A file with another header; `change` gets it and the name of its first tensor."""
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    change(header, next(name for name in header if name != "__metadata__"))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + good[8 + length :]


SECTION = {"group": 0, "kind": "kv", "heads": [0, 2, 2], "tokens": [0, 30], "codec": "none"}


def told(**changes: object) -> Callable[[dict, str], None]:
    def change(header: dict, name: str) -> None:
        facts = json.loads(header["__metadata__"][name[:-2]])
        header["__metadata__"][name[:-2]] = json.dumps(facts | changes)

    return change


def shaped(**changes: object) -> Callable[[dict, str], None]:
    return lambda header, name: header[name].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, n: h.pop("__metadata__"), "as `lmc store export` writes it"),
        (lambda h, n: h["__metadata__"].update(version="1"), "want .*'version': '2'"),
        (lambda h, n: h["__metadata__"].pop(n[:-2]), "either the tensors or the metadata"),
        (lambda h, n: h.pop(n), "no safetensors file.*invalid offset"),
        (lambda h, n: h["__metadata__"].update({n[:-2]: "{}"}), "namespace: Field required"),
        (
            lambda h, n: h["__metadata__"].update({n[:-2]: 3}),
            "no safetensors file.*expected a string",
        ),
        (lambda h, n: h["__metadata__"].update({n[:-2]: "{"}), "Invalid JSON"),
        (told(tokens=[1, 2, 3]), "T=3"),
        (told(tokens=[-1]), "tokens.0"),
        (told(key="../../etc/passwd"), "key: String should match"),
        (told(context="00"), "context: String should match"),
        (told(context="0" * 64), "not the id"),
        (told(start=1), "does not match its digest"),
        (told(start=1 << 64), "start: "),
        (told(origin="stolen"), "origin: "),
        (told(sections=[]), "sections: "),
        (told(sections=[SECTION | {"heads": [0, 3, 2]}]), "heads=.0, 3, 2."),
        (told(sections=[SECTION | {"heads": [0, 1, 2]}]), "got shape"),
        (told(sections=[SECTION | {"tokens": [0, 31]}]), "tokens=.0, 31."),
        (told(sections=[SECTION | {"kind": "latent"}]), "got shape"),
        (told(sections=[SECTION, SECTION]), "got 1 tensors"),
        (told(created=float("inf")), "created: "),
        (told(created=1e308), "created: "),
        (told(seq=1 << 63), "seq: "),
        (told(label="\u00fc" * 200), "label of more than 255 bytes"),
        (told(more=1), "more: Extra inputs"),
        (shaped(dtype="F32"), "no safetensors file.*invalid shape, data type"),
        (shaped(dtype="F8_E4M3"), "no safetensors file.*invalid shape, data type"),
        (shaped(dtype="I16"), "got I16 .*want .*F32, F16, BF16"),
        (shaped(shape=[2, 2, 30, 32]), "got BF16 .*want .L, S, T, G, D."),
        (shaped(shape=[2, 2, 30, 32, 1]), "got shape"),
        (shaped(shape=[1, 2, 30, 2, 32]), "not the id"),
        (shaped(shape=[1 << 30, 2, 30, 1, 32]), "no safetensors file.*invalid shape"),
        (shaped(shape=[1, 4, 30, 1, 32]), "allowed: at most"),
        (shaped(data_offsets=[0, 1 << 62]), "no safetensors file.*invalid shape"),
        (shaped(data_offsets=[2, 2 * 2 * 30 * 32 * 2 + 2]), "no safetensors file.*invalid offset"),
    ],
)
def test_a_file_that_says_otherwise_is_refused(
    exported: tuple[Path, dict],
    tmp_path: Path,
    change: Callable[[dict, str], None],
    message: str,
) -> None:
    (tmp_path / "x").write_bytes(rewritten(exported[0].read_bytes(), change))
    code, _, err = invoke("import", tmp_path / "store", tmp_path / "x")
    assert code == 2
    assert re.search(message, err)
    assert len(err) < 500
    assert err.count("\n") == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"1234567", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{}",
     (50_000).to_bytes(8, "little") + b"[" * 50_000],
)  # fmt: skip
def test_what_is_no_such_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    code, _, err = invoke("import", tmp_path / "store", tmp_path / "x")
    assert code == 2
    assert len(err) < 500
    assert not (tmp_path / "store").exists()


def test_import_evicts_nothing(store: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "new", layout=FLOAT) as disk:
        assert stored(disk, [chunk(500 + i, FLOAT, A, origin="exact") for i in range(40)])
    before, more = contents(tmp_path / "new"), contents(store)
    assert invoke("export", store, tmp_path / "x")[0] == 0
    code, _, err = invoke("import", tmp_path / "new", tmp_path / "x", "--capacity", "1MiB")
    assert code == 2
    least = re.search(r"give at least ([0-9,]+)", err)
    assert least is not None
    assert contents(tmp_path / "new") == before
    enough = least[1].replace(",", "")
    assert invoke("import", tmp_path / "new", tmp_path / "x", "--capacity", enough)[0] == 0
    after = contents(tmp_path / "new")
    assert after.keys() == before.keys() | more.keys()
    assert all(after[id] == before[id] for id in before)


def sparse(path: Path, header: bytes, nbytes: int) -> Path:
    """A file of a header and a hole."""
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    return path


def tensors(n: int) -> bytes:
    """A header of so many empty tensors."""
    one = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(one % i for i in range(n)) + "}").encode()


def metadata(text: str) -> bytes:
    """A header of one tensor, of which the file says this."""
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return json.dumps({"__metadata__": {**chunk_file.FORMAT, "ab": text}, "ab.0": one}).encode()


MANY = 12_000_000
KEYS = ",".join(f'"{i:x}":1' for i in range(1 << 19))
HOSTILE = {
    "numbers in metadata": (lambda: metadata('{"tokens":[' + "1," * MANY + "1]}"), 0, "any record"),
    "lists in metadata": (lambda: metadata('{"tokens":[' + "[]," * MANY + "1]}"), 0, "any record"),
    "objects in metadata": (lambda: metadata('{"a":' * (MANY // 4)), 0, "any record"),
    "keys in metadata": (lambda: metadata("{" + KEYS + "}"), 0, "any record"),
    "wrong tokens": (lambda: metadata('{"tokens":[' + "-1," * 1_000_000 + "1]}"), 0, "tokens.0:"),
    "a hole": (
        lambda: b'{"a":{"dtype":"F32","shape":[4096,2,8,1024,160],"data_offsets":[0,42949672960]}}',
        40 << 30,
        "with holes",
    ),
    "a header of 100 MB": (lambda: b" " * 100_000_000, 0, "allowed: at most 67,108,864"),
    "more tensors than any": (lambda: tensors(140_000), 0, "allowed: at most 131,072"),
    "nested lists": (lambda: b"[" * 1_000_000, 0, "beside names and text"),
    "nested objects": (lambda: b'{"a":' * 1_000_000, 0, "allowed: at most 131,072"),
    "empty objects": (lambda: b'{"a":[' + b"{}," * 20_000_000 + b"{}]}", 0, "allowed: at most"),
    "numbers": (lambda: b'{"a":[' + b"1," * 30_000_000 + b"1]}", 0, "beside names and text"),
    "a string without an end": (lambda: b'{"' + b"a" * 60_000_000, 0, "beside names and text"),
    "escapes": (lambda: b'{"' + b"\\\\" * 30_000_000, 0, "beside names and text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_cost_too_much_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    header, hole, message = HOSTILE[name]
    file = sparse(tmp_path / "x", header(), hole)
    invoke("import", tmp_path / "store", sparse(tmp_path / "y", b"[]", 0))  # what it imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, _, err = invoke("import", tmp_path / "store", file)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert len(err) < 500
    assert grown < 300 << 10
    assert not (tmp_path / "store").exists()


def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    """Of a pipe nobody may ever open the other end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        code, _, err = invoke("import", tmp_path / "store", tmp_path / name)
        assert code == 2
        assert "no plain file" in err
        assert err.count("\n") == 1
    assert not (tmp_path / "store").exists()
