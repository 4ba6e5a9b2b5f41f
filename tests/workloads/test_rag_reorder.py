"""rag_reorder: exact lengths, real reordering, and texts that a seed decides."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lmc.workloads import WORKLOADS
from lmc.workloads.rag_reorder import RagReorder
from lmc.workloads.sample import Sample, corpus_of


@pytest.fixture(scope="module")
def samples(tokenizer: Any) -> list[Sample]:
    return RagReorder(prompts=20).samples(tokenizer)


def _orders(samples: list[Sample]) -> list[list[int]]:
    """The documents of each prompt, as places in the pool."""
    pool = [tuple(d.token_ids[d.spans[0][1] :]) for d in corpus_of(None, samples, None)]
    return [[pool.index(tuple(chunk)) for chunk in sample.chunks] for sample in samples]


def test_lengths_are_exact(samples: list[Sample], tokenizer: Any) -> None:
    documents = RagReorder(prompts=20).corpus(tokenizer)
    assert len(documents) == 8
    for document in documents:
        assert document.spans == [(0, 40), (40, 296)]
        assert len(document.token_ids) == 296
    for sample in samples:
        p = sample.prompt
        assert [end - start for start, end in p.spans] == [40, *[256] * 6, 32]
        assert sample.reusable == p.spans[:-1]
        assert p.token_ids[:40] == documents[0].token_ids[:40]


def test_every_prompt_is_another_order_and_subset(samples: list[Sample]) -> None:
    orders = _orders(samples)
    assert len(set(map(tuple, orders))) == 20
    assert all(len(set(order)) == 6 for order in orders)
    for before, after in pairwise(orders):
        assert set(before) != set(after)
        assert [i for i in before if i in after] != [i for i in after if i in before]
    questions = {tuple(sample.question) for sample in samples}
    assert len(questions) == 20


def test_a_question_quotes_a_document_and_the_answer_follows(
    samples: list[Sample], tokenizer: Any
) -> None:
    for sample in samples:
        text = tokenizer.decode(sample.question)
        quoted = text.split("<|im_start|>assistant\n", 1)[1]
        assert len(quoted) > 20
        ids = [" ".join(map(str, chunk)) for chunk in sample.chunks]
        n = len(sample.answer)
        assert n > 0
        both = " ".join(map(str, sample.question[-n:] + sample.answer))
        assert any(both in chunk for chunk in ids)
        assert any(quoted in tokenizer.decode(chunk) for chunk in sample.chunks)


def test_the_seed_decides(tokenizer: Any, samples: list[Sample]) -> None:
    assert RagReorder(prompts=20).samples(tokenizer) == samples
    assert RagReorder(prompts=3).samples(tokenizer) == samples[:3]
    other = RagReorder(prompts=20, seed=7).samples(tokenizer)
    assert all(a != b for a, b in zip(other, samples, strict=True))


def test_the_corpus_is_the_pool_whatever_is_measured(tokenizer: Any) -> None:
    few, many = (RagReorder(documents=20, prompts=n) for n in (1, 9))
    pool = few.corpus(tokenizer)
    assert len(pool) == 20
    assert corpus_of(few, few.samples(tokenizer), tokenizer) == pool
    assert many.corpus(tokenizer) == pool
    held = {tuple(d.token_ids) for d in pool}
    for prompt in corpus_of(None, many.samples(tokenizer), None):
        assert tuple(prompt.token_ids) in held


def test_all_documents_in_every_prompt(tokenizer: Any) -> None:
    workload = RagReorder(documents=3, documents_per_prompt=3, prompts=6, document_tokens=80)
    assert len(set(map(tuple, _orders(workload.samples(tokenizer))))) == 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"system_tokens": 8}, "system_tokens: got 8, allowed: 9 to"),
        ({"question_tokens": 12}, "question_tokens: got 12, need at least"),
        ({"document_tokens": 5000, "documents": 8}, "there are 1 texts of 5000 tokens"),
        ({"document_tokens": 24}, "document_tokens: got 24, need more than"),
        ({"documents": 2, "documents_per_prompt": 2, "prompts": 3}, "more than there are"),
        ({"documents_per_prompt": 9}, "got 9, allowed: 2 to 8"),
        ({"prompts": 0}, "prompts: got 0, want at least 1"),
    ],
)
def test_lengths_that_leave_no_room(tokenizer: Any, fields: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are the test
        WORKLOADS.build({"name": "rag_reorder", **fields}).samples(tokenizer)
    assert words in str(error.value)
