"""The recorder: files, their limits and modes, what is in a line, and faults of the disk."""

from __future__ import annotations

import json
import os
import resource
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmc.chunking.pieces import Piece
from lmc.connectors.vllm.config import Trace, load_config
from lmc.connectors.vllm.recorder import QUEUED_TOKENS, Entry, Recorder
from lmc.sim.readers import read

NS = b"n" * 32
RNG = np.random.default_rng(0)


def text(T: int) -> np.ndarray:
    return RNG.integers(0, 50_000, T)


def entry(*parts: np.ndarray, tenant: str = "", **line: Any) -> Entry:
    ends = np.cumsum([len(part) for part in parts]).tolist()
    pieces = [Piece(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    tokens = np.concatenate(parts)
    line = {"time": 1.5, "request": "r", "prompt_tokens": len(tokens), "output_tokens": 3} | line
    return Entry(line, NS + tenant.encode(), tenant, tokens, pieces)


def recorded(folder: Path, *entries: Entry, **config: Any) -> Recorder:
    """A recorder that has written these, and is closed."""
    recorder = Recorder(Trace(path=str(folder), **config))
    for one in entries:
        recorder.put(one)
    recorder.close()
    return recorder


def lines(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("trace-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


A, B, C = text(20), text(30), text(25)


def test_equal_texts_have_equal_hashes_also_after_a_restart(tmp_path: Path) -> None:
    recorded(tmp_path / "t", entry(A, B), entry(B, C))
    recorded(tmp_path / "t", entry(C, A), entry(A, B, tenant="x"))
    recorded(tmp_path / "other", entry(A, B))
    one, two, three, tenant = (line["chunks"] for line in lines(tmp_path / "t"))
    assert [n for _, n in one] == [20, 30]
    assert one[1] == two[0] and two[1] == three[0] and three[1] == one[0]
    # Of another tenant, and in another folder, nothing is the same.
    elsewhere = lines(tmp_path / "other")[0]["chunks"]
    hashes = [{h for h, _ in chunks} for chunks in (one, tenant, elsewhere)]
    assert not hashes[0] & hashes[1] and not hashes[0] & hashes[2]


def test_no_text_leaves(tmp_path: Path) -> None:
    recorded(tmp_path, entry(A, B, tenant="the tenant"))
    (file,) = tmp_path.glob("trace-*.jsonl")
    written = file.read_text()
    assert "tokens" not in json.loads(written).keys() - {"prompt_tokens", "output_tokens"}
    assert "the tenant" not in written and f"{A[0]},{A[1]}" not in written
    for path in (file, tmp_path / "salt"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / "salt").read_bytes().hex() not in written


def test_token_ids_where_they_are_asked_for(tmp_path: Path) -> None:
    recorded(tmp_path, entry(A, B), tokens="ids")
    (line,) = lines(tmp_path)
    assert line["tokens"] == [*A.tolist(), *B.tolist()] and "chunks" not in line


@pytest.mark.parametrize("tokens", ["hashes", "ids"])
def test_the_simulator_reads_what_was_recorded(tmp_path: Path, tokens: Any) -> None:
    left_alone = {"time": 3.0, "request": "p", "prompt_tokens": 9, "reason": "disabled"}
    plain = Entry(left_alone, b"", "", None, [])
    recorded(tmp_path, entry(A, B), entry(A, C), plain, entry(A, B, tenant="x"), tokens=tokens)
    reading = read(tmp_path, strict=True)
    first, second, other = list(reading)
    assert reading.format == "lmc"
    assert [r.input_tokens for r in (first, second, other)] == [50, 45, 50]
    assert (first.tokens[:20] == second.tokens[:20]).all()
    assert not (first.tokens[20:45] == second.tokens[20:]).any()
    assert not (first.tokens == other.tokens).any()
    assert first.session == second.session == "" != other.session


def test_files_are_rotated_and_the_oldest_are_removed(tmp_path: Path) -> None:
    entries = [entry(A, number=i) for i in range(40)]
    recorder = recorded(tmp_path, *entries, max_bytes=1000, files=3)
    files = sorted(tmp_path.glob("trace-*.jsonl"))
    assert len(files) == 3 and all(file.stat().st_size <= 1000 for file in files)
    kept = [line["number"] for line in lines(tmp_path)]
    assert kept == list(range(kept[0], 40)) and len(kept) > 6
    assert recorder.counts == {"lines_written": 40}


def test_what_another_engine_writes_to_is_not_removed(tmp_path: Path) -> None:
    other = Recorder(Trace(path=str(tmp_path)))
    other.put(entry(A, number=-1))
    while not other.counts["lines_written"]:
        time.sleep(0.001)
    recorded(tmp_path, *(entry(A, number=i) for i in range(40)), max_bytes=1000, files=2)
    assert lines(tmp_path)[0]["number"] == -1
    other.put(entry(A, number=-2))
    other.close()
    assert [line["number"] for line in lines(tmp_path)][:2] == [-1, -2]


def test_a_line_that_no_file_has_room_for_is_dropped(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, entry(A), entry(A, more="x" * 2000), entry(A), max_bytes=1000)
    assert recorder.counts == {"lines_written": 2, "lines_dropped": 1}


def test_a_file_that_was_removed_is_not_written_to(tmp_path: Path) -> None:
    recorder = Recorder(Trace(path=str(tmp_path)))
    recorder.put(entry(A, number=0))
    while not recorder.counts["lines_written"]:
        time.sleep(0.001)
    (file,) = tmp_path.glob("trace-*.jsonl")
    file.unlink()
    recorder.put(entry(A, number=1))
    recorder.close()
    assert [line["number"] for line in lines(tmp_path)] == [1]


@contextmanager
def full(nbytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: the kernel refuses, as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_faults_of_the_disk_are_counted_and_no_line_is_torn(tmp_path: Path) -> None:
    recorder = Recorder(Trace(path=str(tmp_path)))
    with full(1000):
        for i in range(20):
            recorder.put(entry(A, number=i))
        while sum(recorder.counts.values()) < 20:
            time.sleep(0.001)
    recorder.put(entry(A, number=20))
    recorder.close()
    kept = [line["number"] for line in lines(tmp_path)]
    assert kept[0] == 0 and kept[-1] == 20
    assert recorder.counts["lines_failed"] == 21 - len(kept) > 5


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    recorder = Recorder(Trace(path=str(tmp_path)))
    long = np.zeros(QUEUED_TOKENS // 2, np.int64)
    with recorder._changed:  # its thread stands still
        for _ in range(5):
            recorder.put(entry(long))
    recorder.close()
    assert recorder.counts["lines_dropped"] >= 2
    assert sum(recorder.counts.values()) == 5


@pytest.mark.parametrize("wrong", ["link", "file", "others", "salt", "salt_link"])
def test_a_folder_that_cannot_be_trusted_stops_the_start(tmp_path: Path, wrong: str) -> None:
    folder, elsewhere = tmp_path / "t", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if wrong == "link":
        folder.symlink_to(elsewhere)
    elif wrong == "file":
        folder.write_text("")
    else:
        folder.mkdir()
    if wrong == "others":
        folder.chmod(0o777)
    if wrong == "salt":
        (folder / "salt").write_text("x")
    if wrong == "salt_link":
        (elsewhere / "salt").write_bytes(b"x" * 32)
        (folder / "salt").symlink_to(elsewhere / "salt")
    with pytest.raises((ValueError, OSError)):
        Recorder(Trace(path=str(folder)))
    assert [path.name for path in elsewhere.iterdir()] == (["salt"] if wrong == "salt_link" else [])
    assert not os.path.exists(folder / "trace")


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ({}, "path"),
        ({"path": ""}, "path"),
        ({"path": "t", "files": 0}, "files"),
        ({"path": "t", "max_bytes": "much"}, "max_bytes.*number such as"),
        ({"path": "t", "tokens": "text"}, "tokens"),
        ({"path": "t", "size": 1}, "size"),
    ],
)
def test_wrong_settings_are_named(trace: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"lmc config: trace.*{message}"):
        load_config({"lmc": {"trace": trace}})
    assert load_config({"lmc": {"trace": {"path": "t"}}}).trace == Trace(path="t")
