"""A tier that raises, or answers what is no answer: a miss, and all else goes on."""

from __future__ import annotations

from typing import Any

import pytest

from lmc.store.chunks import Chunks
from lmc.store.reads import THREADS
from lmc.store.tier import Attached
from tests.store.hanging import (
    CALLS,
    LAYOUT,
    NBYTES,
    Hanging,
    Plain,
    fetched,
    fetched_in_time,
    filled,
    given,
    record,
    rows,
)


class Raising(Hanging):
    """Raises whatever it is told to, from each call that is named."""

    def __init__(self) -> None:
        super().__init__()
        self.error: type[BaseException] = Exception
        self.broken: set[str] = set()

    def before(self, call: str) -> None:
        if call in self.broken:
            raise self.error(call)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("call", CALLS)
def test_whatever_a_tier_raises_is_a_miss(call: str, error: Any) -> None:
    tier, told = Raising(), []
    chunks = Chunks(
        LAYOUT, 64 * NBYTES, [Attached(tier, "through")], fetched=lambda *x: told.append(x)
    )
    tier.error, tier.broken = error, {call}
    for i in range(2 * THREADS):  # more than there are threads to lose
        tier.held[record(100 + i).id] = rows(1.0)
        assert fetched(chunks, record(100 + i)) == (call != "get")
        filled(chunks, record(i), 2.0)
        filled(chunks, record(i + 200), 2.0)
        assert chunks.drain(60)
        chunks.evict(i)
        chunks.evict(i + 200)
        chunks.evict(100 + i)
    assert chunks.drain(60)
    assert chunks.memory.size == 0 and len(told) == 2 * THREADS
    assert (chunks.counts["writes_failed:hanging"] > 0) == (call == "put")
    assert (chunks.counts["fetches_failed"] > 0) == (call == "get")
    tier.broken = set()
    tier.held[record(500).id] = rows(4.0)
    assert fetched(chunks, record(500)) and given(chunks, 500) == 4.0
    filled(chunks, record(501), 3.0)
    tier.broken = {"contains"}
    chunks.close()
    assert record(501).id in tier.held and tier.closed


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_whatever_a_handle_raises_is_a_miss(error: type[BaseException]) -> None:
    class Bad(Hanging):
        def get_many(self, wanted: Any) -> Any:
            raise error

    class Worse(Hanging):
        def get_many(self, wanted: Any) -> Any:
            return [self] * len(wanted)

        def poll(self) -> Any:
            raise error

        def cancel(self) -> None:
            raise error

    for tier in (Bad(), Worse()):
        chunks = Chunks(LAYOUT, 64 * NBYTES, [Attached(tier, "through")], patience_s=0.2)
        assert not fetched_in_time(chunks, record(1))
        filled(chunks, record(2), 1.0)
        chunks.close(2.0)
        assert record(2).id in tier.held


@pytest.mark.parametrize("answer", ["short", "none", "word", "nothing"])
def test_nonsense_in_place_of_handles_is_a_miss(answer: str) -> None:
    class Nonsense(Plain):
        def get_many(self, wanted: Any) -> Any:
            return {"short": [], "none": [None] * len(wanted), "word": "word", "nothing": None}[
                answer
            ]

    first, second = Nonsense(), Plain()
    chunks = Chunks(
        LAYOUT, 64 * NBYTES, [Attached(first, "back"), Attached(second, "through")], patience_s=5.0
    )
    for i in range(10):
        second.held[record(i).id] = rows(float(i))
        assert fetched(chunks, record(i)) and given(chunks, i) == i
    chunks.close()


def test_who_is_told_of_fetches_may_fail() -> None:
    tier = Hanging()
    tier.held[record(1).id] = tier.held[record(2).id] = rows(1.0)
    told: list[int] = []

    def tell(slot: int, whole: bool) -> None:
        told.append(slot)
        if slot == 1:
            raise SystemExit

    chunks = Chunks(LAYOUT, 2 * NBYTES, [Attached(tier, "through")], fetched=tell)
    assert not fetched(chunks, record(1)) and fetched(chunks, record(2))
    assert told == [1, 2] and not chunks._arrivals
    chunks.evict(1)  # as the scheduler has it of a chunk that was not there
    assert chunks.memory.size == NBYTES
    chunks.close()
