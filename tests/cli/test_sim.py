"""lmc sim and lmc reuse as a shell sees them, on traces small enough to check by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lmc.sim.kinds import KINDS
from tests.cli.shell import answer, invoke

PROFILE = """
fixed_s: 0.5
per_row_s: 0.01
per_pair_s: 0.0
bytes_per_token: 131072
tiers:
  - {name: host, latency_s: 0.0, bytes_per_s: 131.072e+6}
  - {name: tape, latency_s: 90.0, bytes_per_s: 131.072e+6}
"""


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """Blocks 1 2, 1 2, 3 4, 1 2, a second apart, the last of each partial."""
    file = tmp_path / "blocks.jsonl"
    rows = [
        {"timestamp": 1000 * i, "input_length": 1000, "output_length": 1, "hash_ids": ids}
        for i, ids in enumerate(([1, 2], [1, 2], [3, 4], [1, 2]))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Two documents of 200 ids: ab, ab, ba in one session, a in another."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 999, 200).tolist() for _ in "ab")
    file = tmp_path / "ids.jsonl"
    prompts = [("s", a + b), ("s", a + b), ("s", b + a), ("t", a)]
    rows = [
        {
            "session": session,
            "timestamp": i,
            "output_length": 1,
            "tokens": [*tokens, 1000 + i],
            "segments": [["doc", p, p + 200] for p in range(0, len(tokens), 200)],
        }
        for i, (session, tokens) in enumerate(prompts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_sim_prints_a_list_of_rows(blocks: Path) -> None:
    rows = answer("sim", blocks, "--policy", "lru,belady", "--capacity", "2,4", "--unit", "blocks")
    keys = ("policy", "capacity", "unit", "accesses", "hits", "hit_rate")
    assert [[row[k] for k in keys] for row in rows] == [
        ["lru", 2, "blocks", 8, 2, 0.25],
        ["lru", 4, "blocks", 8, 4, 0.5],
        ["belady", 2, "blocks", 8, 3, 0.375],
        ["belady", 4, "blocks", 8, 4, 0.5],
    ]


def test_sim_by_prefix_counts_tokens_of_full_blocks(blocks: Path) -> None:
    (row,) = answer("sim", blocks, "--metric", "prefix", "--capacity", "inf")
    assert (row["accesses"], row["hits"], row["capacity"]) == (4000, 1024, "inf")


def test_sim_in_bytes_of_a_model(blocks: Path) -> None:
    one = 512 * 131_072  # a block of llama-3.1-8b in bfloat16
    by_bytes = answer("sim", blocks, "--unit", "bytes", "--capacity", f"{2 * one},{4 * one}")
    assert [row["hits"] for row in by_bytes] == [2, 4]
    half = answer("sim", blocks, "--unit", "bytes", "--capacity", 2 * one, "--kv-dtype", "fp8")
    assert half[0]["hits"] == 4


def test_sim_at_all_capacities(blocks: Path, tmp_path: Path) -> None:
    figure = tmp_path / "curve.png"
    rows = answer("sim", blocks, "--capacity", "all", "--plot", figure)
    assert [(row["capacity"], row["hits"]) for row in rows] == [
        (1, 0),
        (2, 2),
        (5, 4),
        ("inf", 4),
    ]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_sim_through_tiers(blocks: Path) -> None:
    (row,) = answer("sim", blocks, "--capacity", "2+4", "--write", "back")
    assert row["capacity"] == [2, 4]
    assert [tier["hits"] for tier in row["tiers"]] == [2, 2]


def test_sim_says_what_it_is_worth(blocks: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(PROFILE)
    none, host, both = answer(
        "sim", blocks, "--metric", "prefix", "--capacity", "inf,1+2", "--times", profile,
        "--servers", 4,
    )  # fmt: skip
    assert none["policy"] == "none"
    assert none["ttft_s"] == {"p50": 10.5, "p90": 10.5, "p99": 10.5, "mean": 10.5}
    # 512 tokens of three requests come from host memory instead: 0.512 s for 5.12 s.
    warm = 0.5 + 0.01 * 488 + 0.512
    assert sorted([host["ttft_s"]["p50"], warm])[0] == pytest.approx(warm)
    assert host["reuse_slower"] == 0
    assert host["offered_load"] < none["offered_load"]
    # In the second layout, with one block above, one request finds it on tape, at 90 s.
    assert both["reuse_slower"] == 0.25
    code, out, _ = invoke("sim", blocks, "--metric", "prefix", "--capacity", "1+2", "--times",
                          profile)  # fmt: skip
    assert code == 0
    assert "slower" in out
    assert "steady state" in out
    batched, *_ = answer(
        "sim", blocks, "--metric", "prefix", "--capacity", "inf", "--times", profile,
        "--max-num-seqs", 8, "--max-num-batched-tokens", 600,
    )  # fmt: skip
    assert batched["ttft_s"]["p90"] != none["ttft_s"]["p90"]
    for command in ("sim", "plan"):
        code, _, err = invoke(command, blocks, "--max-num-batched-tokens", "600")
        assert (code, "goes with --max-num-seqs" in err) == (2, True)


def test_sim_with_the_store(ids: Path) -> None:
    (row,) = answer(
        "sim", ids, "--metric", "store", "--unit", "bytes", "--capacity", "inf", "--chunker",
        "explicit", "--blend", "full_reuse",
    )  # fmt: skip
    assert row["accesses"] == 3 * 401 + 201
    assert row["exact"] * row["accesses"] == pytest.approx(400 + 200)
    assert row["moved"] * row["accesses"] == pytest.approx(400)
    assert row["hits"] == 1000


def test_reuse_prints_one_object(ids: Path) -> None:
    found = answer("reuse", ids, "--chunker", "explicit")
    assert found["tokens"] == 3 * 401 + 201
    assert sum(found[kind] for kind in KINDS) == pytest.approx(1)
    assert found["prefix"] * found["tokens"] == pytest.approx(400)
    assert found["moved"] * found["tokens"] == pytest.approx(400)
    assert found["upper_bound"] * found["tokens"] == pytest.approx(400)
    assert set(found["sessions"]) == {"s", "t"}
    assert found["sessions"]["t"]["new"] == 1
    whole = answer("reuse", ids, "--chunker", "explicit", "--scope", "trace")
    assert whole["sessions"]["t"]["prefix"] == pytest.approx(200 / 201)


def test_reuse_shows_a_prompt(ids: Path) -> None:
    code, out, _ = invoke("reuse", ids, "--chunker", "explicit", "--show", 3)
    assert code == 0
    assert "moved 0-400" in out
    assert "new 400-401" in out


def test_sessions_of_one_request_are_told(tmp_path: Path) -> None:
    trace = tmp_path / "rag.jsonl.gz"
    assert invoke("trace", "make", "rag:count=20", "--out", trace)[0] == 0
    _, out, _ = invoke("reuse", trace)
    assert "--scope trace" in out
    assert answer("reuse", trace)["moved"] == 0
    assert answer("reuse", trace, "--scope", "trace")["moved"] > 0


def test_bad_lines_are_told_and_left_out(blocks: Path) -> None:
    blocks.write_text(blocks.read_text() + "{\n")
    code, out, err = invoke("sim", blocks, "--capacity", "inf")
    assert code == 0
    assert "50.00%" in out
    assert "1 lines were left out" in err
    assert "blocks.jsonl:5: not JSON" in err
    code, _, err = invoke("sim", blocks, "--strict")
    assert code == 2
    assert "blocks.jsonl:5" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--policy", "mru"], "'mru'"),
        (["--capacity", "0"], "capacity: got '0'"),
        (["--unit", "pages"], "'pages'"),
        (["--model", "gpt-9"], "llama-3.1-8b"),
        (["--metric", "store", "--unit", "blocks"], "--unit bytes"),
        (["--metric", "store"], "no token ids"),
        (["--capacity", "1k,64GiB"], "got 64GiB and 1k, want all of one unit"),
        (["--capacity", "64GiB", "--unit", "tokens"], "unit tokens: got capacity 64GiB"),
        (["--plot", "x.doc"], "want a file that ends in"),
        (["--plot", "nowhere/x.png"], "there is no folder nowhere"),
        (["--capacity", "all", "--policy", "fifo"], "capacity all"),
        (["--sample", "0.1"], "--capacity all"),
        (["--times", "nowhere.yaml"], "nowhere.yaml"),
        (["--chunker", "rabin"], "'rabin'"),
        (["--tokenizer", "x", "--format", "chat"], "tokenizer x"),
    ],
)
def test_wrong_input_is_one_line(blocks: Path, args: list[str], message: str) -> None:
    code, out, err = invoke("sim", blocks, *args)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())
    assert not out


def test_a_trace_of_lengths_cannot_be_replayed(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,9,9\n")
    for command in ("sim", "reuse"):
        code, _, err = invoke(command, file)
        assert code == 2
        assert "hit rates need" in err or "no token ids" in err


def test_the_name_of_a_session_is_nothing_but_a_name(tmp_path: Path) -> None:
    """Markup, escape codes and ten thousand letters, of sessions that push each other out."""
    names = ["[/b]", "\x1b[31mred\x07", "x" * 10_000]
    lines = []
    for i in range(12):
        tokens = [1000 * (i % 4) + j for j in range(256)]
        made = {"timestamp": i, "session": names[i % 3], "tokens": tokens, "output_length": 1}
        lines.append(json.dumps(made))
    trace = tmp_path / "named.jsonl"
    trace.write_text("\n".join(lines) + "\n")
    asked = ["sim", str(trace), "--metric", "store", "--model", "smollm2-135m"]
    code, said, _ = invoke(*asked, "--capacity", "12MiB", "--chunker", "fixed:32")
    assert code == 0
    assert "Evicted by whom" in said
    assert "\x1b[31m" not in said and "x" * 100 not in said
