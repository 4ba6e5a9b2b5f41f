"""W-TinyLFU: a newcomer must have been asked for more often than what would go for it.

Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ACM TOS 2017.
Newcomers pass through a small LRU window (1% of the capacity); what falls out of it contends with
the oldest item of the main part, a segmented LRU (20% probation, 80% protected), and the one asked
for more often in the recent past stays. Uses are counted in a sketch, and all counts are halved
after ten uses per held item.

libCacheSim 0.3.5 differs where it shows in hit rates: newcomers enter the protected part while that
has room, counts are halved after 32 hits in the main part per unit of capacity, and its filter
raises all counts of a key.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass
from hashlib import blake2b
from struct import unpack

from lmc.policies import Item
from lmc.policies.queues import Queue

WINDOW, PROTECTED = 0.01, 0.8  # of the capacity, of the main part
SAMPLE = 10  # uses per held item from one halving to the next
MOST_USES = 15
CELLS = 16  # at least, in each of the sketch's four rows, per held item
_HALF = bytes(n // 2 for n in range(256))

Places = tuple[int, int, int, int]


class Sketch:
    """How often each key was counted lately: never less than that, up to `MOST_USES`.

    A count-min sketch (Cormode and Muthukrishnan, "An improved data stream summary", 2005) of four
    rows that raises the least of a key's counts only, as the TinyLFU paper does.
    """

    def __init__(self) -> None:
        self.width = 64
        self._rows = tuple(bytearray(self.width) for _ in range(4))

    @staticmethod
    def places(key: Hashable) -> Places:
        """Where a key counts; the same in every process, as Python's own hash of bytes is not.

        A key's repr stands for it: integers, text, bytes, and tuples of these.
        """
        a, b, c, d = unpack("<4I", blake2b(repr(key).encode(), digest_size=16).digest())
        return a, b, c, d

    def count(self, places: Places) -> int:
        """The uses counted at `places`."""
        last = self.width - 1
        a, b, c, d = self._rows
        i, j, k, n = places
        return min(a[i & last], b[j & last], c[k & last], d[n & last])

    def add(self, places: Places) -> None:
        """Count one use."""
        last = self.width - 1
        a, b, c, d = self._rows
        i, j, k, n = places
        i, j, k, n = i & last, j & last, k & last, n & last
        least = min(a[i], b[j], c[k], d[n])
        if least < MOST_USES:
            for row, place in ((a, i), (b, j), (c, k), (d, n)):
                if row[place] == least:
                    row[place] = least + 1

    def halve(self) -> None:
        """Age all counts."""
        self._rows = tuple(row.translate(_HALF) for row in self._rows)

    def double(self) -> None:
        """Twice as wide; no count changes, since both places a cell now stands for inherit it."""
        self.width *= 2
        self._rows = tuple(row + row for row in self._rows)


@dataclass
class WTinyLfu:
    """A window, a segmented LRU, and admission to it by frequency."""

    capacity: int

    def __post_init__(self) -> None:
        self._window = Queue()
        self._probation = Queue()
        self._protected = Queue()
        self._places: dict[Hashable, Places] = {}  # of held keys
        self._sketch = Sketch()
        self._counted = 0
        self._window_capacity = max(WINDOW * self.capacity, 1.0)
        self._main_capacity = self.capacity - self._window_capacity

    def touch(self, item: Item, now: float) -> None:
        key = item.key
        self._count(self._places[key])
        if key in self._probation:
            self._protected.push(key, self._probation.take(key))
            while self._protected.size > PROTECTED * self._main_capacity:
                oldest = next(iter(self._protected))
                self._probation.push(oldest, self._protected.take(oldest))
        else:
            (self._window if key in self._window else self._protected).move_to_end(key)

    def insert(self, item: Item, now: float) -> None:
        places = self._places[item.key] = self._sketch.places(item.key)
        self._count(places)
        self._window.push(item.key, item.size)
        # There was room, so what the window cannot hold need not contend.
        while self._window.size > self._window_capacity and len(self._window) > 1:
            self._admit(next(iter(self._window)))

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        while self._window.size + incoming.size > self._window_capacity:
            candidate = self._window.oldest(pinned)
            if candidate is None:
                break
            if self._main_size + self._window[candidate] <= self._main_capacity:
                self._admit(candidate)
                continue
            loser = self._main_victim(pinned)
            if loser is None or self._asked(candidate) <= self._asked(loser):
                loser = candidate
            else:
                self._admit(candidate)
            self.remove(loser)
            return loser
        # The window is as small as it gets.
        victim = self._main_victim(pinned)
        if victim is None:
            victim = self._window.oldest(pinned)
        if victim is not None:
            self.remove(victim)
        return victim

    def remove(self, key: Hashable) -> None:
        del self._places[key]
        for queue in (self._window, self._probation, self._protected):
            if key in queue:
                queue.take(key)
                break

    def expired(self, now: float) -> Collection[Hashable]:
        return ()

    @property
    def _main_size(self) -> int:
        return self._probation.size + self._protected.size

    def _main_victim(self, pinned: Container) -> Hashable | None:
        key = self._probation.oldest(pinned)
        return self._protected.oldest(pinned) if key is None else key

    def _admit(self, key: Hashable) -> None:
        self._probation.push(key, self._window.take(key))

    def _asked(self, key: Hashable) -> int:
        return self._sketch.count(self._places[key])

    def _count(self, places: Places) -> None:
        held = len(self._places)
        if self._sketch.width < CELLS * held:
            self._sketch.double()
        self._sketch.add(places)
        self._counted += 1
        if self._counted >= SAMPLE * max(held, 16):
            self._sketch.halve()
            self._counted //= 2
