"""What every tier promises: one suite, for each of them and for each as it fails now and then."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from docs.example_tier import PLACES, Remembering
from lmc.store.memory import HostMemory
from lmc.store.record import Record
from lmc.store.remote.nixl import NixlConfig
from lmc.store.remote.nixl_files import NixlFilesConfig
from lmc.store.remote.redis import RedisConfig
from lmc.store.remote.s3 import S3Config
from lmc.store.sections import Section
from lmc.store.store import Store
from lmc.store.tier import Behind, Tier, Wanted
from tests.store.disk.chunks import LAYOUT, NAMESPACES, Kind, Spec, empty, heads_of, opened, right
from tests.store.faulty import Faulty
from tests.store.remote.servers import seaweedfs, valkey
from tests.store.wanted import brought

MAKE: dict[str, Callable[[Path, int], Any]] = {
    "memory": lambda path, capacity: HostMemory(LAYOUT, capacity),
    "disk": lambda path, capacity: opened(path / "kv", capacity),
    "disk, compressed": lambda path, capacity: opened(
        path / "kv", capacity, compression="shuffle_zstd"
    ),
    "example": lambda path, capacity: Remembering(str(path)),
    "redis": lambda path, capacity: RedisConfig(valkey().url, prefix=str(path)).open(LAYOUT),
    "nixl": lambda path, capacity: NixlConfig(
        valkey().url, capacity, prefix=str(path), timeout_s=5.0
    ).open(LAYOUT),
    "nixl_files": lambda path, capacity: NixlFilesConfig(
        str(path / "files"), valkey().url, prefix=str(path)
    ).open(LAYOUT),
    "s3": lambda path, capacity: bucket(path).open(LAYOUT),
    "s3, directory": lambda path, capacity: bucket(path, directory=valkey().url).open(LAYOUT),
}


def bucket(path: Path, **fields: Any) -> S3Config:
    return S3Config(f"s3://lmc{path}", endpoint=seaweedfs().endpoint, **fields)


BOUNDED = ["memory", "disk", "disk, compressed"]
ONE_RANK: list[Kind] = ["full", "windowed", "latent"]
Item = tuple[Record, list[Section]]


@contextmanager
def made(name: str, folder: Path, capacity: int = 4 << 20) -> Iterator[Any]:
    tier = MAKE[name](folder, capacity)
    try:
        yield tier
    finally:
        tier.close()
        PLACES.clear()


@pytest.fixture(params=MAKE)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    with made(request.param, tmp_path) as tier:
        yield tier


def item(spec: Spec) -> Item:
    """A chunk, with a slot of its own for a tier that goes by slots."""
    record, sections = spec.item()
    return replace(record, slot=spec.content), sections


def specs(n: int, T: int = 20, kind: Kind = "full") -> list[Spec]:
    return [Spec(i, 0, 1 + (i * 7 + T) % 40, kind=kind) for i in range(n)]


def serves(tier: Tier, spec: Spec, **options: Any) -> bool | None:
    """Whether a get gives what was put; None when it gives nothing."""
    into = empty(spec.forms())
    return right(into, spec) if brought(tier, item(spec)[0], into, **options) else None


def lookup(tier: Tier, record: Record) -> tuple[list[bytes], list[bytes]]:
    """Ids of what is told by a record's key, and by what stands before it."""
    behind = Behind(record.context, record.tokens[:8])
    until = time.monotonic() + 60
    (by_key,), (by_context,) = tier.lookup_many(record.namespace, [record.key], [behind], until)
    return [r.id for r in by_key], [r.id for r in by_context]


@pytest.mark.parametrize("kind", ONE_RANK)
def test_what_is_stored_is_held_until_it_is_evicted(tier: Tier, kind: Kind) -> None:
    many = specs(12, kind=kind)
    items = [item(spec) for spec in many]
    records = [record for record, _ in items]
    assert not tier.size and tier.durability in ("device", "replicated", "evictable")
    assert tier.contains(records) == [False] * 12
    assert tier.put(items[:10]) == ["stored"] * 10
    assert tier.contains(records) == [True] * 10 + [False] * 2
    if tier.size is not None and tier.capacity is not None:
        assert 0 < tier.size <= tier.capacity
    assert [serves(tier, spec) for spec in many] == [True] * 10 + [None] * 2
    before = tier.size
    tier.evict([records[3], records[11]])
    assert tier.contains(records[2:5]) == [True, False, True]
    assert serves(tier, many[3]) is None and lookup(tier, records[3]) == ([], [])
    assert tier.size is None or (before is not None and tier.size <= before)
    tier.evict(records)
    assert not tier.size


