"""The scheduler's side without an engine: what planning costs, and who waits for memory."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.planning import Bench, joined
from lmc.connectors.vllm.messages import WorkerReport
from lmc.store import Record
from tests.connectors.vllm.shelf import ON_SHELF

RNG = np.random.default_rng(0)


def text(n: int) -> list[int]:
    return RNG.integers(0, 100_000, n).tolist()  # type: ignore[no-any-return]


def seconds(T: int) -> dict[str, float]:
    """Of a prompt of T tokens whose documents are all moved, and of one that is all new."""
    bench = Bench(T + 100)
    documents = [text(1000) for _ in range(T // 1000)]
    for document in documents:
        bench.ask(text(30) + document, {})
    least = {"moved": np.inf, "new": np.inf}
    for _ in range(4):
        RNG.shuffle(documents)
        moved = bench.ask(joined(documents) + text(40), {"blend": "epic"})
        assert moved["claimed"] > 0.9 * T
        least["moved"] = min(least["moved"], moved["plan"] + moved["keep"])
        new = bench.ask(text(T), {})
        least["new"] = min(least["new"], new["plan"] + new["keep"])
    return least


@pytest.mark.heavy
def test_what_a_request_costs_grows_as_its_prompt_does() -> None:
    for _ in range(3):  # others may use the machine
        short, long = seconds(4000), seconds(32_000)
        ratios = {kind: long[kind] / short[kind] for kind in short}
        if max(ratios.values()) < 8 * 1.5:
            return
    raise AssertionError(ratios)


def test_who_is_first_in_line_for_memory_is_served_before_those_that_need_less() -> None:
    bench = Bench(4000, memory_bytes=4000 * 131_072)
    large, small, other = text(2500), text(300), text(320)
    for document in (large, small, other):
        bench.ask(document, {})
    held = bench.arrive([*other, *text(40)], {"save": False})
    bench.side.local.manager.get_computed_blocks(held)
    assert bench.side.matched_tokens(held, 0)  # vLLM has found no blocks for it yet
    first = bench.arrive([*large, *text(40)], {"save": False})
    behind = bench.arrive([*small, *text(40)], {"save": False})
    nothing = bench.arrive(text(60), {"save": False})
    assert bench.admit(first) is None  # more than half of memory beside what is held
    assert bench.admit(behind) is None  # though there would be room
    assert bench.admit(nothing) == 0  # it needs none
    assert bench.admit(held) == 320
    assert bench.admit(first) == 2500
    assert bench.admit(behind) == 300
    assert bench.side.admission.counts["deferred_for_memory"] == 2
    for request in (nothing, held, first, behind):
        bench.finish(request)
    assert bench.side.planner._kept == 0
    assert not any(entry.leases for entry in bench.side.index._entries.values())


def test_claims_of_one_step_add_a_sixteenth_of_what_vllm_computes_unless_told() -> None:
    bench = Bench(4000)  # 8,192 tokens a step
    documents = [text(700) for _ in range(4)]
    for document in documents:
        bench.ask(document, {})
    blend = {"name": "epic", "link_tokens": 180}
    prompts = [[*text(30), *document, *text(40)] for document in documents]
    spans = {"chunks": [[30, 730]], "blend": blend, "save": False}
    requests = [bench.arrive(prompt, spans) for prompt in prompts]
    admitted = []
    with pytest.MonkeyPatch.context() as one_step:
        one_step.setattr(bench, "step", lambda *of: None)
        for request in requests:
            admitted.append(bench.admit(request) is not None)
    assert admitted == [True, True, False, False]  # of 210 rows each
    assert bench.side.admission.counts["deferred_for_rows"] == 2


def test_who_waited_for_memory_is_planned_again_when_its_turn_comes() -> None:
    bench = Bench(4000, memory_bytes=4000 * 131_072)
    large, other, late = text(2500), text(320), text(200)
    for document in (large, other):
        bench.ask(document, {})
    held = bench.arrive([*other, *text(40)], {"save": False})
    assert bench.side.matched_tokens(held, 0)
    first = bench.arrive([*text(30), *late, *large], {"save": False, "blend": "full_reuse"})
    assert bench.admit(first) is None
    bench.ask(late, {})  # stored while it waits
    assert bench.admit(first) is None
    assert bench.admit(held) == 320
    claimed = bench.admit(first)
    assert claimed is not None and claimed > 2650
    assert bench.side.admission.counts["planned_again"] == 1


def test_one_that_leaves_the_line_blocks_nobody() -> None:
    bench = Bench(4000, memory_bytes=4000 * 131_072)
    large, small, other = text(2500), text(300), text(320)
    for document in (large, small, other):
        bench.ask(document, {})
    held = bench.arrive([*other, *text(40)], {"save": False})
    assert bench.side.matched_tokens(held, 0)
    first = bench.arrive([*large, *text(40)], {"save": False})
    behind = bench.arrive([*small, *text(40)], {"save": False})
    assert bench.admit(first) is None and bench.admit(behind) is None
    first.status = type(first.status).FINISHED_ABORTED
    bench.side.finish(first, [])
    assert bench.admit(behind) == 300


def test_who_shares_a_fetch_waits_as_long_for_it_and_takes_it_from_nobody() -> None:
    """A fetch that another request began; and what that one uses, when the second gives up."""
    bench = Bench(4000, tiers=["tests.connectors.vllm.shelf:Shelf"])
    document, side = text(400), bench.side
    bench.ask(document, {})
    ON_SHELF[:] = [entry.record for entry in side.index._entries.values()]
    side.index.clear()
    running = bench.arrive(text(50), {"save": False})
    bench.answered(running)
    assert bench.admit(running) == 0  # so that others wait for what they have fetched
    one, two = (bench.arrive([*document, *text(40)], {"save": False}) for _ in range(2))
    for request in (one, two):
        bench.answered(request)
    for _ in range(3):
        assert bench.admit(one) is None and bench.admit(two) is None
    assert side.admission.counts["deferred_for_fetch"] == 6
    (breaker,) = side.planner.directory.breakers
    assert breaker.closed
    fetched = [record.slot for record in side.planner.take_fetches()]
    assert len(fetched) == len(set(fetched)) > 5
    # The second has waited long enough; the first still wants what is on its way.
    side.requests[two.request_id].fetching -= 10
    assert bench.admit(two) == 0
    assert not breaker.closed and side.index.take_freed() == []
    assert [side.index._entries[slot].leases for slot in fetched] == [1] * len(fetched)
    assert bench.admit(one) is None
    for slot in fetched:
        side.index.acknowledge(slot, 0)
    assert bench.admit(one) == 0  # vLLM has what the second computed
    assert side.admission.counts["replanned"] == 1


@dataclass(frozen=True)
class Asking:
    """A tier that says what it has when it is let, and hangs until then."""

    write: str = "through"

    def open(self, layout: Any, **options: Any) -> Any:
        def lookup_many(
            namespace: bytes, keys: Sequence[bytes], behind: Sequence[Any], deadline: float
        ) -> tuple[list[list[Record]], list[list[Record]]]:
            ON_THREADS.add(threading.current_thread().name)
            LET.wait()
            found = [[replace(r, slot=-1) for r in ON_SHELF if r.key == key] for key in keys]
            return found, [[] for _ in behind]

        return SimpleNamespace(
            name="asking", counts=Counter(), epoch=None, lookup_many=lookup_many,
            close=lambda: None,
        )  # fmt: skip


LET, ON_THREADS = threading.Event(), set[str]()


def test_a_tier_is_asked_off_the_schedulers_thread_and_waited_for_with_a_limit() -> None:
    """What it has is planned with when it has answered; what never comes is done without."""
    LET.set()
    bench = Bench(4000, tiers=["tests.connectors.vllm.test_planning:Asking"])
    document, side = text(400), bench.side
    bench.ask(document, {})
    ON_SHELF[:] = [entry.record for entry in side.index._entries.values()]
    side.index.clear()
    side.planner.directory.patience_s = 60.0
    LET.clear()
    # One behind a text of its own, or vLLM itself would have of it what the other computes.
    prompts = [*document, *text(40)], [*text(20), *document]
    late, never = (bench.arrive(prompt, {"save": False}) for prompt in prompts)
    assert bench.admit(late) is None and bench.admit(never) is None
    assert side.admission.counts["deferred_for_lookup"] == 2
    assert side.planner.take_fetches() == []
    # Its patience is over: it is served without, and nobody else is asked to wait.
    lookup = side.requests[never.request_id].lookup
    assert lookup is not None
    lookup.deadline = time.monotonic() - 1
    assert bench.admit(never) == 0 and side.planner.take_fetches() == []
    LET.set()
    bench.answered(late)
    bench.admit(late)
    assert side.admission.counts["planned_again"] == 1, side.admission.counts
    assert len(side.planner.take_fetches()) > 5
    assert {"lmc-ask-asking"} == ON_THREADS
    side.close()


def test_what_a_tier_told_of_and_does_not_bring_is_done_without_at_once() -> None:
    """A chunk that is damaged, or gone by the time that it is fetched, while others run."""
    bench = Bench(4000, tiers=["tests.connectors.vllm.shelf:Shelf"])
    document, side = text(900), bench.side
    bench.ask(document, {})
    ON_SHELF[:] = [entry.record for entry in side.index._entries.values() if not entry.record.tail]
    side.index.clear()
    running = bench.arrive(text(50), {"save": False})
    bench.answered(running)
    assert bench.admit(running) == 0
    request = bench.arrive([*document, *text(40)], {"save": False})
    bench.answered(request)
    gone, fetched, asked = ON_SHELF[0].id, Counter[bytes](), 0
    while (claimed := bench.admit(request)) is None:
        asked += 1
        assert asked < 10
        fetches = side.planner.take_fetches()
        fetched.update(record.id for record in fetches)
        lost = [record.slot for record in fetches if record.id == gone]
        here = [(record.slot, 0) for record in fetches if record.id != gone]
        side.heard(WorkerReport(saved=here, lost=lost))
    assert claimed > 0 and fetched[gone] == 1
    missing = side.planner.directory._desks[0].missing
    assert set(missing) == {gone}
