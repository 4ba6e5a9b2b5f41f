"""Readers: each format from a few lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmc.sim.readers import FORMATS, read
from lmc.sim.trace import Request, accesses
from tests.sim.readers.lines import (
    AZURE,
    BURSTGPT,
    LINES,
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
    (r,) = opened(tmp_path, mooncake(0, 30, [4, 5]), format="mooncake:16")
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


def test_csv_as_other_programs_write_it(tmp_path: Path) -> None:
    rows = ["1e+06,12.0,9.5,GPT-4,472,0,472", ".5,,9.5,GPT-4,1,2,3", "2.5E1,7,9,GPT-4,1,2,3"]
    reading = opened(tmp_path, "\n".join([BURSTGPT, *rows]))
    found = list(reading)
    assert reading.bad_count == 0
    assert [(r.timestamp, r.session) for r in found] == [(1e6, "12"), (0.5, ""), (25, "7")]
    quoted = '"TIMESTAMP","ContextTokens","GeneratedTokens"\n"2024-05-10 00:00:00.5","374","44"\n'
    assert [r.input_tokens for r in opened(tmp_path, quoted)] == [374]


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
    (r,) = opened(tmp_path, text, tokenizer=tokenizer, format="chat:framing=plain")
    assert r.input_tokens == len("hé\nab\n".encode())


@pytest.mark.parametrize(
    "name", ["chat", "tokens", "mooncake", "lmc", "trajectories", "sharegpt", "weka"]
)
def test_a_session_of_null_is_none(name: str, tmp_path: Path, tokenizer: Path) -> None:
    """As a program writes a field that it has no value for."""
    fields = {"session": None, "session_id": None, "instance_id": None, "id": None}
    made = FORMATS.load(name)
    line = json.dumps(json.loads(made.example) | fields)
    text = {"tokenizer": tokenizer} if made.has_text else {}
    reading = opened(tmp_path, line, format=name, **text)
    requests = list(reading)
    assert requests and not reading.bad_count


def test_tokens(tmp_path: Path) -> None:
    (r,) = opened(tmp_path, tokens(2.5))
    assert r.tokens.tolist() == [7, 8, 9] and r.tokens.dtype == np.int32
    assert (r.timestamp, r.session, r.input_tokens, r.output_tokens) == (2.5, "s", 3, 4)
    assert r.segments == [("a", 0, 2), ("b", 2, 3)]
    (r,) = opened(tmp_path, '{"timestamp": 0, "tokens": []}')
    assert (r.input_tokens, r.output_tokens, r.segments) == (0, 0, [])


def test_lmc_hashes_stand_for_texts(tmp_path: Path) -> None:
    first, second = "ab" * 12, "cd" * 12
    content = recorded(0, [(first, 5), (second, 3)]) + "\n" + recorded(1, [(second, 3), (first, 5)])
    left_alone = json.loads(recorded(2)) | {"map": None, "reason": "disabled"}
    del left_alone["chunks"]
    one, two = opened(tmp_path, f"{content}\n{json.dumps(left_alone)}", strict=True)
    assert one.tokens is not None and two.tokens is not None
    assert one.tokens.dtype == np.int32 and one.tokens.min() >= 0
    assert one.tokens.tolist() == [*two.tokens[3:], *two.tokens[:3]]
    assert len(set(one.tokens.tolist())) == 8
    assert one.segments == [("chunk", 0, 5), ("chunk", 5, 8)]
    (ids,) = opened(tmp_path, recorded(0, tokens=list(range(8))))
    assert ids.tokens is not None and ids.tokens.tolist() == list(range(8))
    (tenant,) = opened(tmp_path, recorded(0, tokens=list(range(8)), tenant="é" * 3))
    assert tenant.session == "ééé" and tenant.tokens is not None
    assert not set(tenant.tokens.tolist()) & set(range(8))


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
        opened(tmp_path, mooncake(0), format="mooncake:size=3")
    with pytest.raises(ValueError, match="block_tokens 0, want at least 1"):
        opened(tmp_path, mooncake(0), format="mooncake:0")
    with pytest.raises(ValueError, match="framing"):
        opened(tmp_path, chat(0), tokenizer=tokenizer, format="chat:framing=llama")
    with pytest.raises(ValueError, match="tokenizer"):
        opened(tmp_path, chat(0), tokenizer=tmp_path / "t.jsonl")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.json"):
        read(tmp_path / "none")


def test_no_bar_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read_so_far: list[int] = []
    reading = opened(tmp_path, file_of("mooncake"), tell=read_so_far.append)
    assert times(reading) == [0, 1, 2, 3]
    assert sum(read_so_far) == len(file_of("mooncake"))
    assert capfd.readouterr() == ("", "")


def test_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, lmc.sim.readers as r, lmc.sim.synthetic, lmc.cli.trace\n"
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


def test_sharegpt(tmp_path: Path, tokenizer: Path) -> None:
    format = "sharegpt:framing=plain"
    reading = opened(tmp_path, SHAREGPT, "t.json", tokenizer=tokenizer, format=format)
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


def test_weka_times_in_a_subagent_count_from_its_marker(tmp_path: Path) -> None:
    inner = {"t": 5, "type": "n", "in": 64, "out": 1, "hash_ids": [9]}
    outer = [{"t": 200, "type": "subagent", "requests": [inner]}]
    assert times(opened(tmp_path, weka("a", requests=outer))) == [205]


def test_weka_sessions_without_id_share_nothing(tmp_path: Path) -> None:
    lines = [json.loads(weka("")) for _ in range(2)]
    for line in lines:
        del line["id"]
    assert accesses(opened(tmp_path, "\n".join(map(json.dumps, lines)))).unique == 6
