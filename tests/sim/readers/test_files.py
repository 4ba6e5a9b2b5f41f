"""Files as they come: however they are packed, piped or cut; and units that are told from lines."""

from __future__ import annotations

import gzip
import lzma
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lmc.sim.readers import files, read
from tests.sim.readers.lines import PACK, file_of, mooncake, opened, times

LINES = file_of("mooncake")
HALVES = LINES[: len(LINES) // 2], LINES[len(LINES) // 2 :]
SKIPPED = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"


def wide(data: bytes, window_log: int) -> bytes:
    """As `zstd --long=WINDOW_LOG` writes it."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=window_log, enable_ldm=True
    )
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


zst = PACK[".zst"]


@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress(HALVES[0]) + gzip.compress(HALVES[1]),
        gzip.compress(LINES) + bytes(1000),
        lzma.compress(HALVES[0]) + lzma.compress(HALVES[1]),
        lzma.compress(LINES) + bytes(1000),
        zst(HALVES[0]) + zst(HALVES[1]),
        SKIPPED + zst(LINES),  # as pzstd begins
        zst(HALVES[0]) + SKIPPED + zst(HALVES[1]),
        zst(LINES) + SKIPPED,
        wide(LINES, 28),
        wide(LINES, 31),
        b"\xef\xbb\xbf" + LINES,
        gzip.compress(b"\xef\xbb\xbf" + LINES),
    ],
    ids=["gzip members", "gzip padded", "xz streams", "xz padded", "zstd frames", "skipped first",
         "skipped between", "skipped last", "window 28", "window 31", "mark", "mark in gzip"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.bin"])
def test_what_is_whole_is_read_whole(packed: bytes, name: str, tmp_path: Path) -> None:
    reading = opened(tmp_path, packed, name)
    assert times(reading) == [0, 1, 2, 3]
    assert reading.bad_count == 0


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".bz2"])
@pytest.mark.parametrize("behind", [b"x", b"garbage", bytes(9) + b"x", b"\x1f", b"{}\n" * 50_000])
@pytest.mark.parametrize("line_end", [b"\n", b""])
def test_what_stands_behind_is_told_and_loses_nothing(
    suffix: str, behind: bytes, line_end: bytes, tmp_path: Path
) -> None:
    packed = PACK[suffix](LINES.rstrip(b"\n") + line_end)
    reading = opened(tmp_path, packed + behind)
    assert times(reading) == [0, 1, 2, 3]
    (bad,) = reading.bad
    assert "bytes behind the end of what is compressed" in bad.reason
    with pytest.raises(ValueError, match="behind the end"):
        list(opened(tmp_path, packed + behind, strict=True))


def test_damage_costs_nothing_of_what_is_in_front_of_it(tmp_path: Path) -> None:
    """A second frame that is none, in each packing that tells frames by their first bytes."""
    for suffix, frame in ((".bz2", b"BZh9 no frame"), (".zst", b"\x28\xb5\x2f\xfd no frame")):
        reading = opened(tmp_path, PACK[suffix](LINES) + frame, "t" + suffix)
        assert times(reading) == [0, 1, 2, 3], suffix
        (bad,) = reading.bad
        assert bad.line == 5 and "cannot be read on" in bad.reason


@pytest.mark.parametrize("suffix", [".xz", ".bz2"])
def test_a_few_bytes_that_become_many_come_in_parts(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / ("t" + suffix)
    file.write_bytes(PACK[suffix](bytes(1 << 26)))
    parts = []
    with files.opened(file) as stream:
        while stream.read(1 << 16):
            parts.append(len(stream.raw._ready))  # type: ignore[attr-defined]
    assert max(parts) < files.UNPACKED


def test_a_folder_reads_on_behind_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    damaged = bytearray(zst(LINES))
    damaged[12] ^= 0xFF
    (tmp_path / "b.jsonl.zst").write_bytes(damaged)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(LINES)[:-9])
    (tmp_path / "d.jsonl.zst").write_bytes(wide(LINES, 30))
    reading = read(tmp_path, "mooncake")
    assert len(list(reading)) >= 8
    assert {bad.file for bad in reading.bad} == {"b.jsonl.zst", "c.jsonl.gz"}


@pytest.mark.parametrize("suffix", PACK)
def test_a_pipe_is_read_as_often_as_one_likes(suffix: str, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def write() -> None:
        fifo.write_bytes(PACK[suffix](LINES))

    threading.Thread(target=write, daemon=True).start()
    reading = read(fifo)
    assert times(reading) == times(reading) == [0, 1, 2, 3]


@pytest.mark.parametrize("how", ["-", "/dev/stdin", "<(...)"])
def test_a_shell_gives_a_trace_in_any_way(how: str, tmp_path: Path) -> None:
    (tmp_path / "t.gz").write_bytes(gzip.compress(LINES))
    lmc = f"{sys.executable} -c 'from lmc.cli.app import app; app()' trace info --json"
    unpack = "gunzip -c t.gz"
    line = f"{lmc} <({unpack})" if how == "<(...)" else f"{unpack} | {lmc} {how}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"requests": 4' in done.stdout


def rows(n: int, step: float, tokens: int = 600, ids: Any = None) -> str:
    made = range(n)
    return "".join(mooncake(0, tokens, ids or (1, i + 2), timestamp=i * step) + "\n" for i in made)


@pytest.mark.parametrize(
    ("text", "seconds", "unit"),
    [
        (rows(4, 1000), 3.0, "ms"),
        (rows(4, 0.25), 0.75, "s"),  # no millisecond has fractions
        (rows(2000, 1), 1.999, "ms"),  # at the limit, so that nothing is assumed
        ("".join(mooncake(i // 20) + "\n" for i in range(2000)), 99.0, "s"),
        (rows(4, 0), 0.0, "ms"),
        (rows(4, 2000.5), 6.0015, "ms"),  # a request in half an hour is none of a trace
    ],
    ids=["milliseconds", "fractions", "at the limit", "crowded", "at once", "fractions of ms"],
)
def test_seconds_and_milliseconds_are_told_apart(
    text: str, seconds: float, unit: str, tmp_path: Path
) -> None:
    reading = opened(tmp_path, text)
    requests = list(reading)
    assert requests[-1].timestamp - requests[0].timestamp == seconds
    assert reading.assumed == ("timestamps in seconds" if unit == "s" else "")
    said = list(opened(tmp_path, text, format=f"mooncake:time={'s' if unit == 'ms' else 'ms'}"))
    factor = 1000 if unit == "ms" else 0.001
    assert said[-1].timestamp == pytest.approx(requests[-1].timestamp * factor)


@pytest.mark.parametrize("size", [1, 16, 17, 64, 128, 512, 1000, 1024])
@pytest.mark.parametrize("partial", [True, False])
def test_blocks_of_any_size_are_told(size: int, partial: bool, tmp_path: Path) -> None:
    lengths = [size * 5 + size // 2, size * 9, size * 2 + size - 1, size * 40 + 1]
    text = ""
    for i, tokens in enumerate(lengths):
        n = -(-tokens // size) if partial else tokens // size
        text += mooncake(1000 * i, tokens, range(n)) + "\n"
    reading = opened(tmp_path, text)
    requests = list(reading)
    assert reading.bad_count == 0 and len(requests) == 4
    told = {r.block_tokens for r in requests}
    assert len(told) == 1
    # Where ids stand for whole blocks alone, sizes near the right one fit as well.
    assert told == {size} if partial else 0.9 * size <= told.pop() <= 1.1 * size
    exact = list(opened(tmp_path, text, format=f"mooncake:block_tokens={size}"))
    assert {r.block_tokens for r in exact} == {size}


def test_one_id_says_little(tmp_path: Path) -> None:
    text = "".join(mooncake(1000 * i, 600, [i]) + "\n" for i in range(6))
    text += "".join(mooncake(6000 + i, 4096, range(4)) + "\n" for i in range(4))
    reading = opened(tmp_path, text)
    assert {r.block_tokens for r in reading} == {1024}
    assert (reading.bad_count, reading.assumed) == (0, "blocks of 1024 tokens")


def test_a_wrong_line_does_not_decide_for_all(tmp_path: Path) -> None:
    text = rows(20, 1000) + mooncake(20_000, 600, (1, 2, 3, 4, 5)) + "\n"
    reading = opened(tmp_path, text)
    assert len(list(reading)) == 20
    (bad,) = reading.bad
    assert "got 5 for 600 tokens, want 2 of 512 each" in bad.reason


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"when": 1, "prompt": "x"}\n', "an object of 'when', 'prompt'; name one of azure"),
        ("a,b,c\n1,2,3\n", "begins with 'a,b,c'; name one of"),
    ],
)
def test_what_nobody_knows_says_what_its_line_looks_like(
    content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, content)


def test_a_tokenizer_that_is_nowhere(tmp_path: Path) -> None:
    text = file_of("chat")
    with pytest.raises(ValueError, match=r"tokenizer no/such: no such file or folder here"):
        opened(tmp_path, text, tokenizer="no/such")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lmc" / "traces"


def aged(path: Path) -> Path:
    """As if it had been written a while ago."""
    os.utime(path, (1e9, 1e9))
    return path


def of(path: Path, tokenizer: Path, **options: Any) -> tuple[list[Any], list[str], int]:
    reading = read(path, tokenizer=tokenizer, **options)
    found = [
        (r.timestamp, r.session, r.output_tokens, r.input_tokens, list(r.segments),
         None if r.tokens is None else r.tokens.tolist())
        for r in reading
    ]  # fmt: skip
    return found, [str(bad) for bad in reading.bad], reading.bad_count


def test_text_is_tokenised_once(tmp_path: Path, tokenizer: Path, cache: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(file_of("chat") + b"{\n")
    fresh = of(path, tokenizer)
    assert not cache.exists()  # it may change yet
    aged(path)
    first = of(path, tokenizer)
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o77 == 0
    os.utime(file, (1e9, 1e9))
    assert of(path, tokenizer) == first == fresh
    assert file.stat().st_mtime > 1e9  # what is used stays
    with pytest.raises(ValueError, match=r"t\.jsonl:5: not JSON"):
        of(path, tokenizer, strict=True)
    assert len(list(cache.iterdir())) == 1
    other = of(path, tokenizer, format="chat:framing=plain")
    assert other != first and len(list(cache.iterdir())) == 2


def test_another_file_or_a_damaged_copy_is_read_anew(
    tmp_path: Path, tokenizer: Path, cache: Path
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(file_of("chat"))
    first = of(aged(path), tokenizer)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * len(whole), whole[:-4] + b"abcd"):
        file.write_bytes(damaged)
        assert of(path, tokenizer) == first
    path.write_bytes(file_of("chat") + file_of("chat"))
    assert len(of(aged(path), tokenizer)[0]) == 2 * len(first[0])


def test_what_cannot_be_kept_is_read(
    tmp_path: Path, tokenizer: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(file_of("chat"))
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder would be")
    assert len(of(aged(path), tokenizer)[0]) == 4
    cache.unlink()
    monkeypatch.setattr("lmc.sim.readers.kept.MOST_TOKENS", 10)
    assert len(of(path, tokenizer)[0]) == 4
    assert not cache.exists()


def test_the_longest_unused_go_first(
    tmp_path: Path, tokenizer: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        path = tmp_path / f"{i}.jsonl"
        path.write_bytes(file_of("chat"))
        of(aged(path), tokenizer)
        for file in cache.iterdir():
            os.utime(file, (file.stat().st_mtime - 10,) * 2)
    sizes = [file.stat().st_size for file in cache.iterdir()]
    assert len(sizes) == 4
    monkeypatch.setattr("lmc.sim.readers.kept.MOST_BYTES", int(2.5 * max(sizes)))
    path.write_bytes(file_of("chat") + b"\n")
    of(aged(path), tokenizer)
    assert len(list(cache.iterdir())) == 2


def test_rows_of_a_data_set(tmp_path: Path, tokenizer: Path) -> None:
    """As `datasets` gives them, which is not asked for here but where it is installed."""
    turns = [{"role": "user", "content": "Fix it."}, {"role": "assistant", "content": "Done."}]
    rows = [{"instance_id": f"i{i}", "messages": turns} for i in range(3)]
    reading = read(rows, tokenizer=tokenizer)
    assert (reading.format, [r.session for r in reading]) == ("trajectories", ["i0", "i1", "i2"])
    datasets = pytest.importorskip("datasets")
    reading = read(datasets.Dataset.from_list(rows), tokenizer=tokenizer)
    assert [r.session for r in reading] == ["i0", "i1", "i2"]
    assert len(list(reading)) == 3
