"""tool_docs: whole descriptions, in ever other orders."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lmc.workloads import WORKLOADS
from lmc.workloads.library import descriptions
from lmc.workloads.sample import corpus_of
from lmc.workloads.tool_docs import ToolDocs


def test_descriptions_are_whole_and_of_allowed_lengths(tokenizer: Any) -> None:
    known = {f"\n\nTool: {text}" for text in descriptions()}
    for sample in ToolDocs().samples(tokenizer):
        assert len(sample.system) == 40 and len(sample.question) == 32
        assert len({tuple(chunk) for chunk in sample.chunks}) == len(sample.chunks) == 12
        for chunk in sample.chunks:
            assert 80 <= len(chunk) <= 160
            assert tokenizer.decode(chunk) in known


def test_tools_come_back_at_other_places(tokenizer: Any) -> None:
    samples = ToolDocs().samples(tokenizer)
    pool = [tuple(d.token_ids[40:]) for d in corpus_of(ToolDocs(), samples, tokenizer)]
    orders = [[pool.index(tuple(chunk)) for chunk in sample.chunks] for sample in samples]
    assert len(pool) == 24
    for before, after in pairwise(orders):
        again = set(before) & set(after)
        assert any(before.index(i) != after.index(i) for i in again)


def test_the_answer_follows_the_quotation(tokenizer: Any) -> None:
    for sample in ToolDocs().samples(tokenizer):
        n = len(sample.answer)
        quoted = sample.question[-n:] + sample.answer
        places = (chunk[i : i + 2 * n] for chunk in sample.chunks for i in range(len(chunk)))
        assert quoted in places


def test_the_seed_decides(tokenizer: Any) -> None:
    samples = ToolDocs().samples(tokenizer)
    assert ToolDocs().samples(tokenizer) == samples
    assert ToolDocs(prompts=3).samples(tokenizer) == samples[:3]
    assert ToolDocs(seed=1).samples(tokenizer) != samples


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": 4, "tools_per_prompt": 5}, "tools_per_prompt: got 5, allowed: 2 to 4"),
        ({"tools": 2000}, "tools: got 2000; there are"),
        ({"tool_tokens": 40}, "need more than 60 for a quotation of 20 tokens"),
        ({"question_tokens": 9}, "question_tokens: got 9, need at least"),
        ({"prompts": 0}, "prompts: got 0, want at least 1"),
    ],
)
def test_what_leaves_no_room(tokenizer: Any, fields: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are the test
        WORKLOADS.build({"name": "tool_docs", **fields}).samples(tokenizer)
    assert words in str(error.value)
