"""Ranks of engines of different tensor-parallel sizes on one folder."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.model.layout import KVLayout
from lmc.store.disk.tier import Disk
from lmc.store.record import Record
from lmc.store.sections import Form, Heads, Section, full_attention
from lmc.store.tier import Behind
from tests.store.disk.chunks import Spec, empty, heads_of, leaked

MODEL = KVLayout(L=3, G=8, D=2, dtype="float16")


def heads_on(rank: int, ranks: int, G: int) -> Heads:
    """Which of G heads a rank has: where there are more ranks than heads, several have one."""
    if ranks <= G:
        each = G // ranks
        return (rank * each, (rank + 1) * each, G)
    head = rank * G // ranks
    return (head, head + 1, G)


def opened(path: Path, rank: int, ranks: int, G: int, **settings: object) -> Disk:
    heads = heads_on(rank, ranks, G)
    layout = replace(MODEL, G=heads[1] - heads[0])
    return Disk(path, 16 << 20, layout=layout, heads=heads, **settings)  # type: ignore[arg-type]


def chunk(seed: int, G: int, T: int) -> tuple[Record, Section]:
    """A record, and the section of all heads."""
    form = full_attention(replace(MODEL, G=G), T)
    rng = np.random.default_rng([seed, G, T])
    record = replace(Spec(seed, 0, T).record(), nbytes=form.nbytes)
    return record, Section(form, [rng.integers(0, 9, form.shape).astype(np.uint8)])


def own(section: Section, heads: Heads) -> Section:
    """Of a section, some heads."""
    b = section.form.R // section.form.heads[2]
    rows = [part[..., b * heads[0] : b * heads[1]] for part in section.parts]
    return Section(section.form.of(heads), rows)


def same(got: Sequence[Section] | None, want: Section) -> bool:
    if got is None or [section.form for section in got] != [want.form]:
        return False
    return np.array_equal(np.concatenate(list(got[0].parts), axis=2), want.parts[0])


def told(disk: Disk, record: Record) -> list[Record]:
    """What the tier tells of a record, by content; by context it must tell the same."""
    behind = [Behind(record.context, record.tokens[:8])]
    (found,), (after,) = disk.lookup_many(
        record.namespace, [record.key], behind, time.monotonic() + 60
    )
    assert found == after
    return found


def check_reader(path: Path, ranks: int, G: int, chunks: Sequence[tuple[Record, Section]]) -> None:
    for rank in range(ranks):
        heads = heads_on(rank, ranks, G)
        disk = opened(path, rank, ranks, G)
        assert disk.contains([record for record, _ in chunks]) == [True] * len(chunks)
        for record, section in chunks:
            want = own(section, heads)
            (found,) = told(disk, record)
            assert (found.id, found.nbytes) == (record.id, want.form.nbytes)
            assert (found.namespace, found.tokens) == (record.namespace, record.tokens)
            assert same(disk.get(found), want)
            layers: list[int] = []
            into = empty([want.form])
            assert same(disk.get(found, into, arrived=layers.append), want)
            assert layers == sorted(set(layers))
            assert layers[-1] == MODEL.L
            # As host memory has it: in parts along T, among other rows.
            T = record.T
            cut = T // 2
            around = np.full((MODEL.L, 2, T + 2, want.form.R + 3), 255, np.uint8)
            parts = [around[:, :, 1 : 1 + cut, 2:-1], around[:, :, 1 + cut : T + 1, 2:-1]]
            assert same(disk.get(found, [Section(want.form, parts)]), want)
            assert (around[:, :, 0] == 255).all()
            assert (around[:, :, -1] == 255).all()
            assert (around[..., :2] == 255).all()
            assert (around[..., -1:] == 255).all()
        disk.close()


@settings(max_examples=25)
@given(
    G=st.sampled_from([1, 2, 4, 8]),
    writers=st.sampled_from([1, 2, 4, 8]),
    readers=st.sampled_from([1, 2, 4, 8]),
    T=st.integers(2, 24),
    codec=st.sampled_from(["none", "shuffle_zstd"]),
    order=st.randoms(use_true_random=False),
)
def test_any_number_of_ranks_finds_what_another_put(
    G: int, writers: int, readers: int, T: int, codec: str, order: object
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kv"
        chunks = [chunk(seed, G, T) for seed in range(3)]
        ranks = list(range(writers))
        order.shuffle(ranks)  # type: ignore[attr-defined]
        seen: set[Heads] = set()
        for rank in ranks:
            heads = heads_on(rank, writers, G)
            disk = opened(path, rank, writers, G, compression=codec)
            # Nothing is told before it is there with all heads.
            assert [told(disk, record) for record, _ in chunks] == [[]] * 3 or len(seen) == G
            done = disk.put([(record, [own(section, heads)]) for record, section in chunks])
            assert done == ["known" if heads in seen else "stored"] * 3
            assert disk.contains([record for record, _ in chunks]) == [True] * 3
            seen.add(heads)
            disk.close()
        check_reader(path, readers, G, chunks)
        disk = opened(path, 0, readers, G)
        # Who has it all has nothing to add.
        section = own(chunks[0][1], heads_on(0, readers, G))
        assert disk.put([(chunks[0][0], [section])]) == ["known"]
        disk.evict([chunks[0][0]])  # with all of its parts
        assert len(disk.folder.catalog) == 2 * len(seen)
        assert told(disk, chunks[0][0]) == []
        assert leaked(disk) == 0
        disk.close()


@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 1), (2, 4), (4, 2), (8, 2)])
def test_both_put_and_both_find(tmp_path: Path, one: int, other: int) -> None:
    """Over the end of the processes, and of the index."""
    G, chunks = 2, [chunk(seed, 2, 10) for seed in range(6)]
    for ranks, some in ((one, chunks[:3]), (other, chunks[3:])):
        for rank in range(ranks):
            disk = opened(tmp_path / "kv", rank, ranks, G)
            heads = heads_on(rank, ranks, G)
            disk.put([(record, [own(section, heads)]) for record, section in some])
            disk.close()
    check_reader(tmp_path / "kv", one, G, chunks)
    check_reader(tmp_path / "kv", other, G, chunks)
    (tmp_path / "kv" / "index" / "seal").unlink()
    check_reader(tmp_path / "kv", one, G, chunks)
    check_reader(tmp_path / "kv", other, G, chunks)


def test_ranks_that_put_one_after_the_other_end_with_the_same(tmp_path: Path) -> None:
    """Each keeps the latest two contexts of a content; who is behind pushes out no later one."""
    ranks = [opened(tmp_path / "kv", rank, 2, 2) for rank in range(2)]
    form = full_attention(replace(MODEL, G=1), 12)
    specs = [Spec(1, context, 12) for context in range(5)]
    for rank, disk in enumerate(ranks):
        rows = np.full(form.shape, rank, np.uint8)
        section = Section(form.of((rank, rank + 1, 2)), [rows])
        assert disk.put([(spec.record(), [section]) for spec in specs]) == ["stored"] * 5
    for disk in ranks:
        found = disk.lookup_many(
            specs[0].record().namespace, [specs[0].record().key], [], time.monotonic() + 60
        )[0][0]
        assert [Spec.of(record) for record in found] == specs[3:]
        disk.close()


def test_tails_of_ranks_grow_together(tmp_path: Path) -> None:
    ranks = [opened(tmp_path / "kv", rank, 2, 2) for rank in range(2)]
    specs = [Spec(1, 0, T, tail=True) for T in (5, 9, 14)]
    for rank, disk in enumerate(ranks):
        for spec in specs:
            form = full_attention(replace(MODEL, G=1), spec.T, (rank, rank + 1, 2))
            done = disk.put([(spec.record(), [Section(form, [np.zeros(form.shape, np.uint8)])])])
            # The first rank has a longer one already, which counts once the second has it too.
            assert done == ["stored"]
    record = specs[2].record()
    for disk in ranks:
        after = disk.lookup_many(
            record.namespace, [], [Behind(record.context, record.tokens[:8])], time.monotonic() + 60
        )[1][0]
        assert [Spec.of(r) for r in after] == specs[2:]
        assert len(disk.folder.catalog) == 2
    for disk in ranks:
        disk.close()


def test_a_part_that_is_lost_is_put_again(tmp_path: Path) -> None:
    """And until then the record is told to nobody, while the other rank reads its own."""
    ranks = [opened(tmp_path / "kv", rank, 2, 2) for rank in range(2)]
    record, section = chunk(1, 2, 16)
    items = [[(record, [own(section, heads_on(rank, 2, 2))])] for rank in range(2)]
    for disk, item in zip(ranks, items, strict=True):
        assert disk.put(item) == ["stored"]
    with disk.folder.catalog.reading() as index:
        found = dict(index.parts(record.id))
    ((at,),) = ([at for at in found.values() if at.unpack().forms[0].heads[0] == 1],)
    path = tmp_path / "kv" / "segments" / f"{at.segment:08d}.seg"
    data = bytearray(path.read_bytes())
    data[at.at + at.unpack().payload_at + 7] ^= 1
    path.write_bytes(data)
    assert ranks[1].get(record) is None
    assert ranks[1].counts["damaged:payload"] == 1
    for disk in ranks:
        assert told(disk, record) == []
    assert same(ranks[0].get(record), items[0][0][1][0])
    assert ranks[0].contains([record]) == [True]
    assert ranks[1].contains([record]) == [False]
    assert ranks[1].put(items[1]) == ["stored"]
    for rank, disk in enumerate(ranks):
        assert len(told(disk, record)) == 1
        assert same(disk.get(record), items[rank][0][1][0])
        disk.close()


def test_groups_of_other_heads_come_as_they_are(tmp_path: Path) -> None:
    """Full attention over two heads, a window with one that all ranks have, and latents."""
    T = 12
    record = Spec(1, 0, T).record()
    forms = [
        full_attention(replace(MODEL, G=2), T),
        Form(1, "kv", (0, 1, 1), (T - 4, T), 2, 3, "float32"),
        Form(2, "latent", (0, 1, 1), (0, T), 2, 5, "bfloat16"),
    ]
    rng = np.random.default_rng(1)
    whole = [Section(f, [rng.integers(0, 99, f.shape).astype(np.uint8)]) for f in forms]
    for rank in range(2):
        disk = opened(tmp_path / "kv", rank, 2, 2)
        mine = [*heads_of(whole[:1], rank, 2), *whole[1:]]
        assert disk.put([(record, mine)]) == ["stored"]
        got = disk.get(record)
        assert got is not None
        assert [section.form for section in got] == [section.form for section in mine]
        assert all(np.array_equal(a.parts[0], b.parts[0]) for a, b in zip(got, mine, strict=True))
        assert len(told(disk, record)) == rank  # with the second it has all heads
        disk.close()
    disk = opened(tmp_path / "kv", 0, 1, 2)
    (found,) = told(disk, record)
    assert found.nbytes == sum(form.nbytes for form in forms)
    # In any order, and only some of them.
    for wanted in ([2, 0, 1], [1], [0], [2, 1]):
        into = empty([forms[i] for i in wanted])
        layers: list[int] = []
        assert disk.get(found, into, arrived=layers.append) is not None
        assert layers[-1] == sum(forms[i].L for i in wanted)
        for section, i in zip(into, wanted, strict=True):
            assert np.array_equal(section.parts[0], whole[i].parts[0])
    # What it does not have is not given: another window, another type, more heads.
    for other in (
        replace(forms[1], tokens=(T - 5, T)),
        replace(forms[1], dtype="float16"),
        replace(forms[0], heads=(0, 3, 3)),
        replace(forms[2], kind="state"),
        replace(forms[2], group=3),
    ):
        assert disk.get(found, empty([forms[0], other])) is None
    disk.close()


@pytest.mark.parametrize("tail", [False, True])
def test_a_record_that_is_not_whole_takes_nobodys_place(tmp_path: Path, tail: bool) -> None:
    """Of those that replace each other: what is cut off between its parts costs nothing else."""
    ranks = [opened(tmp_path / "kv", rank, 2, 2) for rank in range(2)]

    def given(rank: int, spec: Spec) -> str:
        form = full_attention(replace(MODEL, G=1), spec.T, (rank, rank + 1, 2))
        rows = np.full(form.shape, spec.context + 1, np.uint8)
        return ranks[rank].put([(spec.record(), [Section(form, [rows])])])[0]

    def told() -> list[Spec]:
        record = specs[0].record()
        behind = [Behind(spec.record().context, record.tokens[:8]) for spec in specs]
        found = ranks[0].lookup_many(record.namespace, [], behind, time.monotonic() + 60)[1]
        return list(dict.fromkeys(Spec.of(r) for some in found for r in some))

    if tail:
        specs = [Spec(1, 0, T, tail=True) for T in (5, 9, 14)]
    else:
        specs = [Spec(1, context, 9) for context in range(3)]  # and two exact ones are kept
    for spec in specs[:-1]:
        assert [given(rank, spec) for rank in range(2)] == ["stored"] * 2
    before = told()
    assert before == (specs[1:2] if tail else specs[:2])
    assert given(0, specs[2]) == "stored"  # and then the process is killed
    assert told() == before
    for disk in ranks:
        disk.close()
    (tmp_path / "kv" / "index" / "seal").unlink(missing_ok=True)
    ranks = [opened(tmp_path / "kv", rank, 2, 2) for rank in range(2)]
    assert told() == before
    assert given(0, specs[2]) == "known" and given(1, specs[2]) == "stored"
    assert told() == (specs[2:] if tail else specs[1:])
    for disk in ranks:
        disk.close()
