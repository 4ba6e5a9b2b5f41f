"""Readers: each format from a few lines, and that a broken line costs that line alone."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from lmc.sim.readers import FORMATS, Reading, read
from lmc.sim.trace import Request, accesses

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}

MAGICS = (b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")


def mooncake(ms: int, tokens: int = 600, ids: Any = (1, 2), **changes: Any) -> str:
    fields = {"timestamp": ms, "input_length": tokens, "output_length": 5, "hash_ids": list(ids)}
    return json.dumps(fields | changes)


def bailian(chat: int, parent: int, at: float = 1.5) -> str:
    fields = {"chat_id": chat, "parent_chat_id": parent, "timestamp": at, "input_length": 20}
    return json.dumps(
        fields | {"output_length": 5, "type": "text", "turn": 1, "hash_ids": [1, chat]}
    )


def weka(name: str, t: float = 1.0, **changes: Any) -> str:
    requests = [{"t": t, "type": "s", "in": 130, "out": 3, "hash_ids": [1, 2, 3], "api_time": 0.5}]
    return json.dumps({"id": name, "block_size": 64, "requests": requests} | changes)


def chat(at: float, *said: Any) -> str:
    messages = [{"role": "user", "content": text} for text in said or ("hi",)]
    return json.dumps({"session": "s", "timestamp": at, "messages": messages})


def tokens(at: float, ids: Any = (7, 8, 9), **changes: Any) -> str:
    fields = {"session": "s", "timestamp": at, "output_length": 4, "tokens": list(ids)}
    return json.dumps(fields | {"segments": [["a", 0, 2], ["b", 2, 3]]} | changes)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
BURSTGPT = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens"
# Of each format, the header if it has one, and lines whose times are 0, 1, 2 and 3 seconds.
LINES = {
    "azure": (AZURE, [f"1970-01-01 00:00:0{i}.0000000,374,44" for i in range(4)]),
    "bailian": ("", [bailian(i + 1, i or -1, i) for i in range(4)]),
    "burstgpt": (BURSTGPT, [f"{i},{i % 2},3.5,GPT-4,417,276,693" for i in range(4)]),
    "chat": ("", [chat(i) for i in range(4)]),
    "mooncake": ("", [mooncake(1000 * i) for i in range(4)]),
    "tokens": ("", [tokens(i) for i in range(4)]),
    "weka": ("", [weka(f"s{i}", i) for i in range(4)]),
}


def file_of(name: str) -> bytes:
    header, lines = LINES[name]
    return "".join(f"{line}\n" for line in ([header] if header else []) + lines).encode()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({byte: i for i, byte in enumerate(alphabet)}, [])
    bytewise = Tokenizer(model)
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    path = tmp_path_factory.mktemp("bytewise") / "tokenizer.json"
    bytewise.save(str(path))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For hypothesis, which may not have a folder a test."""
    return tmp_path_factory.mktemp("traces")


def opened(folder: Path, content: str | bytes, name: str = "t.jsonl", **options: Any) -> Reading:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(path, options.pop("format", "auto"), **options)


def times(requests: Any) -> list[float]:
    return [r.timestamp for r in requests]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", LINES)
def test_every_format_recognised_and_read(
    name: str, suffix: str, tmp_path: Path, tokenizer: Path
) -> None:
    reading = opened(tmp_path, PACK[suffix](file_of(name)), "t" + suffix, tokenizer=tokenizer)
    assert reading.format == name
    assert times(reading) == [0, 1, 2, 3]
    assert (reading.count, reading.bad_count, reading.bad) == (4, 0, [])
    assert times(reading) == [0, 1, 2, 3]  # a second time


def test_mooncake(tmp_path: Path) -> None:
    (r,) = opened(tmp_path, mooncake(1500, 1025, [4, 5, 6]))
    assert vars(r) == vars(Request(1.5, "", 1025, 5, [4, 5, 6], 512))
    (r,) = opened(tmp_path, mooncake(0, 30, [4, 5]), block_tokens=16)
    assert r.block_tokens == 16


def test_bailian_sessions_are_roots(tmp_path: Path) -> None:
    chats = [(1, -1), (2, 1), (3, 2), (4, -1), (6, 5), (7, 5), (8, 6)]
    reading = opened(tmp_path, "\n".join(bailian(*c) for c in chats))
    assert [r.session for r in reading] == ["1", "1", "1", "4", "5", "5", "5"]  # 5 is not there


