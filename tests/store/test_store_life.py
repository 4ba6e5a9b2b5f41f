"""The store as a library, closed, dropped, forked, shared by threads and left open at the end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lmc.store.disk.tier import Disk
from lmc.store.store import Store
from tests.store.library import LAYOUT, SPANS, TOKENS, kv, store


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("lmc-")]


def test_it_may_be_closed_again_used_afterwards_or_dropped(tmp_path: Path) -> None:
    before = threads()
    s = store(tmp_path / "kv")
    s.save(TOKENS, kv(1, 400), SPANS)
    found = s.lookup(TOKENS, SPANS)
    s.close()
    start = time.monotonic()
    s.close()
    assert time.monotonic() - start < 5
    assert s.retrieve_many(found) == [None] * 3 and s.save(TOKENS + 1, kv(1, 400), SPANS) == 0
    assert s.drain() is not None and s.lookup(TOKENS + 1, SPANS) == []
    again = store(tmp_path / "kv")
    again.save(TOKENS + 5, kv(2, 400), SPANS)
    del again
    gc.collect()
    assert set(threads()) <= set(before)
    with store(tmp_path / "kv") as s:
        assert len(s.lookup(TOKENS, SPANS)) == len(s.lookup(TOKENS + 5, SPANS)) == 3
        assert s.tiers[0].counts["index_rebuilt"] == 0


LEFT = """
import sys, threading, atexit
import numpy as np, torch
from lmc.model.layout import KVLayout
from lmc.store.store import Store
from lmc.store.tier import Progress
layout = KVLayout(4, 4, 64, "float32")
s = Store(layout, b"n", memory_bytes=64 << 20, chunker={"name": "fixed", "n": 64},
          tiers=[{"name": "disk", "path": sys.argv[1], "capacity": "1GiB"}])
if sys.argv[2] == "atexit":
    atexit.register(s.close)
assert s.save(np.arange(64 * 24), torch.ones(layout.shape(64 * 24))) == 24
if sys.argv[2] == "thread":
    threading.Thread(target=s.close).start()
if sys.argv[2] == "raise":
    raise KeyError("a notebook's cell")
"""


@pytest.mark.parametrize("how", ["left", "atexit", "thread", "raise"])
def test_what_waits_to_be_written_is_there_after_the_interpreters_end(
    tmp_path: Path, how: str
) -> None:
    command = [sys.executable, "-c", LEFT, str(tmp_path / "kv"), how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == (how == "raise"), ended.stderr
    assert "Exception ignored" not in ended.stderr and "lmc-" not in ended.stderr
    disk = Disk(tmp_path / "kv", 1 << 30)
    assert len(disk.folder.catalog) == 24 and disk.counts["index_rebuilt"] == 0
    disk.close()


def test_threads_may_share_it(tmp_path: Path) -> None:
    faults: list[str] = []
    with store(tmp_path / "kv", memory_bytes=900 * LAYOUT.bytes_per_token) as s:
        until = time.monotonic() + 2.0

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                while time.monotonic() < until:
                    i = int(rng.integers(8))
                    tokens, spans = TOKENS + i, [(0, 200), (200, 400)]
                    if rng.random() < 0.3:
                        s.save(tokens, kv(i, 400), spans)
                    elif rng.random() < 0.3:
                        s.prefetch(tokens, spans)
                    else:
                        found = s.lookup(tokens, spans)
                        for f, got in zip(found, s.retrieve_many(found), strict=True):
                            if got is not None and not torch.equal(
                                got, kv(i, 400)[:, :, f.start : f.end]
                            ):
                                faults.append(f"{i} is another")
            except Exception as e:
                faults.append(repr(e))

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert faults == []
        assert s.save(TOKENS + 100, kv(100, 400), SPANS) == 3  # nothing is held


@pytest.mark.parametrize("end", ["exit", "close", "os._exit"])
def test_a_child_of_a_fork_has_an_empty_one_and_ends(tmp_path: Path, end: str) -> None:
    """Whatever threads of its parent were about, and though it has none of them."""
    with store(tmp_path / "kv") as s:
        s.save(TOKENS, kv(1, 400), SPANS)
        found, stop = s.lookup(TOKENS, SPANS), threading.Event()

        def busy() -> None:
            while not stop.is_set():
                s.retrieve_many(s.lookup(TOKENS, SPANS))
                s.save(TOKENS[:100] + 1, kv(2, 100))

        workers = [threading.Thread(target=busy) for _ in range(3)]
        for worker in workers:
            worker.start()
        children = []
        for _ in range(12):
            if (child := os.fork()) == 0:
                right = s.lookup(TOKENS, SPANS) == [] and s.retrieve_many(found) == [None] * 3
                right &= s.save(TOKENS + 2, kv(3, 400)) == 0 and bool(s.drain())
                s.prefetch(TOKENS)
                s.close() if end == "close" else None
                if end == "exit":
                    s._close()  # as the interpreter does
                os._exit(not right)
            children.append(child)
        until = time.monotonic() + 60
        while children and time.monotonic() < until:
            done, status = os.waitpid(-1, os.WNOHANG)
            if done in children:
                assert status == 0
                children.remove(done)
            time.sleep(0.01)
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)
        stop.set()
        for worker in workers:
            worker.join()
        assert not children
        assert s.retrieve(found[0]) is not None


def test_it_may_be_closed_while_others_use_it(tmp_path: Path) -> None:
    faults: list[str] = []
    for _ in range(5):
        s, stop = store(tmp_path / "kv"), threading.Event()

        def work(s: Store = s, stop: threading.Event = stop) -> None:
            i = 0
            try:
                while not stop.is_set():
                    i += 1
                    s.save(TOKENS + i, kv(i % 5, 400), SPANS)
                    s.retrieve_many(s.lookup(TOKENS + i, SPANS))
            except Exception as e:
                faults.append(repr(e))

        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        time.sleep(0.05)
        s.close()
        time.sleep(0.02)
        stop.set()
        for worker in workers:
            worker.join()
    assert faults == []
