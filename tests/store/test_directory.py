"""What tiers are asked about a prompt: once, off the caller's thread, and each for itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from docs.example_tier import Remembering
from lmc.chunking.fixed import Fixed
from lmc.chunking.pieces import split
from lmc.model.layout import KVLayout
from lmc.store.breaker import Breaker
from lmc.store.directory import Asked, Directory
from lmc.store.index import Index
from lmc.store.keep import keep
from lmc.store.lookup import Known, find
from lmc.store.record import Record
from lmc.store.sections import Section, full_attention
from lmc.store.tier import Behind

LAYOUT = KVLayout(L=1, G=1, D=1, dtype="float32")
NS = b"namespace"
TOKENS = np.random.default_rng(0).integers(0, 9999, 4000)


class Counting(Remembering):
    """The example tier, that notes what it is asked, on which thread; it may hang or raise.

    Attributes:
        asked: of each call, how many keys and how many contexts.
    """

    def __init__(self, place: str, name: str = "counting", epoch: int | None = None) -> None:
        super().__init__(place)
        self.name, self.epoch = name, epoch
        self.asked: list[tuple[int, int]] = []
        self.threads: set[str] = set()
        self.open = threading.Event()
        self.open.set()
        self.error: type[BaseException] | None = None

    def lookup_many(
        self, namespace: bytes, keys: Sequence[bytes], behind: Sequence[Behind], deadline: float
    ) -> Any:
        self.asked.append((len(keys), len(behind)))
        self.threads.add(threading.current_thread().name)
        self.open.wait()
        if self.error is not None:
            raise self.error
        return super().lookup_many(namespace, keys, behind, deadline)


def pieces(tokens: np.ndarray, n: int = 100) -> Any:
    return split(tokens, Fixed(n))


def hold(tier: Counting, tokens: np.ndarray, n: int = 100) -> list[Record]:
    """Put every chunk of a prompt."""
    kept = keep(Index(1 << 30), NS, tokens, pieces(tokens, n), None, LAYOUT.bytes_per_token)
    records = [record for _, record in kept]
    for record in records:
        form = full_attention(LAYOUT, record.T)
        section = Section(form, [np.zeros(form.shape, np.uint8)])
        assert tier.put([(record, [section])])[0] in ("stored", "known")
    return records


def answered(
    directory: Directory, tokens: np.ndarray, reached: int = 0, before: Asked | None = None
) -> Asked:
    asked = directory.ask(NS, tokens, pieces(tokens), reached, before)
    assert asked.wait(time.monotonic() + 60)
    return asked


def found(asked: Asked, memory: Index | None = None) -> list[tuple[int, int, str]]:
    known = Known(memory or Index(1 << 30), NS, asked.answers)
    return [(f.start, f.end, f.kind) for f in find(asked.tokens, asked.pieces, known)]


@pytest.fixture
def tier(tmp_path: Any) -> Counting:
    return Counting(str(tmp_path))


def test_a_whole_prompt_is_one_question(tier: Counting) -> None:
    directory = Directory([tier], 60.0)
    hold(tier, TOKENS)
    assert found(answered(directory, TOKENS + 1)) == []
    asked = answered(directory, TOKENS)
    assert found(asked) == [(i, i + 100, "exact") for i in range(0, 4000, 100)]
    assert tier.asked == [(40, 1)] * 2 and not asked.unasked
    assert tier.threads == {"lmc-ask-counting"}
    (record, *_) = asked.answers[0].of(TOKENS[:100].astype("<i8").tobytes())
    assert asked.told_by(record.id) == 0 and asked.told_by(bytes(32)) is None
    directory.close(tiers=False)


def test_one_tier_that_hangs_takes_nothing_from_what_another_says(
    tier: Counting, tmp_path: Any
) -> None:
    hanging = Counting(str(tmp_path / "other"), name="hanging")
    hanging.open.clear()
    directory = Directory([hanging, tier], 0.2)
    hold(tier, TOKENS)
    asked = directory.ask(NS, TOKENS, pieces(TOKENS))
    assert not asked.over
    assert not asked.wait(asked.deadline) and asked.over
    assert [answers.told for answers in asked.answers] == [False, True]
    assert len(found(asked)) == 40
    hanging.open.set()
    directory.close(tiers=False)


def test_what_did_not_come_is_believed_when_it_is_told_of_anew(tier: Counting) -> None:
    directory = Directory([tier], 60.0)
    first, *_ = hold(tier, TOKENS)
    asked = answered(directory, TOKENS)
    directory.disbelieve(0, first.id)
    assert (0, 100, "exact") not in found(asked)
    assert len(found(asked)) == 39  # of the rest nothing is doubted
    tier.asked.clear()
    again = answered(directory, TOKENS)
    assert len(found(again)) == 40 and tier.asked == [(1, 1)]
    directory.close(tiers=False)


def test_what_was_cut_elsewhere_is_followed(tier: Counting) -> None:
    """By this prompt's cuts nothing of it is found; by what stands before each chunk all of it."""
    hold(tier, TOKENS, n=70)
    directory = Directory([tier], 60.0)
    asked = answered(directory, TOKENS)
    assert found(asked)[:2] == [(0, 70, "exact"), (70, 140, "exact")]
    assert sum(end - start for start, end, _ in found(asked)) == 4000
    assert not asked.unasked and len(tier.asked) < 60
    directory.close(tiers=False)


