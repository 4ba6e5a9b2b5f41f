"""Readers: a broken line costs that line alone, and no bytes are more than a ValueError."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmc.sim.readers import FORMATS, read
from tests.sim.readers.lines import (
    LINES,
    MAGICS,
    PACK,
    SHAREGPT,
    bailian,
    chat,
    file_of,
    mooncake,
    opened,
    recorded,
    times,
    tokens,
    weka,
)

BAD = [
    ("mooncake", "{", "not JSON"),
    ("mooncake", "[1, 2]", "want a JSON object"),
    ("mooncake", mooncake(0, -1), "input_length: got -1"),
    ("mooncake", mooncake(0, 2**40), "input_length"),
    ("mooncake", mooncake(0, output_length=-5), "output_length: got -5"),
    ("mooncake", mooncake(0, output_length=None), "output_length"),
    ("mooncake", mooncake(0, timestamp=True), "timestamp: got True"),
    ("mooncake", mooncake(0, timestamp=float("nan")), "finite"),
    ("mooncake", mooncake(10**400), "finite"),
    ("mooncake", mooncake(0).replace("timestamp", "time"), "timestamp: got nothing"),
    ("mooncake", mooncake(0, ids=[1, 2, 3]), "hash_ids: got 3 for 600 tokens, want 2"),
    ("mooncake", mooncake(0, ids=[1, "2"]), "hash_ids: .*want a list of integers"),
    ("mooncake", mooncake(0, ids=[1, True]), "hash_ids: .*want a list of integers"),
    ("bailian", bailian(1, -1).replace('"chat_id"', '"x"'), "chat_id: got nothing"),
    ("weka", weka("a", block_size=0), "block_size: got 0"),
    ("weka", weka("a", requests=3), "requests: want a list"),
    ("azure", "yesterday,1,1", "TIMESTAMP: got 'yesterday'"),
    ("azure", "2024-05-10 00:00:00,1", "got 2 columns, want 3"),
    ("burstgpt", "soon,1,1,GPT-4,1,1,2", "Timestamp: got 'soon'"),
    ("chat", chat(0, 3), "want text"),
    ("chat", chat(0, "\ud800"), "surrogate"),
    ("lmc", recorded(0, lmc_trace=2), "lmc_trace: got version 2, want 1"),
    ("lmc", recorded(0, [("ab" * 12, 5)]), "chunks: they have 5 tokens"),
    ("lmc", recorded(0, [("ab" * 12, 2**60)]), "chunks: they have"),
    ("lmc", recorded(0, [("ab" * 12, 2**31 - 1)], prompt_tokens=2**31 - 1), "4194304 at most"),
    ("lmc", recorded(0, [("ab" * 12, 0), ("ab" * 12, 8)]), "chunks: got .*want .hash in hex"),
    ("lmc", recorded(0, [("no hash", 8)]), "chunks: got .*want .hash in hex"),
    ("lmc", recorded(0, [("ab" * 12, True), ("ab" * 12, 7)]), "chunks: got"),
    ("lmc", recorded(0, tokens=[1, 2]), "tokens: got 2, want 8"),
    ("lmc", recorded(0, tokens=[-1] * 8), "tokens: want a list of token ids"),
    ("lmc", recorded(float("nan")), "time: .*finite"),
    ("lmc", recorded(0, tenant="\ud800"), "tenant: .*surrogate"),
    ("tokens", tokens(0, [1, -1]), "tokens: want"),
    ("tokens", tokens(0, [1, 2**31]), "tokens: want"),
    ("tokens", tokens(0, segments=[["a", 1, 1]]), "segments"),
    ("tokens", tokens(0, segments=[["a", 0, 2], ["b", 1, 3]]), "segments"),
    ("tokens", tokens(0, segments=[["a", 0, 4]]), "segments"),
]


@pytest.mark.parametrize(("name", "line", "reason"), BAD)
def test_a_bad_line_is_counted_and_left_out(
    name: str, line: str, reason: str, tmp_path: Path, tokenizer: Path
) -> None:
    header, (first, second, *_) = LINES[name]
    content = "\n".join([header] * bool(header) + [first, line, "", second])
    reading = opened(tmp_path, content, format=name, tokenizer=tokenizer)
    assert times(reading) == [0, 1]
    assert (reading.count, reading.bad_count) == (2, 1)
    (bad,) = reading.bad
    assert bad.line == 2 + bool(header)
    strict = opened(tmp_path, content, format=name, tokenizer=tokenizer, strict=True)
    with pytest.raises(ValueError, match=rf"t\.jsonl:{bad.line}: .*{reason}"):
        list(strict)


def test_the_first_hundred_bad_lines_are_kept(tmp_path: Path) -> None:
    reading = opened(tmp_path, mooncake(0) + "\n{" * 250)
    assert times(reading) == [0]
    assert (len(reading.bad), reading.bad_count) == (100, 250)
    assert [b.line for b in reading.bad] == list(range(2, 102))


def test_wrong_utf8_is_one_bad_line(tmp_path: Path) -> None:
    content = file_of("mooncake").replace(b"input", b"in\xff\xfeput", 1)
    reading = opened(tmp_path, content, format="mooncake")
    assert times(reading) == [1, 2, 3]
    assert reading.bad_count == 1


def test_byte_order_marks_and_windows_lines(tmp_path: Path) -> None:
    for name in ("mooncake", "azure"):
        content = b"\xef\xbb\xbf" + file_of(name).replace(b"\n", b"\r\n")
        assert times(opened(tmp_path, content)) == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", [s for s in PACK if s])
@pytest.mark.parametrize("lost", [1, 6, 20])
def test_a_truncated_file_ends_in_one_bad_line(suffix: str, lost: int, tmp_path: Path) -> None:
    # Ids that hardly compress, so that a file has more than one block of its compression.
    ids = np.random.default_rng(0).integers(0, 2**62, (4000, 2)).tolist()
    content = "".join(mooncake(i, ids=pair) + "\n" for i, pair in enumerate(ids)).encode()
    packed = PACK[suffix](content)[:-lost]
    reading = opened(tmp_path, packed, "t" + suffix, format="mooncake")
    found = times(reading)
    assert 1000 < len(found) == reading.count <= 4000
    assert found == [i / 1000 for i in range(len(found))]
    assert [b.line for b in reading.bad] == [len(found) + 1]


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the trace is empty"):
        opened(tmp_path, "\n")


@pytest.mark.parametrize("suffix", [s for s in PACK if s])
def test_where_no_format_can_be_told_the_damage_is(suffix: str, tmp_path: Path) -> None:
    """A compressed file that ends before its first line is no empty trace."""
    whole = PACK[suffix](mooncake(0).encode())
    with pytest.raises(ValueError, match="it cannot be read: "):
        opened(tmp_path, whole[:11], "t" + suffix)
    with pytest.raises(ValueError, match="its first 4 MiB are blank"):
        opened(tmp_path, PACK[suffix](b"\n" * (5 << 20)), "blank" + suffix)


@pytest.mark.parametrize("content", ["hello\n", "[1, 2]", "a,b,c\n1,2,3\n", '{"a": 1}\n'])
def test_what_is_no_trace(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot tell the format.*azure, bailian, .*weka"):
        opened(tmp_path, content)


def test_a_trace_without_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        list(opened(tmp_path, "", format="mooncake"))
    with pytest.raises(ValueError, match=r"none of its 2 lines.*t\.jsonl:1: not JSON"):
        list(opened(tmp_path, "{\n{\n", format="mooncake"))


NO_CLEANUP = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.sampled_from([n for n in FORMATS.names() if n != "sharegpt"])


def only_value_errors(content: bytes, folder: Path, tokenizer: Path, **options: Any) -> None:
    try:
        reading = opened(folder, content, tokenizer=tokenizer, **options)
        assert len(list(reading)) == reading.count
    except ValueError as e:
        if isinstance(e, OSError):  # io.UnsupportedOperation is both
            raise


@given(content=st.binary(max_size=200), name=NAMES | st.just("auto"))
def test_arbitrary_bytes(content: bytes, name: str, folder: Path, tokenizer: Path) -> None:
    only_value_errors(content, folder, tokenizer, format=name)


@given(
    name=NAMES.filter(lambda n: n in LINES),
    at=st.floats(0, 1),
    cut=st.integers(0, 12),
    put=st.binary(max_size=12),
    suffix=st.sampled_from(list(PACK)),
)
def test_mutated_files(
    name: str, at: float, cut: int, put: bytes, suffix: str, folder: Path, tokenizer: Path
) -> None:
    packed = PACK[suffix](file_of(name))
    i = int(at * len(packed))
    content = packed[:i] + put + packed[i + cut :]
    only_value_errors(content, folder, tokenizer, format=name)


# The first bytes may say that a file is compressed, and a lone brace in the first line that a
# session of weka is one over many lines.
@given(
    name=st.sampled_from(list(LINES)),
    place=st.integers(0, 3),
    junk=st.binary(max_size=60).filter(
        lambda b: b"\n" not in b and b.strip() != b"{" and not b.startswith(MAGICS)
    ),
)
def test_good_lines_around_a_bad_one_survive(
    name: str, place: int, junk: bytes, folder: Path, tokenizer: Path
) -> None:
    header, good = LINES[name]
    lines = [line.encode() for line in good]
    lines.insert(place, junk)
    content = b"\n".join([header.encode()] * bool(header) + lines)
    reading = opened(folder, content, format=name, tokenizer=tokenizer)
    found = times(reading)
    assert [t for t in found if t in (0, 1, 2, 3)] == [0, 1, 2, 3]
    assert (len(found) - 4) + reading.bad_count <= 1


EDIT = st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=12))


@pytest.mark.slow
@settings(max_examples=10_000)
@given(name=st.sampled_from(list(LINES)), edits=st.lists(EDIT, min_size=1, max_size=4))
def test_ten_thousand_damaged_files(
    name: str, edits: list[tuple[float, int, bytes]], folder: Path, tokenizer: Path
) -> None:
    header, _ = LINES[name]
    content = file_of(name)
    for at, cut, put in edits:
        i = int(at * len(content))
        content = content[:i] + put + content[i + cut :]
    reading = opened(folder, content, format=name, tokenizer=tokenizer)
    try:
        found = len(list(reading))
    except ValueError as e:
        if isinstance(e, OSError):
            raise
        return
    mark = b"\xef\xbb\xbf"  # in front of a file it is none of the first line
    lines = [line for line in content.removeprefix(mark).split(b"\n") if line.strip()]
    # Every line is a request or counted as none; a session of weka may have many lines.
    if name != "weka" and (not header or content.startswith(header.encode() + b"\n")):
        assert found + reading.bad_count == len(lines) - bool(header)


def test_sharegpt_truncated(tmp_path: Path, tokenizer: Path) -> None:
    reading = opened(tmp_path, SHAREGPT[:-30], "t.json", tokenizer=tokenizer)
    assert times(reading) == [0, 1]
    assert reading.bad_count == 1


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_truncated_file_is_recognised(suffix: str, tmp_path: Path) -> None:
    content = "".join(mooncake(i) + "\n" for i in range(4000)).encode()
    reading = opened(tmp_path, PACK[suffix](content)[:-12], "t" + suffix)
    assert len(list(reading)) > 1000


def test_bailian_behind_a_broken_line_is_recognised(tmp_path: Path) -> None:
    assert opened(tmp_path, "{broken\n" + file_of("bailian").decode()).format == "bailian"


@pytest.mark.parametrize("name", ["azure", "burstgpt"])
def test_a_quotation_mark_costs_its_line_alone(name: str, tmp_path: Path) -> None:
    header, lines = LINES[name]
    content = "\n".join([header, lines[0], '"' + lines[1], *lines[2:]])
    reading = opened(tmp_path, content, format=name)
    assert times(reading) == [0, 2, 3]


def test_wrong_utf8_in_csv_is_bad(tmp_path: Path) -> None:
    content = file_of("burstgpt").replace(b"GPT-4", b"GPT\xff4", 1)
    reading = opened(tmp_path, content, format="burstgpt")
    assert times(reading) == [1, 2, 3]
    assert reading.bad_count == 1


def test_weka_sessions_behind_a_broken_line(tmp_path: Path) -> None:
    reading = opened(tmp_path, "{broken\n" + file_of("weka").decode(), format="weka")
    assert times(reading) == [0, 1, 2, 3]
    assert reading.bad_count == 1


def test_weka_over_many_lines_in_zstd(tmp_path: Path) -> None:
    pretty = json.dumps(json.loads(weka("a")), indent=1).encode()
    assert times(opened(tmp_path, PACK[".zst"](pretty), "t.json.zst", format="weka")) == [1]


def test_weka_of_a_truncated_file(tmp_path: Path) -> None:
    content = "".join(weka(f"s{i}", i) + "\n" for i in range(300)).encode()
    reading = opened(tmp_path, gzip.compress(content)[:-10], "t.jsonl.gz", format="weka")
    assert len(list(reading)) > 100


def test_a_surrogate_in_a_role_is_a_bad_line(tmp_path: Path, tokenizer: Path) -> None:
    line = json.dumps({"timestamp": 0, "messages": [{"role": "\ud800", "content": "x"}]})
    reading = opened(tmp_path, line + "\n" + chat(1), tokenizer=tokenizer)
    assert times(reading) == [1]
    assert reading.bad_count == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mooncake", mooncake(0).replace("600", '"6_00"')),
        ("bailian", bailian(1, -1).replace('"chat_id": 1', '"chat_id": 1.7')),
        ("chat", json.dumps({"messages": [{"role": "user", "content": "no timestamp"}]})),
        ("chat", chat(0, [{"type": "text", "text": {"a": 1}}])),
        ("chat", chat(0, [{"type": "image_url", "image_url": "u"}])),
        ("tokens", tokens(0, segments=[["a", False, True]])),
        ("tokens", tokens(0, session=float("nan"))),
    ],
)
def test_wrong_types_are_bad(name: str, line: str, tmp_path: Path, tokenizer: Path) -> None:
    reading = opened(tmp_path, LINES[name][1][3] + "\n" + line, format=name, tokenizer=tokenizer)
    assert times(reading) == [3]
    assert reading.bad_count == 1


@pytest.mark.parametrize(
    "damage", ['"' + "[" * 100_000, "[" * 100_000, '{"id": "\udcff"}', "1" * 6000, "}"]
)
def test_sharegpt_is_read_up_to_what_is_no_json(
    damage: str, tmp_path: Path, tokenizer: Path
) -> None:
    content = SHAREGPT[:-1].encode() + b"," + damage.encode(errors="surrogateescape") + b"]"
    (tmp_path / "t.json").write_bytes(content)
    reading = read(tmp_path / "t.json", tokenizer=tokenizer)
    assert times(reading) == [0, 1, 2, 3]
    assert reading.bad_count == 1