def test_weka_ids_mean_something_in_their_session(tmp_path: Path) -> None:
    def unique(**scope: str) -> int:
        requests = list(opened(tmp_path, weka("a", **scope) + "\n" + weka("b", **scope)))
        assert [r.session for r in requests] == ["a", "b"]
        return accesses(requests).unique

    assert unique() == unique(hash_id_scope="local") == 6
    assert unique(hash_id_scope="global") == 3


def test_weka_subagents_and_folders(tmp_path: Path) -> None:
    inner = {"t": 6, "type": "n", "in": 64, "out": 1, "hash_ids": [9]}
    outer = [{"t": 2, "type": "subagent", "requests": [inner]}, inner | {"t": 8}]
    (tmp_path / "b.json").write_text(json.dumps(json.loads(weka("b", requests=outer)), indent=1))
    (tmp_path / "a.json").write_text(weka("a"))
    reading = read(tmp_path)
    assert [(r.session, r.timestamp) for r in reading] == [("a", 1), ("b", 6), ("b", 8)]


def test_azure_times(tmp_path: Path) -> None:
    rows = [
        "2023-11-16 18:17:03.9799600,4808,10",
        "2024-05-10 00:00:00.009930+00:00,374,0",
        "2024-05-10 02:00:00+02:00,1,1",
    ]
    requests = list(opened(tmp_path, "\n".join([AZURE, *rows])))
    assert times(requests) == pytest.approx([1700158623.97996, 1715299200.00993, 1715299200])
    assert [(r.input_tokens, r.output_tokens) for r in requests] == [(4808, 10), (374, 0), (1, 1)]
    assert requests[0].blocks is None and requests[0].tokens is None


def test_burstgpt_of_both_editions(tmp_path: Path) -> None:
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    (old,) = opened(tmp_path, f"{header}\n5,ChatGPT,472,18,490,Conversation log\n")
    assert (old.timestamp, old.session, old.input_tokens, old.output_tokens) == (5, "", 472, 18)
    (new,) = opened(tmp_path, f"{BURSTGPT}\n5,12,9.5,GPT-4,472,0,472\n")
    assert (new.session, new.output_tokens) == ("12", 0)


