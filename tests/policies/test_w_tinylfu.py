"""W-TinyLFU and the sketch that it counts in."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmc.policies import POLICIES, Item
from lmc.policies.w_tinylfu import MOST_USES, Sketch
from tests.policies import models
from tests.policies.traces import hits


def test_w_tinylfu_with_a_window_of_three() -> None:
    rng = np.random.default_rng(0)
    # So few keys that the sketch mistakes none for another, as the model's exact counts do not.
    keys = (rng.zipf(1.1, 12_000) % 600).tolist()
    assert hits(keys, 300, "wtinylfu") == models.w_tinylfu(keys, 300)


@given(st.lists(st.integers(0, 300), max_size=300), st.integers(0, 3))
def test_a_sketch_never_counts_too_few(keys: list[int], doublings: int) -> None:
    sketch = Sketch()
    for i, key in enumerate(keys):
        if i == len(keys) // 2:
            for _ in range(doublings):
                sketch.double()
        sketch.add(sketch.places(key))
    counts = {key: sketch.count(sketch.places(key)) for key in keys}
    assert all(counts[key] >= min(keys.count(key), MOST_USES) for key in counts)
    sketch.halve()
    assert all(sketch.count(sketch.places(key)) == n // 2 for key, n in counts.items())


def test_w_tinylfu_admits_what_is_asked_for_more_often() -> None:
    policy = POLICIES.build("wtinylfu", capacity=4)  # a window of 1, of the main part 3
    for now, key in enumerate(["a", "b", "c", "d"]):
        policy.insert(Item(key), now)
    # d is in the window, a the oldest of the main part; both were asked for once.
    assert policy.evict(Item("e"), 4) == "d"
    policy.insert(Item("e"), 4)
    policy.touch(Item("e"), 5)
    assert policy.evict(Item("f"), 6) == "a"
    policy.insert(Item("f"), 6)
    policy.touch(Item("b"), 7)  # protected now
    assert policy.evict(Item("g"), 8, pinned={"f"}) == "c"  # f is all that the window holds


def test_nothing_contends_for_room_that_is_free() -> None:
    policy = POLICIES.build("wtinylfu", capacity=100)  # a window of 1, of the main part 99
    for now, (key, size) in enumerate([("x", 60), ("y", 39), ("w", 1)]):
        policy.insert(Item(key, size), now)
    policy.remove("y")
    # w moves into the room that y left, and large newcomers push out the oldest of the main part.
    assert policy.evict(Item("large", 50), 3) == "x"


def test_w_tinylfu_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "from lmc.policies.w_tinylfu import Sketch\n"
        "for key in (7, b'seven', (b'k', b'c', True, False)): print(Sketch.places(key))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert len(set(said.pop().splitlines())) == 3
