"""Continuations of the manual: exact lengths, and what follows a quotation."""

from __future__ import annotations

from typing import Any

import pytest

from lmc.workloads import WORKLOADS
from lmc.workloads.sample import Sample


def build(tokenizer: Any, **fields: Any) -> list[Sample]:
    samples: list[Sample] = WORKLOADS.build(fields).samples(tokenizer)
    return samples


def pydoc(tokenizer: Any, **fields: Any) -> list[Sample]:
    return build(tokenizer, name="pydoc", **{"prompts": 8, "chunk_tokens": 128, **fields})


def test_pydoc_has_exact_lengths(tokenizer: Any) -> None:
    for sample in pydoc(tokenizer, chunks=3, answer_tokens=16):
        assert len(sample.system) == 40
        assert [len(chunk) for chunk in sample.chunks] == [128] * 3
        assert (len(sample.question), len(sample.answer)) == (32, 16)
        assert len({tuple(chunk) for chunk in sample.chunks}) == 3


def test_pydoc_answer_is_what_follows_the_quotation(tokenizer: Any) -> None:
    places = set()
    for sample in pydoc(tokenizer):
        for length in range(len(sample.question), 3, -1):  # what is quoted ends the question
            quoted = [*sample.question[-length:], *sample.answer]
            found = [
                (i, at)
                for i, chunk in enumerate(sample.chunks)
                for at in range(len(chunk) - len(quoted) + 1)
                if chunk[at : at + len(quoted)] == quoted
            ]
            if found:
                break
        assert found
        places.add(tuple(sample.chunks[found[0][0]][found[0][1] :]))
    assert len(places) == 8


def test_pydoc_is_the_same_by_seed_and_however_many(tokenizer: Any) -> None:
    assert pydoc(tokenizer)[:3] == pydoc(tokenizer, prompts=3)
    assert pydoc(tokenizer) != pydoc(tokenizer, seed=1)
    assert len({tuple(sample.prompt.token_ids) for sample in pydoc(tokenizer)}) == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunks": 10_000}, "chunks: got 10000; there are"),
        ({"question_tokens": 5}, "question_tokens: got 5, need at least"),
        ({"chunk_tokens": 40}, "chunk_tokens: got 40, too few"),
        ({"prompts": 0}, "prompts: got 0, want at least 1"),
        ({"system_tokens": 1}, "system_tokens: got 1, allowed"),
    ],
)
def test_pydoc_refuses(tokenizer: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pydoc(tokenizer, **fields)