@pytest.mark.parametrize("kind", ONE_RANK)
def test_what_is_held_is_told_of_without_its_bytes(tier: Tier, kind: Kind) -> None:
    spec = Spec(1, 3, 30, kind=kind)
    record, _ = item(spec)
    assert lookup(tier, record) == ([], [])
    before = tier.epoch
    assert tier.put([item(spec)]) == ["stored"]
    assert tier.epoch is None or tier.epoch != before
    assert lookup(tier, record) == ([record.id], [record.id])
    (told,) = tier.lookup_many(record.namespace, [record.key], [], time.monotonic() + 60)[0][0]
    assert replace(told, slot=-1, nbytes=0) == replace(record, slot=-1, nbytes=0)
    # Of another tenant nothing, nor what is asked for by what it is not.
    other = replace(record, namespace=NAMESPACES[1])
    assert lookup(tier, other) == ([], [])
    assert lookup(tier, replace(record, key=bytes(32), context=bytes(32))) == ([], [])
    many = tier.lookup_many(
        record.namespace, [bytes(32), record.key] * 500, [], time.monotonic() + 60
    )
    assert [len(records) for records in many[0]] == [0, 1] * 500 and many[1] == []


def test_tails_are_told_of_where_they_stand_and_blends_by_content(tier: Tier) -> None:
    tail = Spec(1, 1, 9, tail=True)
    blend = Spec(2, 2, 9, "blended")
    assert tier.put([item(tail), item(blend)]) == ["stored"] * 2
    records = [item(tail)[0], item(blend)[0]]
    assert lookup(tier, records[0]) == ([], [records[0].id])
    assert lookup(tier, records[1]) == ([records[1].id], [])
    assert [serves(tier, spec) for spec in (tail, blend)] == [True] * 2


def test_what_is_held_is_not_put_again(tier: Tier) -> None:
    (one, two) = (item(spec) for spec in specs(2))
    assert tier.put([one]) == ["stored"]
    assert tier.put([one, two]) == ["known", "stored"]
    assert tier.counts["known"] == 1


@pytest.mark.parametrize("name", [name for name in MAKE if name != "memory"])
def test_of_several_ranks_each_has_its_heads_and_none_is_told_of_before_all(
    name: str, tmp_path: Path
) -> None:
    """Host memory is one rank's own."""
    with made(name, tmp_path) as tier:
        spec = Spec(1, 0, 30, kind="ranks")
        record, _ = item(spec)
        first, second = (heads_of(spec.sections(), rank, 2) for rank in range(2))
        assert tier.put([(record, first)]) == ["stored"]
        assert lookup(tier, record) == ([], [])
        assert tier.put([(record, first), (record, second)]) == ["known", "stored"]
        assert lookup(tier, record) == ([record.id], [record.id])
        for mine in (first, second):
            into = empty([form for form, _ in mine])
            assert brought(tier, record, into)
            for (_, (got,)), (_, (put,)) in zip(into, mine, strict=True):
                assert np.array_equal(got, put)
        tier.evict([record])
        assert lookup(tier, record) == ([], []) and not tier.size


def test_rows_go_where_they_are_wanted_in_whatever_parts(tier: Tier) -> None:
    spec = Spec(1, 0, 30)
    record, ((form, (rows,)),) = item(spec)
    split = [np.ascontiguousarray(part) for part in np.split(rows, [7, 19], axis=2)]
    assert tier.put([(record, [Section(form, split)])]) == ["stored"]
    for cuts in ([], [1], [10, 11, 29]):
        sizes = np.diff([0, *cuts, 30])
        into = [Section(form, [np.full((4, 2, n, 32), 255, np.uint8) for n in sizes])]
        assert brought(tier, record, into)
        assert right(into, spec)


@pytest.mark.parametrize("kind", ONE_RANK)
def test_layers_are_told_as_they_come(tier: Tier, kind: Kind) -> None:
    spec = Spec(1, 0, 30, kind=kind)
    tier.put([item(spec)])
    into = empty(spec.forms())
    seen: list[int] = []

    def came(layers: int) -> None:
        seen.append(layers)
        if kind == "full":
            assert np.array_equal(into[0].parts[0][:layers], spec.rows()[0][:layers])

    assert brought(tier, item(spec)[0], into, seen=came)
    assert seen == sorted(seen)


def test_a_deadline_that_has_passed_is_a_miss_or_quick_enough(tier: Tier) -> None:
    spec = Spec(1, 0, 30)
    tier.put([item(spec)])
    assert serves(tier, spec, seconds=-1) in (None, True)
    assert serves(tier, spec) is True


