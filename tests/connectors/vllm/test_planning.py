"""The scheduler's side without an engine: what planning costs, and who waits for memory."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.planning import Bench, joined

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
