"""What one request computes others wait for, in one engine and in two that share a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.planning import Bench
from lmc.store.disk.tier import Disk
from lmc.store.sections import Section, full_attention

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What must be done within some time may take the machine longer, where that is not tested."""
    hasty(monkeypatch, 20.0)


def hasty(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.25) -> None:
    """As engines are: who does not answer, or begin, by then is not waited for."""
    for name in (
        "lmc.connectors.vllm.flights.ANSWER_S",
        "lmc.connectors.vllm.flights.QUEUED_S",
        "lmc.store.flights.QUEUED_S",
    ):
        monkeypatch.setattr(name, seconds)


def text(n: int) -> list[int]:
    return RNG.integers(0, 100_000, n).tolist()  # type: ignore[no-any-return]


def ask(bench: Bench, request: Any) -> int | None:
    """What is claimed for a request that vLLM would admit; None where it waits."""
    _, local, *_ = bench.manager.get_computed_blocks(request)
    return bench.side.matched_tokens(request, local)


def until(said: Callable[[], Any], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not said():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def moved(*documents: list[int]) -> list[int]:
    return [*text(30), *(token for d in documents for token in d), *text(40)]


def spans(*documents: list[int]) -> list[list[int]]:
    out, at = [], 30
    for document in documents:
        out.append([at, at + len(document)])
        at += len(document)
    return out


def test_who_needs_the_same_documents_waits_until_they_are_stored() -> None:
    bench = Bench(4000)
    a, b = text(400), text(500)
    first = bench.arrive(moved(a, b), {"chunks": spans(a, b)})
    second = bench.arrive(moved(b, a), {"chunks": spans(b, a)})
    other = bench.arrive(text(600), {})
    assert ask(bench, first) == 0
    assert ask(bench, second) is None
    assert ask(bench, other) == 0
    assert ask(bench, second) is None
    bench.admit(first)
    time.sleep(0.06)
    claimed = bench.admit(second)
    assert claimed is not None and claimed >= 900
    counts = bench.side.flights.counts
    assert (counts["flights_followed"], counts["flights_in_vain"]) == (1, 0)
    other.status = type(other.status).FINISHED_ABORTED
    bench.side.finish(other, [])
    for request in (first, second):
        bench.finish(request)
    assert not bench.side.flights._owners


def test_nobody_waits_where_what_is_left_to_compute_is_long_beside_it() -> None:
    bench = Bench(9000)
    common = text(300)
    long = bench.arrive([*text(30), *common, *text(6000)], {"chunks": [[30, 330]]})
    short = bench.arrive([*text(50), *common, *text(40)], {"chunks": [[50, 350]]})
    assert ask(bench, long) == 0
    assert ask(bench, short) == 0


@pytest.mark.parametrize("end", ["finished", "given_up"])
def test_one_that_ends_before_it_is_computed_is_waited_for_no_more(end: str) -> None:
    bench = Bench(4000)
    a = text(900)
    first, second = (bench.arrive(moved(a), {"chunks": spans(a)}) for _ in range(2))
    third = bench.arrive(moved(a), {"chunks": spans(a)})
    assert ask(bench, first) == 0
    assert ask(bench, second) is None and ask(bench, third) is None
    if end == "finished":
        first.status = type(first.status).FINISHED_ABORTED
        bench.side.finish(first, [])
    else:
        bench.side._give_up(first, ValueError("x"), 0)
    time.sleep(0.06)
    assert ask(bench, second) == 0  # it computes now
    assert bench.side.requests[second.request_id].waiting.over  # type: ignore[union-attr]


def test_who_has_waited_long_enough_computes_it_itself() -> None:
    bench = Bench(4000)
    bench.side.flights._patience_s = 0.2
    a = text(900)
    first, second = (bench.arrive(moved(a), {"chunks": spans(a)}) for _ in range(2))
    assert ask(bench, first) == 0
    assert ask(bench, second) is None
    assert until(lambda: ask(bench, second) == 0)
    assert bench.side.flights.counts["flights_in_vain"] == 1


def test_nobody_waits_with_a_patience_of_nothing_nor_for_one_that_is_not_stored() -> None:
    for lmc, patience in (({}, 0.0), ({"save": False}, 10.0)):
        bench = Bench(4000)
        bench.side.flights._patience_s = patience
        a = text(900)
        first, second = (bench.arrive(moved(a), {"chunks": spans(a)} | lmc) for _ in range(2))
        assert ask(bench, first) == 0 == ask(bench, second)


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Bench, Bench]]:
    """Engines of one model that share a folder."""
    monkeypatch.setattr("lmc.connectors.vllm.identity.weights_of", lambda config: b"w" * 32)
    tier = {"name": "disk", "path": str(tmp_path / "kv"), "capacity": "4GiB"}
    benches = (Bench(4000, tiers=[tier]), Bench(4000, tiers=[tier]))
    yield benches
    for bench in benches:
        bench.side.close()


