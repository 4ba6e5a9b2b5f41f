"""Damage to LMDB's own pages while the index is open: it is noticed, and ends no process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.store.disk.chunks import Spec, opened

SEEDS = 6
HEAD = 64  # bytes of a page: its number, flags, bounds, and where entries are


def damaged(folder: Path, seed: int) -> None:
    """Flip bytes in the heads of pages of an open index, then use it for a while."""
    rng = random.Random(seed)
    specs = [Spec(i, i % 256, 4) for i in range(400)]
    disk = opened(folder, 8 << 20)
    for i in range(0, len(specs), 20):
        assert set(disk.put([spec.item() for spec in specs[i : i + 20]])) == {"stored"}
    fd = os.open(folder / "index" / "data.mdb", os.O_RDWR)
    pages = disk.folder.catalog.env.nbytes // 4096
    share = rng.choice([0.1, 0.3, 1.0])
    for page in range(2, pages):
        if rng.random() < share:
            at = 4096 * page + rng.randrange(HEAD)
            (byte,) = os.pread(fd, 1, at)
            os.pwrite(fd, bytes([byte ^ rng.randrange(1, 256)]), at)
    os.close(fd)
    end = time.monotonic() + 0.5
    new = len(specs)
    while time.monotonic() < end:
        some = [spec.record() for spec in rng.sample(specs, 20)]
        disk.lookup_many(some[0].namespace, [record.key for record in some], [], end + 1)
        for record in some:
            disk.get(record)
        disk.put([Spec(new + i, 0, 4).item() for i in range(5)])
        new += 5
    disk.close()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_process_ends(tmp_path: Path, seed: int) -> None:
    code = (
        "import pathlib, sys; from tests.store.disk.test_index_pages import damaged; "
        "damaged(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    )
    command = [sys.executable, "-X", "faulthandler", "-c", code, str(tmp_path / "kv"), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_reaches_far_behind_the_last_page_takes_no_space(tmp_path: Path) -> None:
    disk = opened(tmp_path / "kv", 8 << 20)
    index = (tmp_path / "kv" / "index" / "data.mdb").stat()
    assert index.st_size >= 1 << 30 and 512 * index.st_blocks < 1 << 20
    disk.close()
    assert (tmp_path / "kv" / "index" / "data.mdb").stat().st_size < 1 << 20
