"""Counters that are read while others count."""

from __future__ import annotations

import threading
from collections import Counter

from lmc.store.tier import taken


def test_counts_are_taken_while_other_threads_count() -> None:
    counts: Counter[str] = Counter()
    over = threading.Event()

    def counting(thread: int) -> None:
        i = 0
        while not over.is_set():
            i += 1
            counts[f"{thread}:{i % 5000}"] += 1

    threads = [threading.Thread(target=counting, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        gathered = [taken(counts) for _ in range(500)]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert any(gathered)
    assert all(n > 0 for each in gathered for n in each.values())


def test_what_was_taken_is_not_taken_again() -> None:
    counts = Counter(a=2, b=0)
    assert taken(counts) == {"a": 2}
    counts["b"] += 1
    assert taken(counts) == {"b": 1}
    assert taken(counts) == {}