def test_chat_frames_each_message(tmp_path: Path, tokenizer: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = chat(3, "hé", parts)
    (r,) = opened(tmp_path, text, tokenizer=tokenizer.parent)
    first, second = (f"<|im_start|>user\n{t}<|im_end|>\n".encode() for t in ("hé", "ab"))
    assert r.segments == [
        ("user", 0, len(first)),
        ("user", len(first), len(first) + len(second)),
    ]
    assert r.input_tokens == len(r.tokens) == len(first + second)
    assert r.tokens.dtype == np.int32 and r.output_tokens == 0
    (r,) = opened(tmp_path, text, tokenizer=tokenizer, framing="plain")
    assert r.input_tokens == len("hé\nab\n".encode())


def test_tokens(tmp_path: Path) -> None:
    (r,) = opened(tmp_path, tokens(2.5))
    assert r.tokens.tolist() == [7, 8, 9] and r.tokens.dtype == np.int32
    assert (r.timestamp, r.session, r.input_tokens, r.output_tokens) == (2.5, "s", 3, 4)
    assert r.segments == [("a", 0, 2), ("b", 2, 3)]
    (r,) = opened(tmp_path, '{"timestamp": 0, "tokens": []}')
    assert (r.input_tokens, r.output_tokens, r.segments) == (0, 0, [])


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


@pytest.mark.parametrize("name", ["chat", "sharegpt"])
def test_text_needs_a_tokenizer(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"format {name} is text: a tokenizer is needed"):
        opened(tmp_path, chat(0), format=name)


def test_wrong_arguments(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match="no such trace"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="unknown trace format: got 'nope'; valid: azure, bail"):
        opened(tmp_path, mooncake(0), format="nope")
    with pytest.raises(ValueError, match="unknown field size; valid: block_tokens"):
        opened(tmp_path, mooncake(0), size=3)
    with pytest.raises(ValueError, match="block_tokens 0, want at least 1"):
        opened(tmp_path, mooncake(0), block_tokens=0)
    with pytest.raises(ValueError, match="framing"):
        opened(tmp_path, chat(0), tokenizer=tokenizer, framing="llama")
    with pytest.raises(ValueError, match="tokenizer"):
        opened(tmp_path, chat(0), tokenizer=tmp_path / "t.jsonl")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.json"):
        read(tmp_path / "none")


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        opened(tmp_path, "\n")


@pytest.mark.parametrize("content", ["hello\n", "[1, 2]", "a,b,c\n1,2,3\n", '{"a": 1}\n'])
def test_what_is_no_trace(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot tell the format.*azure, bailian, .*weka"):
        opened(tmp_path, content)


def test_a_trace_without_requests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        list(opened(tmp_path, "", format="mooncake"))
    with pytest.raises(ValueError, match=r"none of its 2 lines.*t\.jsonl:1: not JSON"):
        list(opened(tmp_path, "{\n{\n", format="mooncake"))


def test_no_bar_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert times(opened(tmp_path, file_of("mooncake"), progress=True)) == [0, 1, 2, 3]
    assert capfd.readouterr() == ("", "")


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


def test_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, lmc.sim.readers as r, lmc.sim.generate, lmc.cli.trace\n"
        "[r.FORMATS.load(name) for name in r.FORMATS.names()]\n"
        "print([m for m in ('torch', 'vllm', 'transformers', 'numba') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def data(name: str) -> Path:
    if "LMC_DATA" not in os.environ:
        pytest.skip("LMC_DATA names no folder of traces")
    path = Path(os.environ["LMC_DATA"]) / name
    if not path.exists():
        pytest.skip(f"LMC_DATA holds no {name}")
    return path


def test_the_mooncake_conversation_trace() -> None:
    reading = read(data("mooncake_conversation.jsonl"), strict=True)
    a = accesses(reading)
    assert (reading.count, len(a.keys), a.unique) == (12_031, 288_500, 182_790)


def test_the_shared_mtrag_sessions(request: pytest.FixtureRequest) -> None:
    path = data("mtrag_shared.jsonl.xz")
    folder = request.getfixturevalue("smollm2_dir")
    requests = list(read(path, tokenizer=folder, strict=True))
    assert (len(requests), sum(r.input_tokens for r in requests)) == (135, 6_158_155)


SHAREGPT = json.dumps(
    [
        {
            "id": f"c{i}",
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "you"},
                {"from": "human", "value": "more"},
                {"from": "gpt", "value": "no"},
            ],
        }
        for i in range(2)
    ]
)


def test_sharegpt(tmp_path: Path, tokenizer: Path) -> None:
    reading = opened(tmp_path, SHAREGPT, "t.json", tokenizer=tokenizer, framing="plain")
    requests = list(reading)
    assert reading.format == "sharegpt"
    assert times(requests) == [0, 1, 2, 3]
    assert [r.session for r in requests] == ["c0", "c0", "c1", "c1"]
    assert requests[0].tokens is not None and len(requests[0].tokens) == len(b"hi\n")
    assert requests[1].input_tokens == len(b"hi\nyou\nmore\n")
    assert [name for name, *_ in requests[1].segments] == ["user", "assistant", "user"]


def test_sharegpt_twice(tmp_path: Path, tokenizer: Path) -> None:
    reading = opened(tmp_path, SHAREGPT, "t.json", tokenizer=tokenizer)
    assert times(reading) == times(reading) == [0, 1, 2, 3]


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


def test_weka_times_in_a_subagent_count_from_its_marker(tmp_path: Path) -> None:
    inner = {"t": 5, "type": "n", "in": 64, "out": 1, "hash_ids": [9]}
    outer = [{"t": 200, "type": "subagent", "requests": [inner]}]
    assert times(opened(tmp_path, weka("a", requests=outer))) == [205]


def test_weka_sessions_without_id_share_nothing(tmp_path: Path) -> None:
    lines = [json.loads(weka("")) for _ in range(2)]
    for line in lines:
        del line["id"]
    assert accesses(opened(tmp_path, "\n".join(map(json.dumps, lines)))).unique == 6


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
