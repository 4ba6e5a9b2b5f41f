"""Memory of other engines, read through NIXL: what is there, what is gone, what is overwritten."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.store.remote.keyed import Keyed
from lmc.store.remote.location import Location
from lmc.store.remote.nixl import NixlConfig
from lmc.store.remote.nixl_server import LASTS_S, UNIT, Memory
from lmc.store.remote.server import Key
from lmc.store.wire import part_id
from tests.store.disk.chunks import LAYOUT
from tests.store.remote.kept import CHURNED, SPECS, found, large, put, running, served
from tests.store.remote.servers import valkey

pytest.importorskip("nixl", reason="the extra [nixl]")


class Peer:
    """Another engine."""

    def __init__(self, url: str, prefix: str, capacity: int = 64 << 20) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.remote.peer", url, prefix, str(capacity)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def put(self, *numbers: int) -> list[str]:
        """What became of these chunks."""
        self.say(" ".join(map(str, numbers)))
        outcomes: list[str] = json.loads(self._answer())
        return outcomes

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def peer(url: str, prefix: Path, capacity: int = 64 << 20) -> Iterator[Peer]:
    made = Peer(url, str(prefix), capacity)
    try:
        yield made
    finally:
        made.kill()


@contextmanager
def opened(url: str, prefix: Path, **fields: object) -> Iterator[Keyed]:
    said = {"capacity": 64 << 20, "timeout_s": 5.0} | fields
    tier = NixlConfig(url, prefix=str(prefix), **said).open(LAYOUT)  # type: ignore[arg-type]
    try:
        yield tier
    finally:
        tier.close()


@pytest.mark.parametrize("transport", ["any", "tcp"])
def test_what_one_engine_has_another_reads(
    tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if transport != "any":
        monkeypatch.setenv("UCX_TLS", transport)
    url = valkey().url
    # Both are other processes than this one, whose UCX may have begun with other transports.
    with peer(url, tmp_path) as one, peer(url, tmp_path) as other:
        assert one.put(0, 1) == ["stored"] * 2
        assert other.put(1, 2) == ["known", "stored"]
        with opened(url, tmp_path) as tier:
            assert [found(tier, large(i)) for i in range(4)] == [True] * 3 + [False]
            assert [served(tier, large(i)) for i in range(3)] == [True] * 3
            assert put(tier, large(2), large(3)) == ["known", "stored"]
            assert served(tier, large(3)) and not tier.counts["faults:damaged"]
        # Who leaves says so.
        assert other.put(3) == ["stored"]


def test_one_that_is_gone_is_done_without(tmp_path: Path) -> None:
    url = valkey().url
    with opened(url, tmp_path) as tier:
        with peer(url, tmp_path) as one:
            assert one.put(0, 1) == ["stored"] * 2
            assert served(tier, large(0))
            one.kill()
            begun = time.monotonic()
            # It is believed to be there for a while; what is asked of it is a miss soon.
            assert not served(tier, large(1))
            assert time.monotonic() - begun < 5
            assert set(tier.counts) <= {"faults:connection", "faults:gone", "not_all_there"}
        until = time.monotonic() + LASTS_S + 5
        while found(tier, large(0)):
            assert time.monotonic() < until
            time.sleep(0.2)
        with peer(url, tmp_path) as again:  # started anew, it is another one
            assert again.put(0) == ["stored"]
            assert served(tier, large(0)) and not served(tier, large(1))


def test_one_that_stands_still_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    url = valkey().url
    with peer(url, tmp_path) as one, opened(url, tmp_path, timeout_s=0.5) as tier:
        assert one.put(0, 1, 2, 3) == ["stored"] * 4
        assert served(tier, large(0))
        one.process.send_signal(signal.SIGSTOP)
        for i in (1, 2):
            begun = time.monotonic()
            served(tier, large(i))  # over shared memory it comes all the same; never wrong
            assert time.monotonic() - begun < 5
        one.process.send_signal(signal.SIGCONT)
        until = time.monotonic() + 20
        while not served(tier, large(3)):
            assert time.monotonic() < until
            time.sleep(0.2)


def test_what_is_overwritten_while_it_is_read_is_a_miss(tmp_path: Path) -> None:
    url = valkey().url
    # Room for two of six, which are put in turn all the time.
    with peer(url, tmp_path, 12 << 20) as one, opened(url, tmp_path) as tier:
        one.say("churn")
        hits = tries = 0
        until = time.monotonic() + 4
        while time.monotonic() < until or not hits:
            assert time.monotonic() < until + 20
            hits += served(tier, large(tries % CHURNED))  # asserts that it is right
            tries += 1
        assert 0 < hits < tries
        kinds = {"missing", "not_all_there", "faults:damaged"}
        assert {kind for kind in tier.counts if kind != "known"} <= kinds


def test_of_too_much_the_oldest_goes(tmp_path: Path) -> None:
    with opened(valkey().url, tmp_path, capacity=12 << 20) as tier:
        assert put(tier, *(large(i) for i in range(4))) == ["stored"] * 4
        assert [served(tier, large(i)) for i in range(4)] == [False, False, True, True]
        assert not found(tier, large(0)) and found(tier, large(3))
    with opened(valkey().url, tmp_path / "small", capacity=1 << 20) as tier:
        assert put(tier, large(0), SPECS[0]) == ["full", "stored"]
        assert served(tier, SPECS[0]) and not found(tier, large(0))


def test_a_directory_that_is_gone_is_done_without(tmp_path: Path) -> None:
    with running() as server, opened(server.url, tmp_path, timeout_s=0.3) as tier:
        assert put(tier, SPECS[0]) == ["stored"]
        server.kill()
        assert put(tier, SPECS[1]) == ["failed"]
        assert not found(tier, SPECS[0]) and not served(tier, SPECS[0])
        server.start()  # it has forgotten all; who puts tells of it again
        assert put(tier, SPECS[0], SPECS[1]) == ["stored"] * 2
        assert served(tier, SPECS[0]) and served(tier, SPECS[1])


def test_what_a_directory_tells_is_not_believed(tmp_path: Path) -> None:
    server = valkey()
    with peer(server.url, tmp_path) as one, opened(server.url, tmp_path) as tier:
        assert one.put(0) == ["stored"]
        assert found(tier, large(0))
        directory = tier._server._directory  # type: ignore[attr-defined]
        part = Key("part", part_id(large(0).record().id, large(0).forms()))
        where = Location.unpacked(directory.entries([part])[0])
        start, end = where.runs[0]
        lies = [
            where._replace(runs=((start + UNIT, end + UNIT),)),  # another place there
            where._replace(runs=((start + (1 << 40), end + (1 << 40)),)),  # not its memory at all
            where._replace(runs=((start, start + 100),)),
            where._replace(agent=bytes(8)),
        ]
        for data in (
            *(lie.packed() for lie in lies),
            b"",
            b"LMCN",
            b"\0" * 64,
            where.packed()[:-1],
        ):
            directory._made.set(directory._name(part), data)
            assert not served(tier, large(0)), data
        assert one.put(0) == ["stored"]
        assert served(tier, large(0))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5 * UNIT)), max_size=40))
def test_memory_has_what_was_put_last_and_never_two_in_one_place(
    puts: list[tuple[int, int]],
) -> None:
    memory = Memory(16 * UNIT)
    held: dict[Key, tuple[int, list[tuple[int, int]]]] = {}
    for n, (content, nbytes) in enumerate(puts):
        part = Key("part", bytes([content]))
        gone = memory.outgoing(part, nbytes)
        assert gone is not None and len(gone) == len(set(gone)) and set(gone) <= set(held)
        for other in gone:
            memory.drop(other)
            del held[other]
        assert part not in held
        held[part] = (n, memory.put(part, memoryview(bytes([n]) * nbytes)))
        taken = sorted(run for _, runs in held.values() for run in runs)
        assert all(a[1] <= b[0] for a, b in pairwise(taken))
        assert all((memory.buffer[runs[0][0]] == n).all() for n, runs in held.values())
    assert memory.outgoing(Key("part", b"x"), 17 * UNIT) is None


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 99)), min_size=1, max_size=9))
def test_a_location_is_read_as_it_was_written(runs: list[tuple[int, int]]) -> None:
    where = Location(bytes(range(8)), tuple((start, start + n) for start, n in runs))
    assert Location.unpacked(where.packed()) == where
    whole = [a for start, end in where.runs for a in range(start, end)]
    for start in range(0, where.nbytes, 7):
        for end in range(start + 1, where.nbytes + 1, 13):
            some = where.some(start, end)
            assert [a for first, last in some for a in range(first, last)] == whole[start:end]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"directory": "http://x"}, "url: want one that begins with"),
        ({"capacity": 100}, "capacity: got 100, want at least 4096 bytes"),
        ({"timeout_s": 0}, "timeout_s: got 0, want more than 0"),
        ({"compression": "zip"}, "zip"),
    ],
)
def test_wrong_settings_are_told(fields: dict[str, object], wrong: str) -> None:
    said = {"directory": "redis://127.0.0.1:1", "capacity": 1 << 20} | fields
    with pytest.raises(ValueError, match=wrong):
        NixlConfig(**said)  # type: ignore[arg-type]
