"""The disk tier against a dict, over restarts, crashes of the index, evictions; and as it fails."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.store.disk.chunks import (
    KINDS,
    Spec,
    after,
    find,
    held,
    hold,
    leaked,
    opened,
    put,
    served,
)
from tests.store.faulty import failing_disk


@pytest.mark.parametrize("seed", range(4))
def test_a_disk_that_fails_costs_misses_and_nothing_else(tmp_path: Path, seed: int) -> None:
    """Nothing is raised, nothing wrong is served, and what was acknowledged is there afterwards."""
    disk = opened(tmp_path / "kv", 1 << 24)
    faults = failing_disk(disk, 0.1, seed)
    rng = random.Random(seed)
    acknowledged: dict[int, Spec] = {}
    for i in range(150):
        spec = Spec(i, 0, 1 + i % 50)
        if disk.put([spec.item()]) == ["stored"]:
            acknowledged[i] = spec
        disk.contains([spec.record()])
        find(disk, spec.record())
        after(disk, spec.record())
        for other in rng.sample(sorted(acknowledged), min(3, len(acknowledged))):
            assert served(disk, acknowledged[other]) in (None, True)
    assert faults.happened.total() > 50 and len(acknowledged) > 30
    failed = sum(n for kind, n in disk.counts.items() if "failed" in kind or "fault" in kind)
    assert failed + disk.counts["io_error"] + disk.counts["index"] > 0
    faults.rate = 0.0
    for spec in acknowledged.values():
        assert served(disk, spec) is True, (spec, disk.counts)
    assert disk.put([Spec(1000, 0, 9).item()]) == ["stored"]
    used = disk.folder.catalog.segments()
    files = {n: disk.folder.segments.size(n) for n in disk.folder.segments.numbers()}
    assert files == {n: use.end for n, use in used.items()}  # nothing leaks
    disk.close()


class DiskMachine(RuleBasedStateMachine):
    """A disk tier against a dict, over restarts, crashes of the index and evictions."""

    def __init__(self) -> None:
        super().__init__()
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
        # One length a content, else its tokens would be another's; tails grow.
        kind = KINDS[content % len(KINDS)]
        spec = Spec(content, context, T if tail else 10 + content, origin, tail, kind=kind)
        known = spec.record().id in self.known
        assert put(self.disk, spec) == (not known and hold(self.known, spec))

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
        assert held(self.disk) == self.known
        for spec in self.known.values():
            assert served(self.disk, spec) is True
        assert leaked(self.disk) == 0

    def teardown(self) -> None:
        self.disk.close()
        self.folder.cleanup()


TestDisk = pytest.mark.heavy(DiskMachine.TestCase)
