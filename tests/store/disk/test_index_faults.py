"""Every call that the index and the files make fails once: nothing is lost, and puts go on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import pytest

from lmc.store.disk import env as lmdb_env
from lmc.store.disk import sums
from lmc.store.disk.header import HeaderError
from tests.store.disk.chunks import Spec, find, leaked, opened, served

SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]
CAPACITY = 4 << 20
BEFORE = [Spec(i, 0, 40) for i in range(6)]

# Of the kernel, by what a disk may say; fcntl.flock is one of them.
CALLS = (
    "open", "pread", "preadv", "pwrite", "pwritev", "fsync", "fdatasync", "ftruncate", "rename",
    "unlink", "mkdir", "stat", "fstat", "write", "posix_fallocate", "flock",
)  # fmt: skip
ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EMFILE, errno.ENOLCK)
# Of LMDB, as it would raise them: where a transaction begins, is written to, and ends.
POINTS = ("begin", "put", "pop", "commit")
FAULTS: tuple[Callable[[], Exception], ...] = (
    lambda: lmdb.PanicError("injected"),
    lambda: lmdb.CorruptedError("injected"),
    lambda: lmdb.Error("injected", errno.EIO),
    lambda: lmdb.PageNotFoundError("injected"),
    lambda: lmdb.MapFullError("injected"),
    lambda: lmdb.DiskError("injected"),
    lambda: lmdb.ReadersFullError("injected"),
    lambda: HeaderError("injected"),
    lambda: struct.error("injected"),
)


@dataclass
class Fault:
    """One call that fails, once: the `when`th of its kind."""

    when: int
    fault: Callable[[], Exception]
    seen: int = 0

    def wrap(self, owner: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        call = getattr(owner, name)

        def failing(*arguments: Any, **options: Any) -> Any:
            self.seen += 1
            if self.seen == self.when:
                raise self.fault()
            return call(*arguments, **options)

        patch.setattr(owner, name, failing)

    @property
    def injected(self) -> bool:
        return self.seen >= self.when


def install(kind: str, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    """Have the calls of one kind fail."""
    if kind == "begin":
        fault.wrap(lmdb_env._Transaction, "__enter__", patch)
    elif kind in POINTS:
        fault.wrap(sums.Summed, kind, patch)
    else:
        fault.wrap(fcntl if kind == "flock" else os, kind, patch)


@dataclass
class Totals:
    injected: int = 0
    wrong: int = 0
    lost: int = 0
    healed: int = 0
    refused: int = 0
    closing: int = 0
    acknowledged: int = 0

    def __str__(self) -> str:
        return (
            f"index faults: {self.injected} injected, {self.wrong} wrong, {self.lost} acknowledged "
            f"lost, healed {self.healed} ({self.acknowledged} acknowledged; of the faults "
            f"{self.refused} kept the folder from being opened, {self.closing} came at its end)"
        )


@contextlib.contextmanager
def injected(kind: str, fault: Fault) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        install(kind, fault, patch)
        yield


def one_case(kind: str, fault: Fault, root: Path, totals: Totals) -> bool:
    """A life of a folder with one fault in it; False where the fault never came."""
    acknowledged, evicted = list(BEFORE), 0
    with injected(kind, fault):
        try:
            disk = opened(root, CAPACITY)
        except OSError:  # it says so, and the folder is as it was
            assert fault.injected
            totals.refused += 1
        else:
            for batch in range(3):
                specs = [Spec(100 + 2 * batch + i, 0, 40) for i in range(2)]
                done = disk.put([spec.item() for spec in specs])
                acknowledged += [
                    spec for spec, put in zip(specs, done, strict=True) if put == "stored"
                ]
                for spec in acknowledged[-3:]:
                    totals.wrong += served(disk, spec) is False
                record = BEFORE[batch].record()
                find(disk, record)
                disk.contains([spec.record() for spec in BEFORE])
            if fault.injected:
                again = Spec(900, 0, 40)
                disk.folder.settle(10.0)
                healed = disk.put([again.item()]) == ["stored"] and served(disk, again) is True
                totals.healed += healed
                assert healed, (kind, fault.when, disk.counts)
                acknowledged.append(again)
                disk.close()
            else:
                disk.close()
                totals.closing += fault.injected
            # A disk that says that it is full is given a file back, with what is in it.
            evicted = disk.counts["evicted"]
    disk = opened(root, CAPACITY)
    there = [served(disk, spec) for spec in acknowledged]
    totals.wrong += there.count(False)
    lost = there.count(None) - evicted
    totals.lost += max(0, lost)
    totals.acknowledged += len(acknowledged)
    assert leaked(disk) == 0
    assert disk.put([Spec(901, 0, 40).item()]) == ["stored"]
    disk.close()
    totals.injected += fault.injected
    return fault.injected


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Exception]]]:
    for call in CALLS:
        for number in ERRORS[:1] if quick else ERRORS:
            if number == errno.ENOSPC and call in ("pwritev", "fdatasync"):
                continue  # of which a whole segment may go: test_faults.py
            if number == errno.EDQUOT and call in ("pwritev", "fdatasync"):
                continue
            yield call, lambda number=number: OSError(number, os.strerror(number))  # type: ignore
    for point in POINTS:
        for fault in FAULTS[::3] if quick else FAULTS:
            if isinstance(fault(), lmdb.DiskError):
                continue
            yield point, fault


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine") / "kv"
    disk = opened(root, CAPACITY)
    assert disk.put([spec.item() for spec in BEFORE]) == ["stored"] * len(BEFORE)
    disk.close()
    return root


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=SLOW)])
def test_a_fault_of_the_index_heals(
    quick: bool, pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    totals = Totals()
    for kind, fault in cases(quick):
        for when in (2, 9, 30) if quick else range(1, 60):
            root = tmp_path / "kv"
            shutil.copytree(pristine, root)
            if not when % 2:  # as after a crash
                (root / "index" / "seal").unlink()
            came = one_case(kind, Fault(when, fault), root, totals)
            shutil.rmtree(root)
            if not came:
                break
    with capsys.disabled():
        print(f"\n{totals}")
    assert (totals.wrong, totals.lost) == (0, 0)
    assert totals.injected > (30 if quick else 1000) and totals.healed > totals.injected / 3
    assert totals.injected == totals.healed + totals.refused + totals.closing