def settled(bench: Bench, request: Any) -> None:
    """Until its engine has decided whether it waits for others."""
    tracked = bench.side.requests[request.request_id]

    def decided() -> bool:
        claimed = ask(bench, request)
        waiting = tracked.waiting
        return claimed is not None or bool(waiting and waiting.waited)

    assert until(decided)


def put(bench: Bench, path: Path) -> None:
    """As its workers do: the tier gets what host memory holds."""
    disk = Disk(path, 4 << 30, layout=bench.side.layout)
    for entry in list(bench.side.index._entries.values()):
        form = full_attention(bench.side.layout, entry.record.T)
        section = Section(form, [np.zeros(form.shape, np.uint8)])
        assert disk.put([(entry.record, [section])]) == ["stored"]
    disk.close()


@pytest.mark.parametrize("same", [True, False], ids=["the_same_prompt", "the_same_documents"])
def test_an_engine_waits_for_what_another_computes(
    two: tuple[Bench, Bench], tmp_path: Path, same: bool
) -> None:
    one, other = two
    a, b = text(200), text(180)
    prompt, chunks = moved(a, b), spans(a, b)
    first = one.arrive(prompt, {"chunks": chunks})
    second = other.arrive(
        prompt if same else moved(b, a), {"chunks": chunks if same else spans(b, a)}
    )
    assert until(lambda: ask(one, first) == 0)
    settled(other, second)
    assert ask(other, second) is None
    one.admit(first)
    assert ask(other, second) is None
    put(one, tmp_path / "kv")
    found: list[int | None] = []
    assert until(lambda: found.append(ask(other, second)) or found[-1] is not None)
    assert found[-1] is not None and found[-1] >= 380
    assert +other.side.flights.counts == {"flights_followed": 1}


