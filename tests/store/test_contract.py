"""What every tier promises: one suite, for each of them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmc.store.memory import HostMemory
from lmc.store.record import Record
from lmc.store.store import Store
from lmc.store.tier import Rows, Tier
from tests.store.disk.chunks import LAYOUT, Spec, opened, right
from tests.store.faulty import failing_disk

TIERS: dict[str, Callable[[Path, int], Any]] = {
    "memory": lambda path, capacity: HostMemory(LAYOUT, capacity),
    "disk": lambda path, capacity: opened(path / "kv", capacity),
    "disk, compressed": lambda path, capacity: opened(
        path / "kv", capacity, compression="shuffle_zstd"
    ),
}


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    made = TIERS[request.param](tmp_path, 4 << 20)
    yield made
    made.close()


def item(spec: Spec) -> tuple[Record, list[Rows]]:
    """A chunk, with a slot of its own for a tier that goes by slots."""
    record, rows = spec.item()
    return replace(record, slot=spec.content), rows


def specs(n: int, T: int = 20) -> list[Spec]:
    return [Spec(i, 0, 1 + (i * 7 + T) % 40) for i in range(n)]


def test_what_is_acknowledged_is_held_until_it_is_evicted(tier: Tier) -> None:
    many = specs(12)
    items = [item(spec) for spec in many]
    assert tier.size == 0
    assert tier.contains([record for record, _ in items]) == [False] * 12
    assert tier.put(items[:10]) == [True] * 10
    assert tier.contains([record for record, _ in items]) == [True] * 10 + [False] * 2
    assert 0 < tier.size <= tier.capacity
    for spec, (record, _) in zip(many, items[:10], strict=False):
        got = tier.get(record)
        assert got is not None and right(got, spec)
    assert tier.get(items[11][0]) is None
    before = tier.size
    tier.evict([items[3][0], items[11][0]])
    assert tier.contains([record for record, _ in items[2:5]]) == [True, False, True]
    assert tier.get(items[3][0]) is None
    assert tier.size <= before
    tier.evict([record for record, _ in items])
    assert tier.size == 0


def test_what_is_held_is_not_put_again(tier: Tier) -> None:
    (one, two) = (item(spec) for spec in specs(2))
    assert tier.put([one]) == [True]
    assert tier.put([one, two]) == [False, True]
    assert tier.counts["known"] == 1


def test_rows_go_where_they_are_wanted_in_whatever_parts(tier: Tier) -> None:
    spec = Spec(1, 0, 30)
    record, (rows,) = item(spec)
    assert tier.put([(record, np.split(rows, [7, 19], axis=2))]) == [True]
    for cuts in ([], [30], [1], [10, 11, 29]):
        into = [np.full((4, 2, n, 32), 255, np.uint8)
                for n in np.diff([0, *(c for c in cuts if c < 30), 30])]  # fmt: skip
        assert tier.get(record, into) is into
        assert right(into, spec)
    # In memory that lies anywhere, among other rows.
    around = np.full((4, 2, 34, 40), 255, np.uint8)
    assert tier.get(record, [around[:, :, 2:32, 5:37]]) is not None
    assert right([around[:, :, 2:32, 5:37]], spec)
    assert (around[:, :, :2] == 255).all() and (around[:, :, 32:] == 255).all()
    assert (around[..., :5] == 255).all() and (around[..., 37:] == 255).all()


def test_layers_are_told_as_they_come(tier: Tier) -> None:
    record, rows = item(Spec(1, 0, 30))
    tier.put([(record, rows)])
    seen: list[int] = []
    into = [np.empty((4, 2, 30, 32), np.uint8)]

    def arrived(layers: int) -> None:
        seen.append(layers)
        assert np.array_equal(into[0][:layers], rows[0][:layers])

    assert tier.get(record, into, arrived=arrived) is not None
    assert seen == sorted(set(seen)) and seen[-1] == 4


def test_a_deadline_that_has_passed_is_a_miss_or_quick_enough(tier: Tier) -> None:
    record, rows = item(Spec(1, 0, 30))
    tier.put([(record, rows)])
    got = tier.get(record, deadline=time.monotonic() - 1)
    assert got is None or right(got, Spec(1, 0, 30))
    assert tier.get(record, deadline=time.monotonic() + 60) is not None


def test_what_is_too_large_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    for name, make in TIERS.items():
        (tmp_path / name).mkdir()
        tier = make(tmp_path / name, 1 << 20)
        small, large = item(Spec(1, 0, 30)), item(Spec(2, 0, 5000))  # 1.28 MB
        if name == "disk, compressed":
            large = item(Spec(2, 0, 10000))
        assert tier.put([small]) == [True]
        assert tier.put([large, item(Spec(3, 0, 30))]) == [False, True], name
        got = tier.get(small[0])
        assert got is not None and right(got, Spec(1, 0, 30))
        tier.close()


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
                record, rows = items[i]
                what = rng.randrange(4)
                if what == 0:
                    tier.put([(record, rows)])
                elif what == 1:
                    tier.evict([record])
                else:
                    into = [np.empty((4, 2, record.T, 32), np.uint8)]
                    got = tier.get(record, into)
                    if got is not None and not right(got, many[i]):
                        faults.append(f"{i} is another")
        except Exception as e:
            faults.append(repr(e))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


@pytest.mark.parametrize("seed", range(4))
def test_a_disk_that_fails_costs_misses_and_nothing_else(tmp_path: Path, seed: int) -> None:
    """Nothing is raised, nothing wrong is served, and what was acknowledged is there afterwards."""
    disk = opened(tmp_path / "kv", 1 << 24)
    faults = failing_disk(disk, 0.1, seed)
    rng = random.Random(seed)
    acknowledged: dict[int, Spec] = {}
    for i in range(150):
        spec = Spec(i, 0, 1 + i % 50)
        if disk.put([spec.item()])[0]:
            acknowledged[i] = spec
        disk.contains([spec.record()])
        disk.find(b"x", spec.record().key)
        disk.after(b"x", b"c" * 32, b"t" * 8)
        for other in rng.sample(sorted(acknowledged), min(3, len(acknowledged))):
            got = disk.get(acknowledged[other].record())
            assert got is None or right(got, acknowledged[other])
    assert faults.happened.total() > 50 and len(acknowledged) > 30
    failed = sum(n for kind, n in disk.counts.items() if "failed" in kind or "fault" in kind)
    assert failed + disk.counts["io_error"] + disk.counts["index"] > 0
    faults.rate = 0.0
    for spec in acknowledged.values():
        got = disk.get(spec.record())
        assert got is not None and right(got, spec), (spec, disk.counts)
    assert disk.put([Spec(1000, 0, 9).item()]) == [True]
    used = disk.folder.catalog.segments()
    files = {n: disk.folder.segments.size(n) for n in disk.folder.segments.numbers()}
    assert files == {n: use.end for n, use in used.items()}  # nothing leaks
    disk.close()


@pytest.mark.parametrize("seed", range(2))
def test_a_store_survives_a_tier_that_fails(tmp_path: Path, seed: int) -> None:
    import torch

    rng = np.random.default_rng(seed)
    disk = {"path": str(tmp_path / "kv"), "capacity": "16MiB", "rate": 0.3, "seed": seed}
    tiers = [{"name": "tests.store.faulty:FaultyDisk", **disk}]
    store = Store(LAYOUT, b"model", memory_bytes=40 * 256 * 3, tiers=tiers, patience_s=5.0)
    faulty = store.tiers[0]
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


class DiskMachine(RuleBasedStateMachine):
    """A disk tier against a dict, over restarts, crashes of the index and evictions."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory(prefix="lmc-machine-")
        self.known: dict[bytes, Spec] = {}
        self.disk = self.open()

    def open(self) -> Any:
        return opened(Path(self.folder.name) / "kv", 8 << 20)

    @initialize()
    def empty(self) -> None:
        assert len(self.disk.folder.catalog) == 0

    @rule(
        content=st.integers(0, 9),
        context=st.integers(0, 3),
        T=st.integers(1, 30),
        origin=st.sampled_from(["exact", "isolated", "anchored", "blended"]),
        tail=st.booleans(),
    )
    def put(self, content: int, context: int, T: int, origin: Any, tail: bool) -> None:
        from tests.store.disk.chunks import hold

        # One length a content, else its tokens would be another's; tails grow.
        spec = Spec(content, context, T if tail else 10 + content, origin, tail)
        held = spec.record().id in self.known
        assert self.disk.put([spec.item()]) == [not held and hold(self.known, spec)]

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        if self.known:
            id = data.draw(st.sampled_from(sorted(self.known)))
            self.disk.evict([self.known.pop(id).record()])

    @rule()
    def restart(self) -> None:
        self.disk.close()
        self.disk = self.open()
        assert self.disk.counts["index_rebuilt"] == 0

    @rule()
    def lose_the_index(self) -> None:
        self.disk.close()
        for path in (Path(self.folder.name) / "kv" / "index").iterdir():
            path.unlink()
        self.disk = self.open()

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        with self.disk.folder.writing():
            self.disk.room.compact_one(self.disk.folder.catalog.segments())

    @invariant()
    def holds_what_the_dict_holds(self) -> None:
        from tests.store.disk.chunks import held, leaked

        assert held(self.disk) == self.known
        for spec in self.known.values():
            got = self.disk.get(spec.record())
            assert got is not None and right(got, spec)
        assert leaked(self.disk) == 0

    def teardown(self) -> None:
        self.disk.close()
        self.folder.cleanup()


TestDisk = pytest.mark.heavy(DiskMachine.TestCase)
