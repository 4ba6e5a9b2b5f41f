"""W-TinyLFU: a newcomer must have been asked for more often than what would go for it.

Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ACM TOS 2017.
Newcomers pass through a small LRU window (1%); what falls out of it contends with the oldest item
of the main part, a segmented LRU (20% probation, 80% protected), and the one asked for more often
in the recent past stays. The past is the last ten uses per held item, counted up to 15 and then
halved, as the paper's reset does. The paper counts in a sketch; here the counts are exact, in a
dict that the halving bounds, so that results depend on no hash function.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable
from dataclasses import dataclass

from lmc.policies import Item
from lmc.policies.queues import Queue

WINDOW, PROTECTED = 0.01, 0.8  # of the capacity, of the main part
SAMPLE, MOST_USES = 10, 15


@dataclass
class WTinyLfu:
    """A window, a segmented LRU, and admission to it by frequency."""

    capacity: int

    def __post_init__(self) -> None:
        self._window = Queue()
        self._probation = Queue()
        self._protected = Queue()
        self._uses: dict[Hashable, int] = {}
        self._counted = 0

    def touch(self, item: Item, now: float) -> None:
        key = item.key
        self._count(key)
        if key in self._probation:
            self._protected.push(key, self._probation.take(key))
            while self._protected.size > PROTECTED * self._main_capacity:
                oldest = next(iter(self._protected))
                self._probation.push(oldest, self._protected.take(oldest))
        else:
            (self._window if key in self._window else self._protected).move_to_end(key)

    def insert(self, item: Item, now: float) -> None:
        self._count(item.key)
        self._window.push(item.key, item.size)
        while self._window.size > self._window_capacity and len(self._window) > 1:
            self._admit(next(iter(self._window)))

    def evict(self, incoming: Item, now: float, pinned: Container = ()) -> Hashable | None:
        while self._window.size + incoming.size > self._window_capacity:
            candidate = self._window.oldest(pinned)
            if candidate is None:
                break
            size = self._window[candidate]
            if self._main_size + size <= self._main_capacity:
                self._admit(candidate)
                continue
            victim = self._main_victim(pinned)
            if victim is not None and self._asked(candidate) > self._asked(victim):
                self.remove(victim)
                self._admit(candidate)
                return victim
            self.remove(candidate)
            return candidate
        victim = self._main_victim(pinned)
        if victim is None:
            victim = self._window.oldest(pinned)
        # What no window holds contends itself.
        elif incoming.size > self._window_capacity and self._asked(incoming.key) < self._asked(
            victim
        ):
            self._count(incoming.key)
            return incoming.key
        if victim is not None:
            self.remove(victim)
        return victim

    def remove(self, key: Hashable) -> None:
        for queue in (self._window, self._probation, self._protected):
            if key in queue:
                queue.take(key)

    def expired(self, now: float) -> Collection[Hashable]:
        return ()

    @property
    def _window_capacity(self) -> float:
        return max(WINDOW * self.capacity, 1.0)

    @property
    def _main_capacity(self) -> float:
        return self.capacity - self._window_capacity

    @property
    def _main_size(self) -> int:
        return self._probation.size + self._protected.size

    def _main_victim(self, pinned: Container) -> Hashable | None:
        key = self._probation.oldest(pinned)
        return self._protected.oldest(pinned) if key is None else key

    def _admit(self, key: Hashable) -> None:
        self._probation.push(key, self._window.take(key))

    def _asked(self, key: Hashable) -> int:
        return self._uses.get(key, 0)

    def _count(self, key: Hashable) -> None:
        self._uses[key] = min(self._asked(key) + 1, MOST_USES)
        self._counted += 1
        held = len(self._window) + len(self._probation) + len(self._protected)
        if self._counted >= SAMPLE * max(held, 16):
            self._uses = {k: n // 2 for k, n in self._uses.items() if n > 1}
            self._counted //= 2