@pytest.mark.parametrize("here", [True, False], ids=["one_engine", "two_engines"])
def test_a_step_may_take_longer_than_anything_else_that_is_waited_for(
    two: tuple[Bench, Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    """Who needs the same documents meanwhile waits until the workers have stored them."""
    monkeypatch.setattr("lmc.connectors.vllm.flights.LINGER_S", 0.1)
    one, other = two[0], two[0 if here else 1]
    other.side.admission._patience_s = 0.1
    a = text(600)
    first = one.arrive(moved(a), {"chunks": spans(a)})
    second = other.arrive(moved(a), {"chunks": spans(a)})
    assert until(lambda: ask(one, first) == 0)
    reports: list[Any] = []
    with monkeypatch.context() as computing:
        computing.setattr(one.side, "heard", reports.append)
        one.admit(first)
    settled(other, second)
    ends = time.monotonic() + 1.5
    while time.monotonic() < ends:
        assert ask(other, second) is None
        time.sleep(0.02)
    put(one, tmp_path / "kv")
    for report in reports:
        one.side.heard(report)
    found: list[int | None] = []
    assert until(lambda: found.append(ask(other, second)) or found[-1] is not None)
    assert found[-1] is not None and found[-1] >= 500
    assert +other.side.flights.counts == {"flights_followed": 1}
    assert not one.side.flights._storing and not one.side.flights._owners


def test_an_engine_that_is_gone_or_gives_up_is_waited_for_no_more(
    two: tuple[Bench, Bench],
) -> None:
    one, other = two
    a = text(600)
    for gone in (False, True):
        first = one.arrive(moved(a), {"chunks": spans(a)})
        second = other.arrive(moved(a), {"chunks": spans(a)})
        assert until(lambda r=first: ask(one, r) == 0)  # type: ignore[misc]
        settled(other, second)
        assert ask(other, second) is None
        if gone:
            one.side.flights.close()  # its file goes, as it would by itself soon
        else:
            first.status = type(first.status).FINISHED_ABORTED
            one.side.finish(first, [])
        assert until(lambda r=second: ask(other, r) == 0)  # type: ignore[misc]
        second.status = type(second.status).FINISHED_ABORTED
        other.side.finish(second, [])
    assert other.side.flights.counts["flights_in_vain"] == 0


def test_of_two_that_come_at_once_one_computes_and_nobody_waits_for_each_other(
    two: tuple[Bench, Bench],
) -> None:
    """Each has one document alone and one in common, or both, in the other order."""
    rng = np.random.default_rng(1)
    for _ in range(8):
        pool = [text(300) for _ in range(3)]
        requests = []
        for bench in two:
            documents = [pool[i] for i in rng.permutation(3)[: rng.integers(2, 4)]]
            requests.append(bench.arrive(moved(*documents), {"chunks": spans(*documents)}))
        for bench, request in zip(two, requests, strict=True):
            ask(bench, request)
        for bench, request in zip(two, requests, strict=True):
            settled(bench, request)
        waits = [ask(b, r) is None for b, r in zip(two, requests, strict=True)]
        assert sum(waits) <= 1
        for bench, request in zip(two, requests, strict=True):
            request.status = type(request.status).FINISHED_ABORTED
            bench.side.finish(request, [])
        assert until(lambda: not any(b.side.flights._others._flying for b in two))


def test_a_folder_that_hangs_makes_nobody_wait(
    two: tuple[Bench, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty(monkeypatch)
    one, _ = two
    shared = one.side.planner.shared_flights
    assert shared is not None
    monkeypatch.setattr(shared, "begin", lambda names, asked: time.sleep(3600))
    first, second = (one.arrive(text(700), {}) for _ in range(2))
    start = time.monotonic()
    assert until(lambda: ask(one, first) == 0)
    assert time.monotonic() - start < 5
    assert ask(one, second) == 0  # it is left alone for a while
    assert one.side.flights.counts["flights_unanswered"] == 1


def aborted(bench: Bench, request: Any) -> None:
    """Its client has hung up."""
    request.status = type(request.status).FINISHED_ABORTED
    bench.side.finish(request, [])


def test_when_the_first_one_hangs_up_one_of_those_that_wait_computes() -> None:
    bench = Bench(12_000)
    a = text(900)
    first, *rest = (bench.arrive(moved(a), {"chunks": spans(a)}) for _ in range(6))
    assert ask(bench, first) == 0
    assert [ask(bench, request) for request in rest] == [None] * 5
    aborted(bench, first)
    time.sleep(0.06)
    assert sum(ask(bench, request) == 0 for request in rest) == 1
    assert ask(bench, bench.arrive(moved(a), {"chunks": spans(a)})) is None


def test_one_whose_kv_is_not_stored_after_all_is_waited_for_no_more() -> None:
    bench = Bench(4000)
    a = text(900)
    first, second = (bench.arrive(moved(a), {"chunks": spans(a)}) for _ in range(2))
    assert ask(bench, first) == 0
    assert ask(bench, second) is None
    bench.side.requests[first.request_id].unsaved = True
    bench.admit(first)  # its prompt is computed, and it decodes on
    time.sleep(0.06)
    assert ask(bench, second) == 0
    assert not bench.side.requests[first.request_id].leads


def test_one_that_cannot_begin_is_waited_for_no_more(
    two: tuple[Bench, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty(monkeypatch, 1.0)
    one, other = two
    a = text(900)
    first, here = (one.arrive(moved(a), {"chunks": spans(a)}) for _ in range(2))
    there = other.arrive(moved(a), {"chunks": spans(a)})
    assert until(lambda: ask(one, first) == 0)  # and vLLM has no pages for it
    settled(other, there)
    assert ask(one, here) is None and ask(other, there) is None
    begun = time.monotonic()
    for bench, request in ((other, there), (one, here)):
        assert until(lambda b=bench, r=request: ask(b, r) == 0)  # type: ignore[misc]
    assert time.monotonic() - begun < 8
    for bench, request in ((other, there), (one, here), (one, first)):
        bench.admit(request)  # each takes its turn as it can
    for bench, request in ((one, first), (one, here), (other, there)):
        bench.finish(request)
    assert not one.side.flights._owners


def test_a_look_that_takes_long_puts_nobody_off_beyond_the_end_of_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(4000)
    flights = bench.side.flights
    flights._patience_s = 0.5
    a = text(900)
    first, second = (bench.arrive(moved(a), {"chunks": spans(a)}) for _ in range(2))
    assert ask(bench, first) == 0
    bench.side.requests[first.request_id].report = {}  # it runs
    still = flights._still
    monkeypatch.setattr(flights, "_still", lambda *of: time.sleep(0.2) or still(*of))
    begun = time.monotonic()
    assert until(lambda: ask(bench, second) == 0)
    assert time.monotonic() - begun < 1.5  # and not the ninefold of a look


def test_who_hangs_up_while_it_waits_counts_as_no_prompt() -> None:
    bench = Bench(4000)
    a = text(900)
    first, second = (bench.arrive(moved(a), {"chunks": spans(a)}) for _ in range(2))
    assert ask(bench, first) == 0 and ask(bench, second) is None
    bench.side.take_stats()
    aborted(bench, second)
    counts = bench.side.take_stats().data.get("counts", {})
    assert not [name for name in counts if name.startswith(("tokens", "misses"))], counts
