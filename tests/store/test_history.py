"""What is remembered of texts that are gone: why, whose, and however they were cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.chunking.pieces import Piece
from lmc.store import Index
from lmc.store.causes import CAUSES, FOLDED, told
from lmc.store.history import PLACES, WINDOW, WINDOWS, History
from lmc.store.keep import keep

MODEL, OTHER_MODEL = b"m" * 32, b"o" * 32
RNG = np.random.default_rng(0)


def text(T: int) -> np.ndarray:
    return RNG.integers(0, 50_000, T)


def put(index: Index, tokens: np.ndarray, namespace: bytes = MODEL, closed: bool = True) -> None:
    for _, record in keep(index, namespace, tokens, [Piece(0, len(tokens), closed)], None, 1):
        index.acknowledge(record.slot, 0)


def content(tokens: np.ndarray) -> bytes:
    return tokens.astype("<i8").tobytes()


def test_why_a_text_is_not_stored() -> None:
    history = History()
    index = Index(100, history=history)
    first, second = text(60), text(70)
    put(index, first)
    assert history.own(MODEL, content(first)) is None
    put(index, second)
    assert history.own(MODEL, content(first)) == "evicted"
    index.drop(next(iter(index._entries)))
    assert history.own(MODEL, content(second)) == "lost"
    put(index, first)
    index.clear()
    assert history.own(MODEL, content(first)) == "reset"
    long = text(101)
    put(index, long)
    assert history.own(MODEL, content(long)) == "no_room"
    end = text(20)
    put(index, end, closed=False)
    assert history.own(MODEL, content(end)) == "open_end"
    assert history.own(MODEL, content(text(20))) is None


def test_what_expired() -> None:
    now, history = [0.0], History()
    policy = {"name": "ttl", "seconds": 60}
    index = Index(100, policy=policy, clock=lambda: now[0], history=history)
    first = text(60)
    put(index, first)
    now[0] = 61.0
    assert index.variants(MODEL, content(first)) == []
    assert history.own(MODEL, content(first)) == "expired"


def test_tenants_and_weights() -> None:
    history = History()
    index = Index(100, history=history)
    first, second = text(60), text(70)
    put(index, first, MODEL + b"a")
    # Stored by a; b has not seen it, and neither has a with other weights.
    assert history.own(MODEL + b"b", content(first)) is None
    assert history.of_others(MODEL + b"b", content(first))
    assert not history.of_others(MODEL + b"a", content(first))
    put(index, second, MODEL + b"a")
    assert history.own(MODEL + b"a", content(first)) == "evicted"
    assert history.own(OTHER_MODEL + b"a", content(first)) == "other_weights"
    assert history.own(OTHER_MODEL + b"b", content(first)) is None


def test_a_better_variant_in_its_place_is_no_loss() -> None:
    history = History()
    index = Index(1000, exact_variants=1, history=history)
    document = text(50)
    for _ in range(3):
        before = text(20)
        both = np.concatenate([before, document])
        pieces = [Piece(0, 20), Piece(20, 70)]
        for _, record in keep(index, MODEL, both, pieces, None, 1):
            index.acknowledge(record.slot, 0)
    assert history.own(MODEL, content(document)) is None


@given(st.integers(0, 300), st.integers(0, 300), st.integers(WINDOW, 400))
def test_text_is_known_wherever_it_stands(before: int, behind: int, T: int) -> None:
    history, document = History(), text(T)
    history.saw(MODEL, np.concatenate([text(before), document, text(behind)]))
    starts, known = history.seen(MODEL, np.concatenate([text(behind), document, text(before)]))
    inside = (starts >= behind) & (starts + WINDOW <= behind + T)
    # Two of a hundred windows have one place now and then: the later one is remembered.
    assert (~known[inside]).sum() <= 2 and not known[~inside].any()
    assert not history.seen(MODEL + b"a", document)[1].any()  # another tenant's are others


def test_it_takes_no_more_however_much_is_stored() -> None:
    history = History()
    index = Index(1 << 16, history=history)
    texts = [text(60) for _ in range(300)]
    for one in texts:
        put(index, one)
    assert history.own(MODEL, content(texts[0])) is None  # it is there
    sizes = {len(history._own), len(history._any), len(history._windows)}
    assert sizes == {PLACES, WINDOWS}


def test_what_is_long_past_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes that have one place: the latest is remembered."""
    monkeypatch.setattr("lmc.store.history.PLACES", 1)
    history = History()
    index = Index(10, history=history)
    texts = [text(T) for T in (8, 9, 10)]
    for one in texts:
        put(index, one)
    causes = [history.own(MODEL, content(one)) for one in texts]
    assert causes == [None, "evicted", None]


def test_clients_are_told_of_no_other_salts() -> None:
    assert set(FOLDED.values()) <= CAUSES.keys() >= FOLDED.keys()
    assert told("other_salt") == told("never_seen") == "never_seen"
    assert told("evicted") == "evicted" and told(None) is None
