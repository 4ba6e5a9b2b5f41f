"""Handles for places whose reads block: threads that make them, which nobody has to wait for."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from lmc.store.tier import Handle, Progress, Wanted

logger = logging.getLogger(__name__)

THREADS = 16  # chunks of one request come side by side, their first layers first
GRACE_S = 1.0  # a read that looks at its deadline now and then is a little late

# Reads what is wanted, tells how many layers are there as they come; whether all of it is.
Read = Callable[[Wanted, Callable[[int], None]], bool]


class Ended:
    """A handle of what came, or did not, before anybody could ask how far it is.

    Args:
        layers: that are there: all of them, or None where nothing is.
    """

    def __init__(self, layers: int | None) -> None:
        self._progress = Progress(0, "missing") if layers is None else Progress(layers, "here")

    def poll(self) -> Progress:
        return self._progress

    def cancel(self) -> None:
        pass


class Reads:
    """As many reads at a time as there are threads; the interpreter's exit waits for none.

    A read that does not return keeps its thread, and its handle is not over: it may write still.

    Args:
        name: of the tier.
        read: makes one, and returns at its deadline at the latest if it can; what it raises is a
            miss.
        most: threads.
    """

    def __init__(self, name: str, read: Read, most: int = THREADS) -> None:
        self._name, self._read, self._most = name, read, most
        self._changed = threading.Condition()
        self._waiting: deque[_Reading] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closing = False

    def start(self, wanted: Sequence[Wanted]) -> list[Handle]:
        """Have chunks read, in this order."""
        handles = [_Reading(w) for w in wanted]
        with self._changed:
            closing = self._closing
            if not closing:
                self._waiting += handles
                missing = min(len(self._waiting) - self._idle, self._most - len(self._threads))
                for _ in range(missing):
                    name = f"lmc-read-{self._name}-{len(self._threads)}"
                    thread = threading.Thread(target=self._take, name=name, daemon=True)
                    try:
                        thread.start()
                    except RuntimeError:  # there is none to be had; those that are will do
                        break
                    self._threads.append(thread)
                closing = not self._threads
                self._changed.notify(len(handles))
        if closing:
            for handle in handles:
                handle.end("missing")
        return list(handles)

    def close(self, timeout_s: float = GRACE_S) -> bool:
        """Give up what waits; whether all reads have returned, or did within so long."""
        with self._changed:
            self._closing = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for handle in waiting:
            handle.end("missing")
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _take(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._closing)
                self._idle -= 1
                if not self._waiting:
                    return
                handle = self._waiting.popleft()
            here = False
            try:
                if handle.begin():
                    here = self._read(handle.wanted, handle.advance)
            except BaseException:  # a tier may be anybody's
                logger.exception("lmc could not read a chunk from tier %s", self._name)
            handle.end("here" if here else "missing")


class _Reading:
    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self._lock = threading.Lock()
        self._begun = False
        self._progress = Progress(0, None)

    def poll(self) -> Progress:
        return self._progress

    def cancel(self) -> None:
        with self._lock:
            waits = not self._begun
            self._begun = True
        if waits:
            self.end("missing")

    def begin(self) -> bool:
        """Whether to read it; once it is, only the end of the reading is its end."""
        with self._lock:
            waits = not self._begun
            self._begun = True
        return waits and time.monotonic() < self.wanted.deadline

    def advance(self, layers: int) -> None:
        self._progress = Progress(layers, None)
        self.wanted.news()

    def end(self, over: Literal["here", "missing"]) -> None:
        if self._progress.over is None:
            self._progress = self._progress._replace(over=over)
            self.wanted.news()
