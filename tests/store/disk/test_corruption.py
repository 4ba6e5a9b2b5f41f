"""One thing in a folder damaged between two runs, thousands of times: right bytes or none."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from lmc.store.disk.catalog import BEHIND
from lmc.store.record import Record
from lmc.store.sections import Section
from tests.store.disk.chunks import (
    KINDS,
    Spec,
    after,
    empty,
    find,
    forked,
    heads_of,
    held,
    leaked,
    opened,
    put,
    served,
)
from tests.store.disk.damage import DAMAGE, Case, Placed

CAPACITY = 2 << 20
A_CHILD = 50  # cases of one process: what kills it is one of them
SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]
# Counts of a tier that say what was found, and are added up.
FOUND = (
    "damaged:header", "damaged:payload", "damaged:truncated", "damaged:missing",
    "records_torn", "headers_unreadable", "segments_unreadable", "index_rebuilt",
)  # fmt: skip


@contextlib.contextmanager
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be."""
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)
    else:
        yield tmp_path


def build(root: Path, stale: Path) -> None:
    """Several segments: variants and tails of two tenants, of every kind, half compressed."""
    half = 12
    for compression, contents in (("none", range(half)), ("zstd", range(half, 2 * half))):
        disk = opened(root, CAPACITY, compression=compression, label="a model")
        for content in contents:
            T, tenant, kind = 35 + 3 * content % 30, content % 2, KINDS[content % len(KINDS)]
            specs = [
                Spec(content, 1, T, "isolated", tenant=tenant, kind=kind),
                Spec(content, 2, T, tenant=tenant, kind=kind),
                Spec(content, 100 + content, T - 5, tail=True, tenant=tenant, kind=kind),
            ]
            assert [put(disk, spec) for spec in specs] == [True] * 3
        kind = KINDS[contents[0] % len(KINDS)]
        assert disk.get(Spec(contents[0], 2, 35 + 3 * contents[0] % 30, kind=kind).record())
        disk.close()
        if not stale.exists():
            shutil.copytree(root / "index", stale)


def contents_of(root: Path) -> tuple[tuple[Placed, ...], dict[bytes, tuple[Spec, Record]]]:
    """Where all parts of records are; and by id what they are."""
    disk = opened(root, CAPACITY)
    placed = []
    for _, located in disk.folder.catalog.records():
        header = located.unpack()
        placed.append(Placed(header.record.id, located.segment, located.at, header))
    specs = held(disk)
    disk.close()
    return tuple(placed), {id: (spec, spec.record()) for id, spec in specs.items()}


def one_case(
    case: Case,
    kind: str,
    known: dict[bytes, tuple[Spec, Record]],
    sections: dict[bytes, list[Section]],
) -> Counter[str]:
    """Damage a folder, open it and get everything; what was found."""
    may_be_gone = DAMAGE[kind][0](case)
    found: Counter[str] = Counter()
    disk = opened(case.root, CAPACITY)
    for id, (spec, record) in known.items():
        # One rank of two has half of the heads.
        halves = spec.kind != "latent" and case.rng.random() < 0.2
        ranks = [heads_of(sections[id][:1], rank, 2) for rank in range(2)]
        whole = True
        for want in ranks if halves else [sections[id]]:
            wish = halves or case.rng.random() < 0.5
            got = disk.get(record, empty([form for form, _ in want]) if wish else None)
            whole = whole and got is not None
            if got is not None:
                found["wrong bytes served"] += not same(got, want)
        found["gone"] += not whole
        found["gone, and was not hit"] += not whole and id not in may_be_gone
        other = record.namespace + b"?"
        found["wrong bytes served"] += after(disk, record, other) != []
        behind = after(disk, record)
        # Of what is found by content only so many of the latest are found by context too.
        if spec.tail or (spec.origin != "blended" and len(behind) < BEHIND):
            found["not found"] += whole and not any(r.id == id for r in behind)
        if not spec.tail:
            there = any(r.id == id for r in find(disk, record))
            found["not found"] += whole and not there
    counted = DAMAGE[kind][1]
    if counted and (may_be_gone or "index_rebuilt" in counted):
        found["not counted"] += not any(disk.counts[count] for count in counted)
    new = Spec(1000, 0, 40, kind=case.rng.choice(KINDS))
    found["not put"] += not put(disk, new) or served(disk, new) is not True
    found["leaked bytes"] += leaked(disk) if kind != "segment a folder" else 0
    for count in FOUND:
        found[count] += disk.counts[count]
    disk.close()
    if case.rng.random() < 0.2:
        disk = opened(case.root, CAPACITY)
        for spec, _ in known.values():
            found["wrong bytes served"] += served(disk, spec) is False
        disk.close()
    return found


def same(got: Sequence[Section], want: Sequence[Section]) -> bool:
    """Whether sections are equal, in the order that is wanted."""
    return [form for form, _ in got] == [form for form, _ in want] and all(
        np.array_equal(a.parts[0], b.parts[0]) for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize(
    "cases", [pytest.param(500, marks=pytest.mark.heavy), pytest.param(10_000, marks=SLOW)]
)
def test_what_is_damaged_is_never_served(
    cases: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: Counter[str] = Counter()
    faults: list[str] = []
    with quick_folder(tmp_path) as folder:
        pristine, stale, root = folder / "pristine", folder / "stale", folder / "store"
        build(pristine, stale)
        placed, known = contents_of(pristine)
        assert len(known) == 72 and len(placed) == 90
        assert len({record.segment for record in placed}) >= 4
        sections = {id: spec.sections() for id, (spec, _) in known.items()}
        kinds = sorted(DAMAGE)

        def work(first: int, pipe: int) -> None:
            for i in range(first, min(cases, first + A_CHILD)):
                os.write(pipe, b"%d\n" % i)
                shutil.rmtree(root, ignore_errors=True)
                shutil.copytree(pristine, root)
                case = Case(root, stale, placed, random.Random(i))
                counts = one_case(case, kinds[i % len(kinds)], known, sections)
                os.write(pipe, json.dumps(counts).encode() + b"\n")

        for first in range(0, cases, A_CHILD):
            pid, out = forked(lambda pipe, first=first: work(first, pipe))
            with open(out, "rb") as pipe:
                lines = pipe.read().splitlines()
            for i, counts in zip(lines[::2], lines[1::2], strict=False):
                kind = kinds[int(i) % len(kinds)]
                counted = Counter(json.loads(counts))
                found += counted
                for fault in ("gone, and was not hit", "not found", "not counted", "not put"):
                    if counted[fault]:
                        faults.append(f"case {int(i)}, {kind}: {counted}")
            if os.waitpid(pid, 0)[1] != 0:
                faults.append(f"case {int(lines[-1])} killed its process")
            found["cases"] += len(lines) // 2
    with capsys.disabled():
        counts = ", ".join(f"{name} {found[name]}" for name in ("gone", *FOUND))
        wrong = found["wrong bytes served"]
        print(f"\ncorruption: {found['cases']} cases, {wrong} wrong bytes served, {counts}")
    assert faults == []
    assert found["cases"] == cases
    assert found["wrong bytes served"] == found["leaked bytes"] == 0
    # Files that are shorter or gone are noticed when the folder is opened, not by a get.
    never = ("damaged:truncated", "damaged:missing")
    assert all(found[name] for name in FOUND if name not in never)
