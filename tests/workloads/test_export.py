"""Exported workloads, as vLLM's own bench client reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmc.cli.app import app
from lmc.workloads import WORKLOADS
from lmc.workloads.export import vllm_bench
from lmc.workloads.sample import Sample

EXPORTED = ["rag_reorder", "tool_docs", "chat", "agents"]


def exported(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["workload", "export", *arguments])


@pytest.mark.heavy
@pytest.mark.parametrize("name", EXPORTED)
def test_vllm_reads_what_was_exported(
    name: str, tokenizer: Any, smollm2_dir: Path, tmp_path: Path
) -> None:
    """Every prompt in its order, as many tokens but for borders, and the output's length."""
    from vllm.benchmarks.datasets.datasets import CustomDataset

    out = tmp_path / "w.jsonl"
    done = exported(name, "--out", str(out), "--model", str(smollm2_dir))
    samples = WORKLOADS.build(name).samples(tokenizer)
    assert done.exit_code == 0, done.output
    assert f"{len(samples)} prompts of " in " ".join(done.output.split())
    read = CustomDataset(dataset_path=str(out), disable_shuffle=True).sample(
        tokenizer, num_requests=0, skip_chat_template=True
    )
    assert len(read) == len(samples)
    for request, sample in zip(read, samples, strict=True):
        assert request.prompt == tokenizer.decode(sample.prompt.token_ids)
        assert request.expected_output_len == len(sample.answer)
        merged = len(sample.prompt.token_ids) - request.prompt_len
        assert 0 <= merged <= len(sample.prompt.spans)


def test_the_seed_decides_every_byte(tokenizer: Any) -> None:
    first, again, other = (
        "\n".join(vllm_bench(WORKLOADS.build(w).samples(tokenizer), tokenizer))
        for w in ("agents:seed=1", "agents:seed=1", "agents:seed=2")
    )
    assert first == again != other


def test_output_tokens(tokenizer: Any) -> None:
    def asked(answer: list[int], output_tokens: int | None) -> int:
        sample = Sample([1], [tokenizer.encode("a text")], [2], answer)
        (line,) = vllm_bench([sample], tokenizer, output_tokens)
        tokens: int = json.loads(line)["output_tokens"]
        return tokens

    assert asked([5, 6, 7], None) == 3
    assert asked([], None) == 1
    assert asked([5, 6, 7], 48) == 48


def test_half_a_character_is_refused_by_its_prompt(tokenizer: Any) -> None:
    whole = tokenizer.encode("plain")
    half = tokenizer.encode("🦒")[:-1]  # some bytes of it
    samples = [Sample(whole, [whole], [], []), Sample(whole, [half], [], [])]
    with pytest.raises(ValueError, match="prompt 2: its tokens are not those of a text"):
        list(vllm_bench(samples, tokenizer))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "--out", "w.txt"], "--out: got w.txt, want a name that ends in .jsonl"),
        (["chat", "--out", "w.jsonl", "--format", "csv"], "is not one of"),
        (["chats", "--out", "w.jsonl"], "chats"),
    ],
)
def test_a_wrong_argument_writes_nothing(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = exported(*arguments)
    assert done.exit_code == 2
    assert words in done.output
    assert not list(tmp_path.iterdir())
