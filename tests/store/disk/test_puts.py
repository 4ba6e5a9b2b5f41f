"""What becomes of each put, and what is told of what was put."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmc.store.disk.catalog import BEHIND
from lmc.store.disk.folder import Folder
from lmc.store.disk.place import FORMAT_FILE, format_digest
from lmc.store.disk.segments import Segments
from lmc.store.record import Record
from lmc.store.sections import Section
from lmc.store.tier import Behind
from tests.store.disk.chunks import (
    KINDS,
    Spec,
    after,
    empty,
    find,
    held,
    leaked,
    opened,
    put,
    right,
    served,
)

Item = tuple[Record, list[Section]]


def with_rows(item: Item, change: Callable[[np.ndarray], Any]) -> Item:
    record, sections = item
    return record, [Section(form, [change(part) for part in parts]) for form, parts in sections]


def with_tokens(item: Item, token: int) -> Item:
    record, sections = item
    ids = np.frombuffer(record.tokens, "<i8").copy()
    ids[3] = token
    return replace(record, tokens=ids.tobytes()), sections


def with_form(item: Item, **changes: Any) -> Item:
    record, sections = item
    return record, [Section(replace(form, **changes), parts) for form, parts in sections]


BAD: dict[str, Callable[[Item], Any]] = {
    "a token below zero": lambda i: with_tokens(i, -1),
    "a token of 33 bits": lambda i: with_tokens(i, 1 << 32),
    "half a token": lambda i: (replace(i[0], tokens=i[0].tokens + b"1234"), i[1]),
    "no tokens": lambda i: (replace(i[0], tokens=b""), i[1]),
    "a position below zero": lambda i: (replace(i[0], start=-1), i[1]),
    "a position beyond all": lambda i: (replace(i[0], start=1 << 63), i[1]),
    "a key that is none": lambda i: (replace(i[0], key=b"key"), i[1]),
    "a context that is none": lambda i: (replace(i[0], context=b""), i[1]),
    "an origin of its own": lambda i: (replace(i[0], origin="stolen"), i[1]),
    "no sections": lambda i: (i[0], []),
    "no rows": lambda i: (i[0], [Section(i[1][0].form, [])]),
    "rows of fewer tokens": lambda i: with_rows(i, lambda rows: rows[:, :, 1:]),
    "rows of fewer layers": lambda i: with_rows(i, lambda rows: rows[1:]),
    "rows of more bytes": lambda i: with_rows(i, lambda rows: np.concatenate([rows, rows], 3)),
    "rows of another type": lambda i: with_rows(i, lambda rows: rows.view(np.int8)),
    "rows of three axes": lambda i: with_rows(i, lambda rows: rows[0]),
    "rows that are none": lambda i: with_rows(i, lambda rows: None),
    "heads that are none": lambda i: with_form(i, heads=(0, 2, 1)),
    "tokens beyond the chunk": lambda i: with_form(i, tokens=(1, 21)),
    "a kind of its own": lambda i: with_form(i, kind="attention"),
    "a type of its own": lambda i: with_form(i, dtype="int3"),
    "layers beyond all": lambda i: with_form(i, L=1 << 40),
}


@pytest.mark.parametrize("compression", ["none", "int8"])
def test_one_that_cannot_be_stored_loses_no_other(tmp_path: Path, compression: str) -> None:
    disk = opened(tmp_path / "kv", compression=compression)
    specs = [Spec(i, 0, 20) for i in range(len(BAD) + 1)]
    bad = [change(Spec(100 + i, 0, 20).item()) for i, change in enumerate(BAD.values())]
    batch = [specs[0].item()]
    for one, spec in zip(bad, specs[1:], strict=True):
        batch += [one, spec.item()]
    assert disk.put(batch) == ["stored", *["failed", "stored"] * len(BAD)]
    assert disk.counts["put_failed:not_a_chunk"] == len(BAD)
    assert disk.contains([spec.record() for spec in specs]) == [True] * len(specs)
    assert set(held(disk).values()) == set(specs)
    if compression == "none":
        assert all(served(disk, spec) for spec in specs)
    assert leaked(disk) == 0
    disk.close()


def test_each_put_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = opened(tmp_path / "kv", 1 << 20)
    one, two, large = Spec(1, 0, 20), Spec(2, 0, 20), Spec(3, 0, 5000)
    assert disk.put([]) == []
    assert disk.put([one.item(), one.item(), large.item(), two.item()]) == [
        "stored", "known", "full", "stored"
    ]  # fmt: skip
    assert disk.put([replace(one, origin="blended").item()]) == ["known"]
    assert disk.durability == "device"

    def failing(*arguments: Any) -> None:
        raise OSError(5, "the disk fails")

    def full(*arguments: Any) -> None:
        raise OSError(28, "no space left on device")

    for call, outcome in ((failing, "failed"), (full, "full")):
        with monkeypatch.context() as patch:
            patch.setattr(Segments, "append", call)
            assert disk.put([Spec(9, 0, 20).item()]) == [outcome]
    assert put(disk, Spec(9, 0, 20))
    disk.close()
    disk = opened(tmp_path / "kv", 1 << 20, read_only=True)
    assert disk.put([Spec(10, 0, 20).item()]) == ["failed"]
    disk.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_asked_for_in_one_go(tmp_path: Path, kind: Any) -> None:
    disk = opened(tmp_path / "kv")
    specs = [Spec(i, i % 3, 20, kind=kind) for i in range(40)]
    specs += [Spec(i, 7, 20, "isolated", kind=kind) for i in range(0, 40, 4)]
    tails = [Spec(200 + i, 30 + i, 10, tail=True, kind=kind) for i in range(5)]
    assert all(put(disk, spec) for spec in [*specs, *tails])
    everything = [spec.record() for spec in [*specs, *tails]]
    unknown = [Spec(500 + i, i, 20).record() for i in range(20)]
    asked = [*everything, *unknown]
    namespace = asked[0].namespace
    behind = [Behind(record.context, record.tokens[:8]) for record in asked]
    found, follow = disk.lookup_many(
        namespace, [record.key for record in asked], behind, time.monotonic() + 60
    )
    for record, variants, after_it in zip(asked, found, follow, strict=True):
        same = [spec for spec in specs if spec.record().key == record.key]
        assert [Spec.of(variant) for variant in variants] == same
        begins = [
            spec
            for spec in [*specs, *tails]
            if spec.record().context == record.context
            and spec.record().tokens[:8] == record.tokens[:8]
        ]
        assert [Spec.of(variant) for variant in after_it] == begins
        for variant in [*variants, *after_it]:
            spec = Spec.of(variant)
            assert variant == spec.record()  # with all that a store knows of it
            got = disk.get(variant)
            assert got is not None
            assert right(got, spec)
    # The same of another process, and of an index that is made again.
    disk.close()
    (tmp_path / "kv" / "index" / "seal").unlink()
    disk = opened(tmp_path / "kv")
    again = disk.lookup_many(
        namespace, [record.key for record in asked], behind, time.monotonic() + 60
    )
    assert again == (found, follow)
    assert disk.lookup_many(b"another", [r.key for r in asked], behind, time.monotonic() + 60) == (
        [[] for _ in asked], [[] for _ in asked]
    )  # fmt: skip
    disk.close()


def test_a_lookup_ends_with_its_deadline(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv")
    specs = [Spec(i, i, 20) for i in range(20)]
    assert all(put(disk, spec) for spec in specs)
    record = specs[0].record()
    keys = [spec.record().key for spec in specs]
    behind = [Behind(record.context, record.tokens[:8])] * 5
    assert disk.lookup_many(record.namespace, keys, behind, time.monotonic() - 1) == (
        [[] for _ in keys], [[] for _ in behind]
    )  # fmt: skip
    disk.close()


def test_of_very_many_that_continue_a_context_the_latest_are_told(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv")
    first = Spec(1, 0, 20).record()
    records = []
    for i in range(3 * BEHIND):
        record = Spec(1000 + i, 0, 20, kind="ranks").record()
        tokens = first.tokens[:8] + record.tokens[8:]
        records.append(replace(record, tokens=tokens, context=first.context))
        for _, part in Spec(1000 + i, 0, 20, kind="ranks").items():
            assert disk.put([(records[-1], part)]) == ["stored"]
    assert [r.id for r in after(disk, first)] == [r.id for r in records[-BEHIND:]]
    disk.close()


def test_the_epoch_moves_with_every_put_of_anybody(tmp_path: Path) -> None:
    one, other = opened(tmp_path / "kv"), opened(tmp_path / "kv")
    seen = {one.epoch, other.epoch}
    for i in range(5):
        assert put(one, Spec(i, 0, 20))
        now = {one.epoch, other.epoch}
        assert not now & seen
        find(other, Spec(i, 0, 20).record())
        assert {one.epoch, other.epoch} == now
        seen |= now
    one.close()
    other.close()


def test_what_another_process_evicted_is_not_read(tmp_path: Path) -> None:
    """Although this one knows where it was."""
    one, other = opened(tmp_path / "kv"), opened(tmp_path / "kv")
    specs = [Spec(i, 0, 20, kind=KINDS[i % len(KINDS)]) for i in range(8)]
    assert all(put(one, spec) for spec in specs)
    for spec in specs:
        assert served(other, spec)
        assert served(other, spec)  # out of the same place
    one.evict([spec.record() for spec in specs[:4]])
    for i, spec in enumerate(specs):
        assert served(other, spec) is (None if i < 4 else True)
        assert other.get(spec.record(), empty(spec.forms())) is None or i >= 4
    assert all(put(one, spec) for spec in specs[:4])
    assert all(served(other, spec) for spec in specs)
    assert other.counts["quarantined"] == 0
    one.close()
    other.close()


def test_a_part_of_another_folder_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = opened(tmp_path / "kv")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_encode", replace(disk._encode, folder=os.urandom(16)))
        assert put(disk, Spec(1, 0, 20))
    assert put(disk, Spec(2, 0, 20))
    assert served(disk, Spec(1, 0, 20)) is None
    disk.folder.settle()  # the index is made again, without it
    assert [served(disk, Spec(i, 0, 20)) for i in (1, 2)] == [None, True]
    assert disk.counts["records_of_others"] == 1
    assert disk.counts["quarantined"] == 0
    disk.close()


def test_an_older_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv")
    assert put(disk, Spec(1, 0, 20))
    disk.close()
    text = json.dumps({"lmc_store_format": 1, "xxh3_64": format_digest(1, "")})
    (tmp_path / "kv" / FORMAT_FILE).write_text(text)
    for read_only in (False, True):
        with pytest.raises(
            ValueError, match=r"format 1, .* \(it reads format 2\): use another folder"
        ):
            Folder(tmp_path / "kv", read_only=read_only)
    assert (tmp_path / "kv" / FORMAT_FILE).read_text() == text
