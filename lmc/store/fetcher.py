"""A chunk on its way out of a tier, and what follows it there: one tier may hang, no other."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch

from lmc.store.breaker import Breaker
from lmc.store.reads import GRACE_S
from lmc.store.record import Record
from lmc.store.sections import Section
from lmc.store.tier import Handle, Tier, Wanted

logger = logging.getLogger(__name__)

TOGETHER = 256  # chunks that a tier is asked for in one call
POLL_S = 0.001  # between two looks at a tier that does not tell when it has news


class Arrival:
    """A chunk on its way into host memory: how many of its layers are there and verified.

    Attributes:
        parts: where it goes, `[L, 2, t, G, D]` along T. Of their layers those that have arrived
            are right.
        into: the same, as sections.
        deadline: of `time.monotonic()`, when it is given up.
        until: when the tier is given up that is asked now.
        left: tiers that are still to be asked, in this order; missed: those that lack it.
        abandoned: nobody wants it any more.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.parts: list[torch.Tensor] | None = None
        self.into: Sequence[Section] = ()
        self.deadline = self.until = math.inf
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


class _Asked:
    """An arrival that one tier is asked for."""

    def __init__(self, arrival: Arrival, over: Callable[[_Asked, bool], None]) -> None:
        self.arrival = arrival
        self.handle: Handle | None = None
        self.told = False  # whether the tier has called `news`
        self._over = over
        self._lock = threading.Lock()

    def news(self) -> None:
        self.told = True
        self.look()

    def look(self) -> None:
        """Pass on what is new of it."""
        with self._lock:
            if self.handle is None:
                return
            try:
                layers, over = self.handle.poll()
            except BaseException:  # a tier may be anybody's, and may write there for all we know
                logger.exception("lmc could not ask a tier how far a chunk is")
                self.told = True
                return
            if over is not None:
                self.handle = None
        if layers:
            self.arrival.advance(layers)
        if over is not None:
            self._over(self, over == "here")