def test_nothing_is_written_once_a_handle_is_over(tier: Tier) -> None:
    """Cancelled or not: what lies there then is another's."""
    many = specs(40)
    tier.put([item(spec) for spec in many])
    rng = random.Random(0)
    wanted = []
    for spec in many:
        into = empty(spec.forms())
        until = time.monotonic() + rng.choice([60, 60, 0.001])
        wanted.append(Wanted(item(spec)[0], into, until, lambda: None))
    handles = tier.get_many(wanted)
    for handle in rng.sample(handles, 30):
        handle.cancel()
    open_, end = dict(zip(count(), handles, strict=False)), time.monotonic() + 60
    while open_:
        assert time.monotonic() < end
        for i, handle in list(open_.items()):
            if (over := handle.poll().over) is not None:
                assert over == "missing" or right(wanted[i].into, many[i])
                for _, parts in wanted[i].into:
                    parts[0][:] = 77
                del open_[i]
    handles[0].cancel()  # one that is over, too
    time.sleep(0.05)
    assert all((part == 77).all() for w in wanted for _, parts in w.into for part in parts)


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_too_large_is_refused_and_costs_nothing(name: str, tmp_path: Path) -> None:
    with made(name, tmp_path, 1 << 20) as tier:
        small, large = Spec(1, 0, 30), Spec(2, 0, 10000 if name == "disk, compressed" else 5000)
        assert tier.put([item(small)]) == ["stored"]
        assert tier.put([item(large), item(Spec(3, 0, 30))]) == ["full", "stored"]
        assert serves(tier, small) is True
        assert tier.contains([item(large)[0]]) == [False]


@pytest.mark.parametrize("wrong", ["rows", "no sections"])
def test_what_is_no_chunk_fails_alone(tier: Tier, wrong: str) -> None:
    one, two, three = (item(spec) for spec in specs(3))
    form, (rows,) = two[1][0]
    bad = [] if wrong == "no sections" else [Section(form, [rows[:, :, 1:]])]
    assert tier.put([one, (two[0], bad), three]) == ["stored", "failed", "stored"]
    assert [serves(tier, spec) for spec in specs(3)] == [True, None, True]
    assert tier.put([two]) == ["stored"]


def test_threads_never_see_anothers_bytes(tier: Tier) -> None:
    many = specs(6)
    items = [item(spec) for spec in many]
    faults: list[str] = []
    until = time.monotonic() + 1.0

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.monotonic() < until:
                i = rng.randrange(6)
                what = rng.randrange(5)
                if what == 0:
                    tier.put([items[i]])
                elif what == 1:
                    tier.evict([items[i][0]])
                elif what == 2:
                    tier.contains([items[i][0]])
                    lookup(tier, items[i][0])
                elif serves(tier, many[i]) is False:
                    faults.append(f"{i} is another")
        except Exception as e:
            faults.append(repr(e))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_closed_twice_it_answers_nothing_and_raises_nothing(tier: Tier) -> None:
    spec = Spec(1, 0, 30)
    tier.put([item(spec)])
    tier.register(0, 4096)
    tier.close()
    tier.close()
    assert serves(tier, spec) is None


@pytest.mark.parametrize("name", MAKE)
def test_one_that_fails_now_and_then_is_never_wrong(name: str, tmp_path: Path) -> None:
    """What its outcomes say holds, whatever else of it fails."""
    with made(name, tmp_path, 16 << 20) as sound:
        tier = Faulty(sound, 0.3, seed=1)
        kinds = ONE_RANK
        stored: dict[int, Spec] = {}
        served = 0
        for i in range(120):
            spec = Spec(i, 0, 1 + i % 40, kind=kinds[i % 3])
            (outcome,) = tier.put([item(spec)])
            if outcome == "stored":
                stored[i] = spec
            told = lookup(tier, item(spec)[0])
            assert all(ids in ([], [item(spec)[0].id]) for ids in told)
            assert outcome == "stored" or told == ([], [])
            for other in random.Random(i).sample(sorted(stored), min(3, len(stored))):
                got = serves(tier, stored[other])
                assert got is not False
                served += got is True
        assert 40 < len(stored) < 120 and served > 60
        tier.rate = 0.0
        assert all(serves(tier, spec) for spec in stored.values())
        assert sound.contains([item(spec)[0] for spec in stored.values()]) == [True] * len(stored)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("which", ["Disk", "Example"])
def test_a_store_survives_a_tier_that_fails(which: str, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    of: dict[str, Any] = {"rate": 0.3, "seed": seed, "place": str(tmp_path)}
    tiers: list[Any] = [{"name": f"tests.store.faulty:Faulty{which}", **of}]
    store = Store(LAYOUT, b"model", memory_bytes=40 * 256 * 3, tiers=tiers, patience_s=5.0)
    faulty: Any = store.tiers[0]
    prompts = [rng.integers(0, 999, 40) for _ in range(12)]
    values = [torch.full(LAYOUT.shape(40), float(i)) for i in range(12)]
    served = 0
    for _ in range(8):
        for i in rng.permutation(12):
            found = store.lookup(prompts[i], [(0, 40)])
            got = store.retrieve(found[0]) if found else None
            if got is None:
                store.save(prompts[i], values[i], [(0, 40)])
            else:
                served += 1
                assert torch.equal(got, values[i])
        store.drain()  # what the background had no time for is no fault of the tier
    assert served > 10  # though memory has room for three
    faulty.rate = 0.0
    store.drain()
    for i, prompt in enumerate(prompts):
        if found := store.lookup(prompt, [(0, 40)]):
            got = store.retrieve(found[0])
            assert got is not None and torch.equal(got, values[i])
    store.close()
