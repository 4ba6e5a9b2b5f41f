"""kill -9 of a writer at a random moment, again and again; and in which order it calls the kernel.

A process that dies leaves what it wrote in the page cache. That acknowledged puts also outlive a
loss of power is shown by the order of system calls.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path

import pytest

from tests.store.disk.chunks import (
    Spec,
    empty,
    forked,
    held,
    hold,
    leaked,
    live_bytes,
    opened,
    put,
    random_spec,
    right,
    served,
)

ROOT = Path(__file__).parents[3]
SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Setting:
    """Of a folder and those who use it.

    Attributes:
        contents: of chunks; 40 fit with all their variants, 400 do not.
        reader: another process has the folder open, so that nobody makes the index again.
    """

    capacity: int
    contents: int
    compression: str
    reader: bool

    @property
    def roomy(self) -> bool:
        """Whether nothing must ever be evicted; space must be compacted all the same."""
        return self.contents == 40


SETTINGS = [
    Setting(8 << 20, 40, "none", reader=False),
    Setting(1 << 20, 400, "none", reader=False),
    Setting(8 << 20, 40, "zstd", reader=True),
    Setting(1 << 20, 400, "none", reader=True),
]


@dataclass
class Totals:
    """Of all rounds."""

    rounds: int = 0
    acknowledged: int = 0
    lost: int = 0
    torn: int = 0
    leaked: int = 0
    compacted: int = 0
    rebuilt: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"crash: {self.rounds} rounds, {self.acknowledged} acknowledged, {self.lost} lost, "
            f"{self.torn} torn, {self.leaked} leaked bytes"
        )


def write(folder: Path, setting: Setting, seed: int, pipe: int) -> None:
    """Say what is about to be put, put it, and say for each whether it is acknowledged."""
    rng = random.Random(seed)
    disk = opened(folder, setting.capacity, compression=setting.compression)
    while True:
        batch = [random_spec(rng, setting.contents) for _ in range(rng.randrange(1, 6))]
        os.write(pipe, json.dumps([astuple(spec) for spec in batch]).encode() + b"\n")
        done = [*disk.put([item for spec in batch for item in spec.items()])]
        told = [[done.pop(0) for _ in spec.items()] for spec in batch]
        # A chunk of two ranks is there with both, whoever was the second.
        acknowledged = ["stored" in each and not {*each} - {"stored", "known"} for each in told]
        os.write(pipe, json.dumps(acknowledged).encode() + b"\n")
        if any(acknowledged):
            disk.get(batch[0].record())


def reopen(folder: Path, setting: Setting) -> None:
    """Open the folder, which makes the index again, and wait for the end."""
    disk = opened(folder, setting.capacity)
    time.sleep(1)
    disk.close()


def read(folder: Path, setting: Setting, pipe: int) -> None:
    """Get whatever the folder has, all the time, and count what is wrong."""
    disk = opened(folder, setting.capacity)
    os.write(pipe, b"ready\n")
    wrong, stop = 0, False

    def told(signum: int, frame: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, told)
    while not stop:
        for spec in list(held(disk).values())[::7]:
            wrong += served(disk, spec) is False
        time.sleep(0.01)
    disk.close()
    os.write(pipe, b"%d\n" % wrong)


def killed(pid: int, out: int, after_s: float, acknowledged: bool) -> list[list]:
    """Kill a child some time after its start, or after what it was acknowledged first.

    Returns:
        All that it said whole.
    """
    heard, until = b"", time.monotonic() + 60
    while acknowledged and heard.count(b"\n") < 2 and time.monotonic() < until:
        if select.select([out], [], [], 1)[0]:
            heard += os.read(out, 1 << 16)
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    with open(out, "rb") as pipe:
        lines = (heard + pipe.read()).split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def missing(known: dict[bytes, Spec], in_flight: list[Spec], now: dict[bytes, Spec]) -> int:
    """How many records are not there: at least, over how many of those in flight may have been put.

    What is put may take another's place, the first part of it too.
    """
    least = len(known.keys() - now.keys())
    for spec in in_flight:
        new = hold(known, spec)
        least = min(least, len(known.keys() - now.keys()))
        if new and spec.kind == "ranks":
            least = min(least, len(known.keys() - now.keys() - {spec.record().id}))
    return least


def one_round(folder: Path, setting: Setting, rng: random.Random, totals: Totals) -> None:
    disk = opened(folder, setting.capacity)
    known = held(disk)
    disk.close()
    seed = rng.getrandbits(32)
    child = forked(lambda pipe: write(folder, setting, seed, pipe))
    said = killed(*child, rng.random() * 0.06, rng.random() < 0.7)
    if rng.random() < 0.3:
        again = forked(lambda pipe: reopen(folder, setting))
        killed(*again, rng.random() * 0.02, False)

    batches = [[Spec(*fields) for fields in batch] for batch in said[::2]]
    for batch, done in zip(batches, said[1::2], strict=False):
        for spec, acknowledged in zip(batch, done, strict=True):
            added = hold(known, spec)
            totals.acknowledged += acknowledged
            if setting.roomy and added != acknowledged:
                totals.faults.append(f"{spec}: {acknowledged}")
    in_flight = batches[-1] if len(said) % 2 else []

    disk = opened(folder, setting.capacity, compression=setting.compression)
    now = held(disk)
    if setting.roomy:
        totals.lost += missing(known, in_flight, now)
    for spec in now.values():
        totals.torn += served(disk, spec) is False
        into = empty(spec.forms())
        if disk.get(spec.record(), into) is None:
            totals.lost += 1
        else:
            totals.torn += not right(into, spec)
    if disk.size > setting.capacity:
        totals.faults.append(f"{disk.size} bytes in {setting.capacity}")
    totals.rebuilt += disk.counts["index_rebuilt"]

    new = Spec(1000 + totals.rounds, 0, 30)
    if not put(disk, new) or served(disk, new) is not True:
        totals.faults.append(f"{new}: not put, {disk.counts}")
    if live_bytes(disk) > disk.room.limit:
        totals.faults.append(f"{live_bytes(disk)} live bytes above the limit")
    totals.leaked += leaked(disk)
    totals.compacted += disk.counts["segments_compacted"]
    disk.evict([new.record()])
    disk.close()
    totals.rounds += 1


@contextlib.contextmanager
def reader(folder: Path, setting: Setting, totals: Totals) -> Iterator[None]:
    """Another process, that reads the folder from its first day."""
    pid, out = forked(lambda pipe: read(folder, setting, pipe))
    with open(out, "rb") as pipe:
        assert pipe.readline() == b"ready\n"
        try:
            yield
        finally:
            os.kill(pid, signal.SIGTERM)
            wrong = pipe.readline()
            status = os.waitpid(pid, 0)[1]
        if status != 0:
            totals.faults.append(f"the reader ended with status {status}")
        else:
            totals.torn += int(wrong)


@pytest.mark.parametrize("rounds", [20, pytest.param(500, marks=SLOW)])
def test_a_killed_writer_loses_and_tears_nothing(
    rounds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    totals, rng = Totals(), random.Random(rounds)
    each = max(5, rounds // 12)
    for first in range(0, rounds, each):
        setting = SETTINGS[first // each % len(SETTINGS)]
        folder = tmp_path / str(first)
        with reader(folder, setting, totals) if setting.reader else contextlib.nullcontext():
            for _ in range(first, min(rounds, first + each)):
                one_round(folder, setting, rng, totals)
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{totals}")
    assert totals.faults == []
    assert (totals.rounds, totals.lost, totals.torn, totals.leaked) == (rounds, 0, 0, 0)
    assert totals.acknowledged > rounds and totals.rebuilt > rounds / 4


TRACED = """
import os, sys
from pathlib import Path
from tests.store.disk.chunks import Spec, opened

