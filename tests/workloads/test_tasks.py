"""The synthetic tasks: where their parts stand, and that they can be solved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lmc.workloads import WORKLOADS
from lmc.workloads.sample import Sample

TASKS = ("recall", "two_hop", "chain", "induction", "order")


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_dir)


def samples(name: str, tokenizer: Any, **fields: Any) -> list[Sample]:
    made: list[Sample] = WORKLOADS.build({"name": name, "prompts": 6, **fields}).samples(tokenizer)
    return made


def texts(sample: Sample, tokenizer: Any) -> tuple[list[str], str, str]:
    chunks = [tokenizer.decode(chunk) for chunk in sample.chunks]
    return chunks, tokenizer.decode(sample.question), tokenizer.decode(sample.answer)


@pytest.mark.parametrize("name", TASKS)
def test_the_same_by_seed_and_however_many_are_asked_for(name: str, tokenizer: Any) -> None:
    made = samples(name, tokenizer)
    assert made == samples(name, tokenizer)
    assert made[:3] == samples(name, tokenizer, prompts=3)
    assert made != samples(name, tokenizer, seed=1)
    assert len({tuple(sample.prompt.token_ids) for sample in made}) == 6
    assert len({tuple(sample.system) for sample in made}) == 1


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_two_to_four_chunks_of_at_most_64_tokens(name: str, chunks: int, tokenizer: Any) -> None:
    for sample in samples(name, tokenizer, chunks=chunks):
        assert len(sample.chunks) == chunks
        assert all(20 <= len(chunk) <= 64 for chunk in sample.chunks)
        assert 0 < len(sample.answer) <= 8
        assert sample.prompt.spans[-1][1] == len(sample.prompt.token_ids)
    with pytest.raises(ValueError, match="chunks: got 5, allowed: 2 to 4"):
        samples(name, tokenizer, chunks=5)


def test_recall_needs_one_chunk_only(tokenizer: Any) -> None:
    for sample in samples("recall", tokenizer):
        chunks, question, answer = texts(sample, tokenizer)
        name = question.split("\n")[-1].split()[0]
        (chunk,) = [chunk for chunk in chunks if name in chunk]
        assert f"{name} has the number{answer}," in chunk
        assert sum(answer in other for other in chunks) == 1


def test_two_hops_lie_in_different_chunks(tokenizer: Any) -> None:
    for sample in samples("two_hop", tokenizer):
        chunks, question, answer = texts(sample, tokenizer)
        key, alias = question.split()[-1], answer[:6]
        assert chunks[-1] == key + alias
        assert answer not in chunks[-1]
        assert [chunk.count(answer) for chunk in chunks[:-1]] == [3]


def test_links_of_a_chain_lie_in_different_chunks(tokenizer: Any) -> None:
    for sample in samples("chain", tokenizer, chunks=4):
        chunks, question, answer = texts(sample, tokenizer)
        stated = re.findall(r"has the number (\d)", chunks[0])
        assert len(stated) == 2
        assert answer.strip() == stated[-1]
        for link in chunks[1:]:
            assert not re.search(r"\d", link)
            assert "the same number as the one before" in link
        assert question.split("\n")[-1].split()[0] in chunks[-1]


def test_induction_crosses_a_border(tokenizer: Any) -> None:
    for sample in samples("induction", tokenizer):
        chunks, question, answer = texts(sample, tokenizer)
        before = next(i for i, chunk in enumerate(chunks) if chunk.endswith(question))
        assert chunks[before + 1].startswith(answer)
        assert all(question + answer not in chunk for chunk in chunks)


def test_order_asks_for_the_first(tokenizer: Any) -> None:
    for sample in samples("order", tokenizer):
        chunks, _, answer = texts(sample, tokenizer)
        assert f"came{answer}," in chunks[0]
        assert answer not in chunks[1]