def test_what_goes_on_where_memory_ends_is_asked_for(tier: Counting) -> None:
    """And in a further round if what the tiers have brings more of memory into play."""
    records = hold(tier, TOKENS, n=70)
    memory = Index(1 << 30)
    kept = keep(memory, NS, TOKENS[:350], pieces(TOKENS[:350], 70), None, 8)
    for _, record in kept:
        memory.acknowledge(record.slot, 0)
    memory.drop(kept[3][1].slot)  # tokens 210 to 280
    tier.evict([*records[:3], records[4]])
    directory = Directory([tier], 60.0)
    here = found(Asked(NS, TOKENS, pieces(TOKENS), 0), memory)
    assert here == [(0, 70, "exact"), (70, 140, "exact"), (140, 210, "exact")]
    first = answered(directory, TOKENS, 210)
    assert found(first, memory)[3:] == [(210, 280, "exact"), (280, 350, "exact")]
    assert first.unasked
    second = answered(directory, TOKENS, 350, first)
    assert sum(end - start for start, end, _ in found(second, memory)) == 4000
    directory.close(tiers=False)


@pytest.mark.parametrize("epoch", [None, 1])
def test_answers_are_remembered_as_long_as_they_hold(tmp_path: Any, epoch: int | None) -> None:
    tier = Counting(str(tmp_path), epoch=epoch)
    hold(tier, TOKENS[:2000])
    directory = Directory([tier], 60.0)
    answered(directory, TOKENS)
    # And what goes on where those end that are there.
    assert tier.asked == [(40, 1), (0, 1)]
    answered(directory, TOKENS)
    # That something is not there may change at any time, where no epoch says so.
    assert tier.asked[2:] == ([(20, 0), (0, 1)] if epoch is None else [])
    hold(tier, TOKENS[:2500])
    tier.epoch = epoch and epoch + 1
    assert found(answered(directory, TOKENS))[-1] == (2400, 2500, "exact")
    directory.close(tiers=False)


def test_one_that_hangs_silences_only_itself(tmp_path: Any) -> None:
    hung, sound = Counting(str(tmp_path / "a"), "hung"), Counting(str(tmp_path / "b"), "sound")
    hold(sound, TOKENS)
    hung.open.clear()
    directory = Directory([hung, sound], 0.2)
    start = time.monotonic()
    asked = directory.ask(NS, TOKENS, pieces(TOKENS))
    assert time.monotonic() - start < 0.2  # nothing is waited for
    assert not asked.wait(asked.deadline)
    for _ in range(5):
        asked = answered(directory, TOKENS)
        assert len(found(asked)) == 40 and not asked.answers[0].told
    assert len(hung.asked) == 1 and not directory.breakers[0].closed
    assert directory.breakers[1].closed
    # It comes back, and is asked again after a rest; what waited for it meanwhile is let go.
    hung.open.set()
    directory.breakers[0]._until = time.monotonic()
    while not directory.breakers[0].closed:
        answered(directory, TOKENS)
    assert answered(directory, TOKENS).answers[0].told
    directory.close(tiers=False)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, GeneratorExit])
def test_whatever_one_raises_it_has_nothing(tier: Counting, error: type[BaseException]) -> None:
    hold(tier, TOKENS)
    directory = Directory([tier], 60.0)
    tier.error = error
    asked = answered(directory, TOKENS)
    assert found(asked) == [] and not asked.unasked
    tier.error = None
    assert len(found(answered(directory, TOKENS))) == 40
    directory.close(tiers=True)
    asked = directory.ask(NS, TOKENS, pieces(TOKENS))
    assert asked.over and found(asked) == []


def test_a_text_that_a_prompt_repeats_is_found_everywhere(tier: Counting) -> None:
    twice = np.concatenate([TOKENS[:100]] * 5)
    hold(tier, TOKENS[:100])
    directory = Directory([tier], 60.0)
    assert found(answered(directory, twice)) == [
        (0, 100, "exact"), *((i, i + 100, "moved") for i in range(100, 500, 100))
    ]  # fmt: skip
    directory.close(tiers=False)


def test_a_breaker_lets_one_trial_through_after_each_rest() -> None:
    now = [0.0]
    breaker = Breaker(10.0, lambda: now[0])
    assert breaker.closed and breaker.allows()
    breaker.late()
    breaker.late()
    breaker.answered()  # of a call from before
    assert not breaker.closed and not breaker.allows() and breaker.opened == 1
    now[0] = 10.0
    assert breaker.allows() and not breaker.allows()
    breaker.late()
    now[0] = 19.0
    assert not breaker.allows()
    now[0] = 20.0
    assert breaker.allows()
    breaker.answered()
    assert breaker.closed and breaker.allows() and breaker.allows()
    breaker.late()
    breaker.back()
    assert breaker.closed and breaker.opened == 2


def test_what_was_not_asked_for_is_not_believed(tier: Counting) -> None:
    """Slots of another process, other texts, other tenants: a tier may be anybody's."""
    hold(tier, TOKENS)
    other = Counting(f"{tier.name}, elsewhere")
    strange = hold(other, TOKENS + 1)
    told = tier.lookup_many

    def telling(namespace: bytes, keys: Any, behind: Any, deadline: float) -> Any:
        by_key, by_context = told(namespace, keys, behind, deadline)
        found = [[replace(r, slot=7) for r in records] for records in by_key]
        wrong = [strange[0], *(replace(r, namespace=b"x") for some in by_key for r in some)]
        return [[*wrong, *records] for records in found], [[*wrong, *r] for r in by_context]

    tier.lookup_many = telling  # type: ignore[method-assign]
    directory = Directory([tier], 60.0)
    asked = answered(directory, TOKENS)
    assert found(asked) == [(i, i + 100, "exact") for i in range(0, 4000, 100)]
    known = Known(Index(1 << 30), NS, asked.answers)
    assert {f.record.slot for f in find(asked.tokens, asked.pieces, known)} == {-1}
    assert {f.record.namespace for f in find(asked.tokens, asked.pieces, known)} == {NS}
    directory.close(tiers=False)
