"""A prompt that another engine has computed: waited for until all of it is there, and apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.planning import Bench
from lmc.store import Record
from tests.connectors.vllm.shelf import ON_SHELF

NAME, T = "prompt-001", 1200
PROMPT: list[int] = np.random.default_rng(0).integers(0, 100_000, T).tolist()


def handed_over() -> tuple[Bench, list[Record]]:
    """An engine's scheduler, and what another one has handed over under `NAME`, in order."""
    bench = Bench(4000, tiers=["tests.connectors.vllm.shelf:Shelf"])
    ON_SHELF.clear()
    bench.ask(PROMPT, {"hand_over": NAME, "save": False})
    found = [entry.record for entry in bench.side.index._entries.values()]
    assert len({r.namespace for r in found}) == 1
    assert sum(r.T for r in found) == T and bench.side.keeping.counts["hand_overs:kept"] == 1
    bench.side.index.clear()
    return bench, sorted(found, key=lambda r: r.start)


def test_a_name_stands_for_one_prompt_computed_once() -> None:
    bench, _ = handed_over()
    bench.ask(PROMPT, {"hand_over": NAME, "save": False})
    before = [entry.record for entry in bench.side.index._entries.values()]
    # Blended otherwise it may be other KV: what is there stays, and the client is told.
    request = bench.arrive(PROMPT, {"hand_over": NAME, "save": False, "blend": "prefix"})
    assert bench.admit(request) is not None
    tracked = bench.side.requests[request.request_id]
    bench.finish(request)
    assert tracked.handed_over == "taken"
    assert [entry.record for entry in bench.side.index._entries.values()] == before
    # Another prompt finds nothing of it, and has a place of its own.
    longer = [*PROMPT, *PROMPT[:64]]
    other = bench.arrive(longer, {"handed": NAME})
    assert bench.side.requests[other.request_id].namespace != before[0].namespace
    assert looked(bench, other) is None
    bench.side.requests[other.request_id].asked = 1.0  # long ago
    assert looked(bench, other) == 0
    bench.finish(other)
    bench.ask(longer, {"hand_over": NAME, "save": False})
    assert bench.side.keeping.counts["hand_overs:kept"] == 3


def looked(bench: Bench, request: Any) -> int | None:
    """vLLM asks for a request once more, when it is time to look and tiers have answered."""
    bench.side.requests[request.request_id].looks = 0.0
    bench.answered(request)
    return bench.admit(request)


@pytest.mark.parametrize("shown", ["none", "first", "last", "middle", "all_but_one"])
def test_all_of_it_is_waited_for_whatever_comes_first(shown: str) -> None:
    bench, records = handed_over()
    n = len(records)
    some = {
        "none": [], "first": records[: n // 4], "last": records[n // 4 :],
        "middle": records[n // 4 : n // 2], "all_but_one": records[:3] + records[4:],
    }  # fmt: skip
    ON_SHELF[:] = some[shown]
    request = bench.arrive(PROMPT, {"handed": NAME})
    for _ in range(4):
        assert looked(bench, request) is None
    assert bench.side.admission.counts["deferred_for_hand_over"] >= 4
    ON_SHELF[:] = records
    assert next(n for n in (looked(bench, request) for _ in range(9)) if n is not None) == T - 1
    tracked = bench.side.requests[request.request_id]
    assert tracked.admitted is not None and not len(tracked.admitted.rows)
    assert tracked.report is not None and set(tracked.report["bytes"]) == {"host", "shelf"}
    assert tracked.report["bytes"]["host"] == 0 and tracked.blended_from == 0


def test_what_does_not_come_in_time_is_computed_under_hashes_of_its_own() -> None:
    bench, records = handed_over()
    hashes = []
    for there in ([], records[: len(records) // 2], records):
        ON_SHELF[:] = there
        request = bench.arrive(PROMPT, {"handed": NAME})
        if there != records:
            assert looked(bench, request) is None
        tracked = bench.side.requests[request.request_id]
        tracked.asked = 1.0  # long ago
        while (claimed := looked(bench, request)) is None:
            pass
        assert claimed == (T - 1 if there == records else sum(r.T for r in there))
        hashes.append(list(request.block_hashes))
        bench.finish(request)
        bench.manager.reset_prefix_cache()
        bench.side.index.clear()
    plain = bench.arrive(PROMPT, {"enabled": False})
    firsts = [of[0] for of in (*hashes, plain.block_hashes)]
    lasts = [of[-1] for of in (*hashes, plain.block_hashes)]
    assert len(set(lasts)) == 4 and firsts.count(plain.block_hashes[0]) == 1


def test_what_an_engine_holds_exactly_is_not_what_was_handed_over() -> None:
    bench, records = handed_over()
    first = bench.arrive(PROMPT, {"enabled": False})
    assert bench.admit(first) == 0
    bench.finish(first)
    ON_SHELF[:] = records
    request = bench.arrive(PROMPT, {"handed": NAME})
    bench.answered(request)
    assert bench.manager.get_computed_blocks(request)[1] == 0
    while (claimed := looked(bench, request)) is None:
        pass
    assert claimed == T - 1
