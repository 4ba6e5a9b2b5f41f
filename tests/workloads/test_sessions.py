"""Sessions: a prompt is the one before it, its answer, and something new."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lmc.workloads import WORKLOADS
from lmc.workloads.frame import CHATML
from lmc.workloads.sample import Sample, corpus_of
from lmc.workloads.sessions import Agents, Chat

WORKLOAD = {"chat": Chat(), "agents": Agents(sessions=3, turns=12)}


@pytest.fixture(params=WORKLOAD)
def workload(request: pytest.FixtureRequest) -> Any:
    return WORKLOAD[request.param]


def sessions(workload: Any, tokenizer: Any) -> list[list[Sample]]:
    samples = workload.samples(tokenizer)
    assert len(samples) == workload.sessions * workload.turns
    return [samples[i :: workload.sessions] for i in range(workload.sessions)]


def files(session: list[Sample]) -> list[tuple[int, ...]]:
    """What each turn of an agent brings."""
    return [tuple(sample.chunks[-1]) for sample in session]


def test_a_turn_begins_as_the_one_before_with_its_answer(workload: Any, tokenizer: Any) -> None:
    goes_on = tokenizer.encode(CHATML.after_answer)
    for session in sessions(workload, tokenizer):
        said: list[int] = []
        for sample in session:
            prompt = sample.prompt.token_ids
            assert prompt[: len(said)] == said
            assert len(prompt) > len(said)
            said = prompt + sample.answer + goes_on


def test_turns_of_sessions_alternate(workload: Any, tokenizer: Any) -> None:
    samples = workload.samples(tokenizer)
    n = workload.sessions
    assert [len(s.chunks) for s in samples] == sorted(len(s.chunks) for s in samples)
    assert all(len(samples[i].chunks) < len(samples[i + n].chunks) for i in range(len(samples) - n))


def test_the_answer_stands_in_the_text_that_was_brought(workload: Any, tokenizer: Any) -> None:
    for session in sessions(workload, tokenizer):
        for sample in session:
            n = len(sample.answer)
            quoted = sample.question[-n:] + sample.answer
            texts = sample.chunks if isinstance(workload, Agents) else sample.chunks[:1]
            assert any(quoted == t[i : i + 2 * n] for t in texts for i in range(len(t)))


def test_conversations_share_nothing_but_the_system_text(tokenizer: Any) -> None:
    firsts = [tuple(session[0].chunks[0]) for session in sessions(Chat(), tokenizer)]
    assert len(set(firsts)) == 4
    assert all(len(first) == 512 for first in firsts)


def test_agents_read_again_what_they_and_others_have_read(tokenizer: Any) -> None:
    """Without edits: files of the repository alone, some twice in a session, most in two."""
    workload = Agents(sessions=3, turns=12, edit=0)
    repository = {tuple(d.token_ids[40:]) for d in corpus_of(workload, [], tokenizer)}
    assert len(repository) == 8
    read = [files(session) for session in sessions(workload, tokenizer)]
    assert all(set(each) <= repository for each in read)
    assert all(len(set(each)) < len(each) for each in read)
    assert set(read[0]) & set(read[1])
    assert len({tuple(each) for each in read}) == 3


def test_probabilities_are_probabilities(tokenizer: Any) -> None:
    every_file_first = Agents(sessions=2, turns=8, reread=0, edit=1)
    for session in sessions(every_file_first, tokenizer):
        assert len(set(files(session))) == 8
    one_file = Agents(sessions=2, turns=8, reread=1, edit=0)
    for session in sessions(one_file, tokenizer):
        assert len(set(files(session))) == 1


def test_an_edit_keeps_the_length_and_most_of_the_file(tokenizer: Any) -> None:
    workload = Agents(sessions=2, turns=6, reread=1, edit=1, edit_tokens=8)
    for session in sessions(workload, tokenizer):
        read = files(session)
        assert len(set(read)) > 1
        for before, after in pairwise(read):
            assert len(before) == len(after) == 256
            changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
            assert not changed or changed[-1] - changed[0] < 8


def test_the_seed_decides(workload: Any, tokenizer: Any) -> None:
    samples = workload.samples(tokenizer)
    assert type(workload)().samples(tokenizer) == type(workload)().samples(tokenizer)
    assert type(workload)(seed=1).samples(tokenizer) != samples


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "chat", "sessions": 500}, "sessions: got 500; there are"),
        ({"name": "chat", "turns": 0}, "turns: got 0, want at least 1"),
        ({"name": "chat", "question_tokens": 9}, "question_tokens: got 9, need at least"),
        ({"name": "chat", "document_tokens": 50}, "document_tokens: got 50, need more than 60"),
        ({"name": "agents", "files": 5000}, "files: got 5000; there are"),
        ({"name": "agents", "file_tokens": 40}, "file_tokens: got 40, need more than 60"),
        ({"name": "agents", "reread": 1.5}, "reread: got 1.5, want a probability"),
        ({"name": "agents", "edit_tokens": 300}, "edit_tokens: got 300, allowed: up to 256"),
    ],
)
def test_what_leaves_no_room(tokenizer: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are the test
        WORKLOADS.build(fields).samples(tokenizer)
    assert words in str(error.value)