class Fetcher:
    """Asks one tier for chunks, on a thread of its own; no exit of the interpreter waits for it.

    A call that does not return keeps that thread. What waits for it until it is late is told so by
    a thread that never calls the tier.

    Args:
        tier: that is asked.
        breaker: of the tier.
        most: bytes that it is given to write to at a time; one chunk at least.
        counts: where the time is counted in which the tier had something to bring.
        place: makes room for an arrival when it is its turn; False where there is none.
        ended: told, on any thread, of each arrival whether the tier has brought it. Of one that
            the tier has not let go of nothing is told.
    """

    def __init__(
        self,
        tier: Tier,
        breaker: Breaker,
        most: int,
        counts: Counter[str],
        place: Callable[[Arrival], bool],
        ended: Callable[[Arrival, bool], None],
    ) -> None:
        self._tier, self._breaker, self._ended = tier, breaker, ended
        self._most, self._place, self._counts = most, place, counts
        self._given = 0  # bytes that the tier may write to
        lock = threading.Lock()
        self._to_ask = threading.Condition(lock)
        self._to_watch = threading.Condition(lock)
        self._waiting: deque[Arrival] = deque()
        self._running: set[_Asked] = set()
        self._since = 0.0  # of `time.perf_counter()`, when the first of those was asked for
        self._threads: list[threading.Thread] = []
        self._closing = False

    def submit(self, arrivals: Sequence[Arrival]) -> bool:
        """Have the tier asked for these; False where that is in vain."""
        with self._to_ask:
            if self._closing:
                return False
            if not self._threads:
                self._threads = [self._start("late", self._watch), self._start("ask", self._ask)]
            self._waiting += arrivals
            self._to_ask.notify()
            self._to_watch.notify()
        return True

    def close(self, until: float) -> bool:
        """Give up what waits; whether the tier has let go of all memory that it was given.

        Args:
            until: of `time.monotonic()`, no longer than that.
        """
        with self._to_ask:
            self._closing = True
            given_up, self._waiting = list(self._waiting), deque()
            running = list(self._running)
            latest = max((asked.arrival.until for asked in running), default=-math.inf)
            self._to_ask.notify_all()
            self._to_watch.notify_all()
        for arrival in given_up:
            self._ended(arrival, False)
        for asked in running:
            self._cancel(asked)
        until = min(until, max(latest, time.monotonic()) + GRACE_S)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not self._running and not any(thread.is_alive() for thread in self._threads)

    # -- parts -------------------------------------------------------------------------------

    def _start(self, name: str, run: Callable[[], None]) -> threading.Thread:
        name = f"lmc-fetch-{self._tier.name}-{name}"
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def _ask(self) -> None:
        pause = POLL_S
        while True:
            with self._to_ask:
                self._to_ask.wait_for(
                    lambda: self._next() or (self._closing and not self._running),
                    pause if any(not asked.told for asked in self._running) else None,
                )
                if self._closing and not self._running:
                    return
                batch: list[Arrival] = []
                while self._next() and len(batch) < TOGETHER:
                    batch.append(self._waiting.popleft())
                    self._given += batch[-1].record.nbytes
            asked = []
            for arrival in batch:
                if arrival.abandoned or not self._place(arrival):
                    self._returned(arrival)
                    self._ended(arrival, False)
                else:
                    asked.append(_Asked(arrival, self._over))
            with self._to_ask:
                silent = [one for one in self._running if not one.told]
                self._since = self._since if self._running else time.perf_counter()
                self._running.update(asked)
                self._to_watch.notify()
            started = time.monotonic()
            for one in silent:
                one.look()
            if asked:
                self._begin(asked)
            # Where there is much to look at, no more than half of the time goes into it.
            pause = max(POLL_S, time.monotonic() - started)

    def _next(self) -> bool:
        """Whether the tier may be given another one."""
        if not self._waiting:
            return False
        return not self._given or self._given + self._waiting[0].record.nbytes <= self._most

    def _returned(self, arrival: Arrival) -> None:
        with self._to_ask:
            self._given -= arrival.record.nbytes
            if self._waiting or self._closing:
                self._to_ask.notify()

    def _begin(self, asked: Sequence[_Asked]) -> None:
        wanted = [
            Wanted(one.arrival.record, one.arrival.into, one.arrival.until, one.news)
            for one in asked
        ]
        try:
            handles = list(self._tier.get_many(wanted))
            if len(handles) != len(wanted) or None in handles:
                raise ValueError(f"got {handles} for {len(wanted)} chunks")
        except BaseException:  # a tier may be anybody's
            logger.exception("lmc could not fetch chunks from tier %s", self._tier.name)
            for one in asked:
                self._over(one, False)
            return
        for one, handle in zip(asked, handles, strict=True):
            one.handle = handle
            one.look()

    def _over(self, asked: _Asked, here: bool) -> None:
        """The tier has let go of it."""
        late = asked.arrival.until <= time.monotonic()
        with self._to_ask:
            self._running.discard(asked)
            if not self._running:
                busy_us = round(1e6 * (time.perf_counter() - self._since))
                self._counts[f"fetch_us:{self._tier.name}"] += busy_us
            if not here and late:
                self._breaker.late()
            elif not self._breaker.closed and not self._overdue():
                self._breaker.back()
        self._returned(asked.arrival)
        self._ended(asked.arrival, here)

    def _overdue(self) -> bool:
        now = time.monotonic()
        return any(one.arrival.until <= now for one in self._running)

    def _watch(self) -> None:
        seen: set[_Asked] = set()
        while True:
            with self._to_watch:
                now = time.monotonic()
                late = [arrival for arrival in self._waiting if arrival.until <= now]
                for arrival in late:
                    self._waiting.remove(arrival)
                overdue = [one for one in self._running if one.arrival.until <= now]
                overdue = [one for one in overdue if one not in seen]
                seen = (seen | set(overdue)) & self._running
                if not late and not overdue:
                    if self._closing:
                        return
                    ends = [arrival.until for arrival in self._waiting]
                    ends += [one.arrival.until for one in self._running - seen]
                    first = min(ends, default=math.inf)
                    self._to_watch.wait(None if first == math.inf else max(0.0, first - now))
                    continue
                self._breaker.late()
            for arrival in late:
                self._ended(arrival, False)
            for one in overdue:
                self._cancel(one)

    def _cancel(self, asked: _Asked) -> None:
        """Tell the tier that nobody wants it, on the watching thread: it may hang there."""
        handle = asked.handle
        try:
            if handle is not None:
                handle.cancel()
                asked.look()
        except BaseException:  # a tier may be anybody's
            logger.exception("lmc could not have tier %s let go of a chunk", self._tier.name)
