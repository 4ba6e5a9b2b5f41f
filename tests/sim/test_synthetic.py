"""Generators: the same seed gives the same trace, and what each claims can be seen in it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.chunking import CHUNKERS
from lmc.chunking.fixed import Fixed
from lmc.sim.kinds import KINDS
from lmc.sim.reuse import analyse
from lmc.sim.synthetic import GENERATORS, Truth
from lmc.sim.synthetic.questions import Rag
from lmc.sim.synthetic.sessions import Chat
from lmc.sim.trace import Request, accesses
from tests.sim.made import SMALL, facts, of_sessions, parts, small

NAMES = st.sampled_from(sorted(SMALL))


def test_every_generator_is_tested() -> None:
    assert GENERATORS.names() == sorted(SMALL)


@given(name=NAMES, seed=st.integers(0, 2**64))
def test_a_seed_decides_all(name: str, seed: int) -> None:
    one = facts(small(name, seed=seed))
    assert one == facts(small(name, seed=seed))
    assert one != facts(small(name, seed=seed + 1))


@given(
    name=NAMES,
    seed=st.integers(0, 1000),
    vocabulary=st.integers(1, 50),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_requests_are_well_formed(name: str, seed: int, vocabulary: int, spread: float) -> None:
    requests = small(name, seed=seed, vocabulary=vocabulary, spread=spread)
    assert all(a.timestamp <= b.timestamp for a, b in pairwise(requests))
    for r in requests:
        assert r.tokens is not None and r.tokens.dtype == np.int32
        assert r.input_tokens == len(r.tokens) and r.output_tokens >= 1
        assert r.tokens.min() >= 0 and r.tokens.max() < vocabulary
        borders = [0, *(end for *_, end in r.segments)]
        assert [start for _, start, _ in r.segments] == borders[:-1]
        assert borders[-1] == len(r.tokens)


@pytest.mark.parametrize("name", SMALL)
def test_defaults_are_small(name: str) -> None:
    requests = list(GENERATORS.build(name).requests())
    assert 200 <= len(requests) <= 500
    assert 1000 <= np.mean([r.input_tokens for r in requests]) <= 4000


@pytest.mark.parametrize("name", ["chat", "rag"])
def test_a_longer_trace_begins_as_the_shorter(name: str) -> None:
    number = {"chat": "sessions", "rag": "count"}[name]
    few, many = (of_sessions(small(name, **{number: n})) for n in (5, 9))
    assert [facts(few[s]) for s in few] == [facts(many[s]) for s in few]


def test_arrivals_are_poisson() -> None:
    requests = list(Rag(count=4000, rate=2.0, documents_per_prompt=0, system_tokens=0).requests())
    gaps = np.diff([r.timestamp for r in requests])
    # The standard error of the mean of 4,000 exponential gaps is 1.6%, of their deviation 3%.
    assert gaps.mean() == pytest.approx(0.5, rel=0.1)
    assert gaps.std() == pytest.approx(0.5, rel=0.15)


def test_lengths_have_the_mean_they_are_told() -> None:
    fields = {"documents_per_prompt": 0, "system_tokens": 0, "question_tokens": 200}
    lengths = [r.input_tokens for r in Rag(count=4000, **fields).requests()]
    assert np.mean(lengths) == pytest.approx(200, rel=0.05)
    assert np.std(np.log(lengths)) == pytest.approx(0.5, rel=0.05)
    assert {r.input_tokens for r in Rag(count=50, spread=0, **fields).requests()} == {200}


def test_rag_documents_depend_on_seed_and_number_alone() -> None:
    def documents(**fields: Any) -> dict[str, tuple[int, ...]]:
        named = [part for r in small("rag", **fields) for part in parts(r) if "doc" in part[0]]
        texts = dict(named)
        assert all(texts[name] == text for name, text in named)
        return texts

    one = documents()
    two = documents(count=70, zipf=0.0, documents=40, question_tokens=9, system_tokens=3)
    both = one.keys() & two.keys()
    assert len(both) > 5 and all(one[name] == two[name] for name in both)
    other = documents(seed=1)
    assert all(one[name] != other[name] for name in one.keys() & other.keys())


def test_rag_is_zipf() -> None:
    fields = {"documents_per_prompt": 1, "documents": 50, "system_tokens": 0, "document_tokens": 1}
    requests = Rag(count=5000, zipf=1.0, **fields).requests()
    drawn = Counter(r.segments[0][0] for r in requests)
    harmonic = sum(1 / k for k in range(1, 51))
    for rank in (0, 1, 4):
        # 5,000 draws: at most 5% standard error.
        assert drawn[f"document {rank}"] == pytest.approx(5000 / harmonic / (rank + 1), rel=0.2)
    even = Counter(r.segments[0][0] for r in Rag(count=5000, zipf=0.0, **fields).requests())
    assert max(even.values()) < 2 * 5000 / 50


def test_rag_reorder() -> None:
    def numbers(r: Request) -> list[int]:
        return [int(name.split()[1]) for name, *_ in r.segments if name.startswith("document")]

    shuffled, sorted_ = small("rag"), small("rag", reorder=False)
    assert all(len(set(numbers(r))) == 3 for r in shuffled)
    assert [sorted(numbers(r)) for r in shuffled] == [numbers(r) for r in sorted_]
    assert any(numbers(r) != sorted(numbers(r)) for r in shuffled)
    # Order is all that differs, and prefix caching sees it.
    fields: dict[str, Any] = {"count": 300, "documents": 6, "system_tokens": 0, "spread": 0}
    unique = [
        accesses(small("rag", reorder=reorder, **fields), Fixed(30)).unique
        for reorder in (True, False)
    ]
    assert unique[0] > unique[1]


def test_chat_prompts_grow() -> None:
    requests = small("chat", turns=4)
    sessions = of_sessions(requests)
    assert len(sessions) == 8
    assert [r.session for r in requests] != sorted(r.session for r in requests)  # interleaved
    assert len({parts(r)[0] for r in requests}) == 1  # one system prompt
    for turns in sessions.values():
        assert [name for name, _ in parts(turns[0])] == ["system", "user"]
        for before, after in pairwise(turns):
            assert parts(after)[: len(before.segments)] == parts(before)
            (answer, said), (role, _) = parts(after)[len(before.segments) :]
            assert (answer, role) == ("assistant", "user")
            assert len(said) == before.output_tokens


def test_chat_turns_are_geometric() -> None:
    fields = {"system_tokens": 0, "user_tokens": 1, "output_tokens": 1, "turns": 3}
    turns = Counter(r.session for r in Chat(sessions=2000, **fields).requests())
    lengths = np.array(list(turns.values()))
    assert lengths.mean() == pytest.approx(3, rel=0.1)
    assert (lengths == 1).mean() == pytest.approx(1 / 3, rel=0.15)


def reads(requests: list[Request]) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """The files that each session read, in order."""
    last = {s: turns[-1] for s, turns in of_sessions(requests).items()}
    return {s: [p for p in parts(r) if p[0].startswith("file")] for s, r in last.items()}


def test_agents_append_a_call_and_a_file() -> None:
    requests = small("agents")
    assert len({parts(r)[0] for r in requests}) == 1  # one system prompt
    for turns in of_sessions(requests).values():
        assert [name for name, _ in parts(turns[0])] == ["system", "task"]
        for before, after in pairwise(turns):
            assert parts(after)[: len(before.segments)] == parts(before)
            (call, text), (file, _) = parts(after)[len(before.segments) :]
            assert call == "call" and file.startswith("file")
            assert len(text) == before.output_tokens


def test_agents_share_the_files_of_a_repository() -> None:
    sessions = reads(small("agents", sessions=20, repositories=2, edit=0.0))
    texts: dict[str, set[tuple[int, ...]]] = {}
    for files in sessions.values():
        assert len({int(name.split()[1]) // 5 for name, _ in files}) <= 1
        for name, text in files:
            texts.setdefault(name, set()).add(text)
    assert len(texts) == 10  # of 2 repositories of 5
    assert all(len(copies) == 1 for copies in texts.values())


def test_agents_read_again_as_often_as_told() -> None:
    fields: dict[str, Any] = {"files": 500, "turns": 20, "sessions": 60, "edit": 0.0}
    for share in (0.0, 0.4, 1.0):
        again = total = 0
        for files in reads(small("agents", reread=share, **fields)).values():
            names = [name for name, _ in files]
            total += max(0, len(names) - 1)  # the first cannot be a second reading
            again += len(names) - len(set(names))
        assert total > 500
        assert again / total == pytest.approx(share, abs=0.08)


def test_agents_edit_a_run_of_a_file() -> None:
    changed = same = 0
    fields: dict[str, Any] = {"sessions": 40, "turns": 20, "edit_tokens": 4}
    for files in reads(small("agents", edit=0.5, reread=0.6, **fields)).values():
        copies: dict[str, tuple[int, ...]] = {}
        for name, text in files:
            if name in copies:
                before = np.array(copies[name])
                assert len(before) == len(text)
                at = np.flatnonzero(before != np.array(text))
                assert len(at) == 0 or at[-1] - at[0] < 4
                changed, same = changed + bool(len(at)), same + (len(at) == 0)
            copies[name] = text
    assert changed / (changed + same) == pytest.approx(0.5, abs=0.1)


def test_skills_share_nothing_in_front() -> None:
    seen: dict[str, tuple[int, ...]] = {}
    for r in small("skills"):
        (header, first), (system, second), *skills, (task, _) = parts(r)
        assert (header, system, task) == ("header", "system", "task")
        assert len(skills) == 3 and all(seen.setdefault(n, text) == text for n, text in skills)
        assert seen.setdefault("system", second) == second
        assert first not in seen.values()
        seen[r.session] = first


def test_a_clock_tells_another_time_every_period() -> None:
    told: dict[int, set[tuple[int, ...]]] = {}
    for r in small("clock"):
        clock = dict(parts(r))["clock"]
        told.setdefault(int(r.timestamp // 15), set()).add(clock)
    assert all(len(clocks) == 1 for clocks in told.values())
    assert len(set.union(*told.values())) == len(told) > 2


def test_tools_change_as_often_as_told() -> None:
    changed = kept = 0
    for requests in of_sessions(small("tools", sessions=60, turns=10, change=0.3)).values():
        tools = [[p for p in parts(r) if p[0].startswith("tool")] for r in requests]
        assert all(len(set(each)) == 4 for each in tools)
        for before, after in pairwise(tools):
            differ = sum(a != b for a, b in zip(before, after, strict=True))
            assert differ <= 1
            changed, kept = changed + differ, kept + (not differ)
    assert changed / (changed + kept) == pytest.approx(0.3, abs=0.08)


def test_a_relay_hands_on_all_that_was_said() -> None:
    roles: dict[str, tuple[int, ...]] = {}
    for requests in of_sessions(small("relay")).values():
        handed: list[tuple[str, tuple[int, ...]]] = []
        for r in requests:
            (role, text), *rest = parts(r)
            assert roles.setdefault(role, text) == text
            assert rest[: len(handed)] == handed and len(rest) == len(handed) + 1
            handed = rest
    assert len(roles) == 4 and len(set(roles.values())) == 4


@pytest.mark.parametrize("name", SMALL)
def test_the_truth_is_what_an_analysis_of_segments_finds(name: str) -> None:
    fields = {"edit": 0} if name == "agents" else {}
    truth = Truth()
    requests = list(truth.watch(small(name, seed=3, **fields)))
    found: Counter[str] = Counter()
    for done in analyse(requests, CHUNKERS.build("explicit"), scope="trace", spans=True):
        found.update(done.tokens())
    total = truth.tokens.total()
    assert total == found.total() == sum(r.input_tokens for r in requests)
    # A token in 32,000 agrees by chance.
    for kind in KINDS:
        assert abs(found[kind] - truth.tokens[kind]) <= total / 1000, kind


def test_the_truth_of_what_is_known_by_hand() -> None:
    def request(*texts: str) -> Request:
        ids = np.array([ord(c) for text in texts for c in text], np.int32)
        ends = np.cumsum([0, *map(len, texts)]).tolist()
        return Request(
            0.0, "", len(ids), 1, tokens=ids, segments=[("", *p) for p in pairwise(ends)]
        )

    truth = Truth()
    trace = [request("ab", "c", "ab"), request("ab", "d", "c", "dd"), request("d", "ab", "d")]
    assert list(truth.watch(trace)) == trace
    # ab c new, ab again within; ab prefix, d new, c moved, dd new; d moved, ab moved, d moved.
    assert truth.tokens == {"prefix": 2, "moved": 1 + 4, "repeated_within": 2, "new": 3 + 1 + 2}
    assert sum(truth.shares.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="truth: got a request whose segments"):
        list(truth.watch([Request(0.0, "", 3, 1)]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "rag", "documents": 3}, "documents_per_prompt 5, want at most documents 3"),
        ({"name": "rag", "rate": 0}, r"rate 0\.0, want a number above 0"),
        ({"name": "rag", "rate": float("inf")}, "rate inf"),
        ({"name": "rag", "zipf": float("nan")}, "zipf nan"),
        ({"name": "rag", "seed": -1}, "seed -1"),
        ({"name": "rag", "vocabulary": 0}, "vocabulary 0, want a number of at least 1"),
        ({"name": "rag", "vocabulary": 2**31 + 1}, "want at most"),
        ({"name": "chat", "turns": 0.5}, r"turns 0\.5, want a number of at least 1"),
        ({"name": "chat", "turn": 5}, "unknown field turn; valid: seed, .*turns"),
        ({"name": "agents", "reread": 1.5}, r"reread 1\.5, want a share from 0 to 1"),
        ({"name": "agents", "files": "many"}, "files: .*integer"),
        ({"name": "skills", "skills": 2}, "skills_per_prompt 3, want at most skills 2"),
        ({"name": "tools", "tools": 2}, "tools_per_session 8, want at most tools 2"),
        ({"name": "clock", "period": 0}, r"period 0\.0, want a number above 0"),
        ({"name": "relay", "agents": 0}, "agents 0, want a number of at least 1"),
        ({"name": "dag"}, "unknown generator: got 'dag'; valid: agents, chat, clock, rag"),
    ],
)
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GENERATORS.build(config)
