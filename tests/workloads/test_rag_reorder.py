"""rag_reorder: exact lengths, real reordering, and texts that a seed decides."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lmc.experiment.vllm.config import WorkloadConfig
from lmc.workloads.rag_reorder import Workload, build_workload


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def workload(tokenizer: Any) -> Workload:
    return build_workload(WorkloadConfig(prompts=20), tokenizer)


def _documents(workload: Workload, prompt_id: int) -> list[int]:
    """The documents of a prompt, as places in the pool."""
    pool = [tuple(d.token_ids[40:]) for d in workload.documents]
    p = workload.prompts[prompt_id]
    return [pool.index(tuple(p.token_ids[start:end])) for start, end in p.spans[1:-1]]


def test_lengths_are_exact(workload: Workload) -> None:
    assert len(workload.documents) == 8
    for document in workload.documents:
        assert document.spans == [(0, 40), (40, 296)]
        assert len(document.token_ids) == 296
    for p in workload.prompts:
        assert [end - start for start, end in p.spans] == [40, *[256] * 6, 32]
        assert p.token_ids[:40] == workload.documents[0].token_ids[:40]


def test_every_prompt_is_another_order_and_subset(workload: Workload) -> None:
    orders = [_documents(workload, i) for i in range(20)]
    assert len(set(map(tuple, orders))) == 20
    assert all(len(set(order)) == 6 for order in orders)
    for before, after in pairwise(orders):
        assert set(before) != set(after)
        assert [i for i in before if i in after] != [i for i in after if i in before]
    questions = {tuple(p.token_ids[-32:]) for p in workload.prompts}
    assert len(questions) == 20


def test_a_question_quotes_a_document_of_its_prompt(workload: Workload, tokenizer: Any) -> None:
    for p in workload.prompts:
        start, end = p.spans[-1]
        text = tokenizer.decode(p.token_ids[start:end])
        quoted = text.split("<|im_start|>assistant\n", 1)[1]
        assert len(quoted) > 20
        assert quoted in tokenizer.decode(p.token_ids[40:start])


def test_the_seed_decides_and_the_limit_only_cuts(tokenizer: Any, workload: Workload) -> None:
    again = build_workload(WorkloadConfig(prompts=20, limit=3), tokenizer)
    assert again.prompts == workload.prompts[:3]
    other = build_workload(WorkloadConfig(prompts=20, seed=7), tokenizer)
    assert all(a != b for a, b in zip(other.prompts, workload.prompts, strict=True))


def test_all_documents_in_every_prompt(tokenizer: Any) -> None:
    config = WorkloadConfig(documents=3, documents_per_prompt=3, prompts=6, document_tokens=80)
    workload = build_workload(config, tokenizer)
    assert len({tuple(_documents(workload, i)) for i in range(6)}) == 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"system_tokens": 8}, "workload.system_tokens: got 8, allowed: 9 to"),
        ({"question_tokens": 12}, "workload.question_tokens: got 12, need at least"),
        ({"document_tokens": 5000, "documents": 8}, "there are 1 texts of 5000 tokens"),
        ({"document_tokens": 24}, "workload.document_tokens: got 24, need more than"),
        ({"documents": 2, "documents_per_prompt": 2, "prompts": 3}, "more than there are"),
    ],
)
def test_lengths_that_leave_no_room(tokenizer: Any, fields: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are the test
        build_workload(WorkloadConfig(**fields), tokenizer)
    assert words in str(error.value)