disk = opened(Path(sys.argv[1]))
assert disk.put([Spec(int(sys.argv[2]), 0, 50).item()]) == ["stored"]
os.write(1, b"ACKNOWLEDGED")
disk.close()
"""


def traced(folder: Path, content: int) -> list[str]:
    """System calls of a process that puts one chunk, up to its word that it is acknowledged."""
    log = folder.parents[1] / "calls"
    calls = (
        "pwritev,pwritev2,pwrite64,write,fdatasync,fsync,openat,?mkdir,?mkdirat,?unlink,?unlinkat"
    )
    command = ["strace", "-f", "-y", "-o", str(log), "-e", f"trace={calls}"]
    command += [sys.executable, "-c", TRACED, str(folder), str(content)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    if "ptrace" in done.stderr.lower() and done.returncode != 0:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.stdout == "ACKNOWLEDGED", done.stderr
    lines = log.read_text().splitlines()
    acknowledged = next(i for i, line in enumerate(lines) if "ACKNOWLEDGED" in line)
    return [line for line in lines[:acknowledged] if str(folder.parents[1]) in line]


def at(calls: list[str], pattern: str) -> int:
    """Where the last call is that succeeded and matches."""
    places = [i for i, call in enumerate(calls) if re.search(pattern + r".*\) += \d", call)]
    assert places, f"no {pattern}"
    return places[-1]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_what_is_acknowledged_is_synced_before(tmp_path: Path) -> None:
    root = tmp_path / "new" / "store"
    segment, segments = f"<{root}/segments/00000001.seg>", f"<{root}/segments>"
    calls = traced(root, 1)
    assert at(calls, rf"pwritev2?\(\d+{segment}") < at(calls, rf"fdatasync\(\d+{segment}")
    # The name of every file and folder on the way to it is durable, too.
    created = at(calls, r'openat\(.*/segments>, "00000001.seg", .*O_CREAT')
    assert created < at(calls, rf"fsync\(\d+{segments}")
    assert at(calls, rf'mkdirat\(\d+<{root}>, "segments"') < at(calls, rf"fsync\(\d+<{root}>")
    assert at(calls, rf'mkdir.*"{root}"') < at(calls, rf"fsync\(\d+<{root.parent}>")
    assert at(calls, rf'mkdir.*"{root.parent}"') < at(calls, rf"fsync\(\d+<{tmp_path}>")

    calls = traced(root, 2)
    assert at(calls, rf"pwritev2?\(\d+{segment}") < at(calls, rf"fdatasync\(\d+{segment}")
    # The index of before this put must not be believed after a loss of power.
    assert at(calls, rf'unlinkat\(\d+<{root}/index>, "seal"') < at(
        calls, rf"fsync\(\d+<{root}/index>"
    )
