"""A chunk on its way out of a tier, and the threads that bring it: one tier may hang, no other."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from lmc.store.record import Record

logger = logging.getLogger(__name__)

FETCHERS = 16  # threads: chunks of one request come side by side, their first layers first
GRACE_S = 1.0  # a get that looks at its deadline now and then is a little late


class Arrival:
    """A chunk on its way into host memory: how many of its layers are there and verified.

    Attributes:
        parts: where it goes, `[L, 2, t, G, D]` along T, once there is room. Of their layers those
            that have arrived are right.
        deadline: of `time.monotonic()`, when it is given up.
        left: tiers that are still to be asked, in this order; missed: those that lack it.
        abandoned: nobody wants it any more.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.parts: list[torch.Tensor] | None = None
        self.deadline = math.inf
        self.left: list[int] = []
        self.missed: list[int] = []
        self.abandoned = False
        self._layers = 0
        self._over: bool | None = None
        self._changed = threading.Condition()

    @property
    def layers(self) -> int:
        """How many of its first layers are there."""
        return self._layers

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return self.deadline <= time.monotonic()

    def advance(self, layers: int) -> None:
        """The first `layers` are there."""
        with self._changed:
            self._layers = max(self._layers, layers)
            self._changed.notify_all()

    def end(self, whole: bool) -> None:
        """It is all there, or will never be."""
        with self._changed:
            self._over = whole
            self._changed.notify_all()

    def wait(self, layers: int | None, deadline: float) -> bool:
        """Whether the first `layers`, or all, are there by `deadline` of `time.monotonic()`."""

        def decided() -> bool:
            return self._over is not None or (layers is not None and self._layers >= layers)

        with self._changed:
            self._changed.wait_for(decided, max(0.0, deadline - time.monotonic()))
            if layers is not None and self._layers >= layers:
                return True
            return bool(self._over)


class Fetcher:
    """Threads that ask one tier, at most `FETCHERS`; no exit of the interpreter waits for them.

    A call that does not return keeps its thread. What waits for a thread until it is late is told
    so by a thread that never calls the tier.

    Args:
        name: of the tier.
        get: asks it for one arrival, on one of the threads.
        give_up: told of an arrival that no thread was free for in time.
    """

    def __init__(
        self, name: str, get: Callable[[Arrival], None], give_up: Callable[[Arrival], None]
    ) -> None:
        self._name, self._get, self._give_up = name, get, give_up
        lock = threading.Lock()
        self._to_take = threading.Condition(lock)
        self._to_watch = threading.Condition(lock)
        self._waiting: deque[Arrival] = deque()
        self._running: list[Arrival] = []
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._watched = False
        self._closing = False

    @property
    def overdue(self) -> int:
        """Calls that have not returned by the deadline they were given."""
        with self._to_take:
            return self._overdue()

    def submit(self, arrival: Arrival) -> bool:
        """Have the tier asked; False where that is in vain, since all threads hang."""
        with self._to_take:
            if self._closing or self._overdue() >= FETCHERS:
                return False
            if not self._watched:
                self._start("late", self._watch)
                self._watched = True
            if self._idle <= len(self._waiting) and len(self._threads) < FETCHERS:
                self._threads.append(self._start(str(len(self._threads)), self._take))
            self._waiting.append(arrival)
            self._to_take.notify()
            if min(a.deadline for a in self._waiting) == arrival.deadline:
                self._to_watch.notify()
        return True

    def close(self, until: float) -> bool:
        """Give up what waits; whether all calls have returned, or do soon after their deadlines.

        Args:
            until: of `time.monotonic()`, no longer than that.
        """
        with self._to_take:
            self._closing = True
            given_up = list(self._waiting)
            self._waiting.clear()
            latest = max((arrival.deadline for arrival in self._running), default=math.inf)
            self._to_take.notify_all()
            self._to_watch.notify_all()
        for arrival in given_up:
            self._give_up(arrival)
        for thread in self._threads:
            thread.join(max(0.0, min(until, latest + GRACE_S) - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _overdue(self) -> int:
        return sum(arrival.late for arrival in self._running)

    def _start(self, name: str, run: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=run, name=f"lmc-fetch-{self._name}-{name}", daemon=True)
        thread.start()
        return thread

    def _take(self) -> None:
        while True:
            with self._to_take:
                self._idle += 1
                self._to_take.wait_for(lambda: self._waiting or self._closing)
                self._idle -= 1
                if not self._waiting:
                    return
                arrival = self._waiting.popleft()
                self._running.append(arrival)
            try:
                self._get(arrival)
            except BaseException:  # a tier may be anybody's
                logger.exception("lmc could not fetch a chunk from tier %s", self._name)
            with self._to_take:
                self._running.remove(arrival)

    def _watch(self) -> None:
        while True:
            with self._to_watch:
                if self._closing:
                    return
                first = min((arrival.deadline for arrival in self._waiting), default=math.inf)
                left = None if first == math.inf else max(0.0, first - time.monotonic())
                self._to_watch.wait(left)
                late = [arrival for arrival in self._waiting if arrival.late]
                for arrival in late:
                    self._waiting.remove(arrival)
            for arrival in late:
                self._give_up(arrival)
