"""When a tier is left alone: each has a breaker of its own, so that it silences only itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

REST_S = 10.0  # after a call that did not answer in time


class Breaker:
    """Whether a tier is asked. What is late opens it; after a rest one call is let through as a
    trial, and an answer in time closes it.

    Attributes:
        opened: how often it was opened.
    """

    def __init__(self, rest_s: float = REST_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.opened = 0
        self._rest_s, self._clock = rest_s, clock
        self._until: float | None = None
        self._trial = False
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether the tier answers, as far as is known."""
        return self._until is None

    def allows(self) -> bool:
        """Whether to ask now; of a tier that was late, once after each rest."""
        with self._lock:
            if self._until is None:
                return True
            if self._clock() < self._until:
                return False
            self._until, self._trial = self._clock() + self._rest_s, True
            return True

    def late(self) -> None:
        """A call has not answered in time."""
        with self._lock:
            self.opened += self._until is None
            self._until, self._trial = self._clock() + self._rest_s, False

    def answered(self) -> None:
        """A call has answered in time: if it was the trial, the tier is asked again."""
        with self._lock:
            if self._trial:
                self._until, self._trial = None, False

    def back(self) -> None:
        """All that was late has come after all."""
        with self._lock:
            self._until, self._trial = None, False
