"""What is being computed just now, told among all who share a tier: so that one does it for all.

Single flight, as Go's package of this name has it: who comes first computes, who comes later waits
for what is stored then. Names are digests of what will be stored. All that one request takes it
takes in one go, before it waits for anybody, so that no two ever wait for each other.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

logger = logging.getLogger(__name__)

NAME_BYTES = 16
LASTS_S = 3.0  # what is not renewed for so long is of one that is gone, or hangs
RENEW_S = 0.5


class Flights(Protocol):
    """What a tier that several engines share may have as its attribute `flights`.

    Names are of 16 bytes. Nothing is raised: where nothing can be told or known, nobody else
    computes anything, and it is counted by the tier.
    """

    def begin(self, names: Mapping[bytes, int], asked: Collection[bytes]) -> dict[bytes, int]:
        """Take those of `names` that nobody else has, in one go.

        Args:
            names: with each the tokens that are computed until it is there.
            asked: what the caller would wait for.

        Returns:
            As `others`, of `asked`.
        """
        ...

    def others(self, asked: Collection[bytes]) -> dict[bytes, int]:
        """Which of these others compute, each with the tokens that they said."""
        ...

    def end(self, names: Iterable[bytes]) -> None:
        """The caller computes these no longer."""
        ...

    def renew(self) -> None:
        """The caller is still there: what is not renewed for `LASTS_S` seconds counts as ended."""
        ...

    def close(self) -> None:
        """The caller computes nothing any more."""
        ...


class Flight:
    """What one request would compute, and wait for.

    Attributes:
        names, asked: as `Flights.begin` has them.
        others: of `asked`, what others compute as far as is known.
        over: whether that was answered.
        looked: `time.monotonic()` when it was asked.
    """

    def __init__(self, names: Mapping[bytes, int], asked: Collection[bytes]) -> None:
        self.names, self.asked = names, asked
        self.others: dict[bytes, int] = {}
        self.over, self.looked = False, time.monotonic()


class SingleFlight:
    """Asks a tier on a thread of its own, and renews what was begun as long as it is computed.

    Args:
        flights: the tier's.
    """

    def __init__(self, flights: Flights) -> None:
        self._flights = flights
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._landing: list[tuple[float, Collection[bytes]]] = []
        self._renewed = 0.0
        self._flying = 0
        self._thread = threading.Thread(target=self._run, name="lmc-flights", daemon=True)
        self._thread.start()

    def begin(self, flight: Flight) -> None:
        """Take what a request computes; returns at once."""

        def job() -> None:
            self._flying += 1
            flight.others = self._flights.begin(flight.names, flight.asked)
            flight.over = True

        self._jobs.put(job)

    def look(self, flight: Flight) -> None:
        """See what others still compute of what a request waits for; returns at once."""

        def job() -> None:
            flight.others = self._flights.others(flight.asked)
            flight.over = True

        flight.over, flight.looked = False, time.monotonic()
        self._jobs.put(job)

    def end(self, flight: Flight, linger_s: float = 0.0) -> None:
        """A request computes nothing any more; returns at once.

        Args:
            linger_s: what it has computed is on its way into the tier for so long.
        """
        self._jobs.put(lambda: self._landing.append((time.monotonic() + linger_s, flight.names)))

    def close(self, timeout_s: float = 1.0) -> None:
        """Let go of all; a tier that hangs is left."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=RENEW_S if self._flying else None)
                if job is None:
                    break
                job()
            except queue.Empty:
                pass
            except BaseException:  # a tier may be anybody's
                logger.exception("lmc could not ask a tier what others compute")
            try:
                self._keep_up(time.monotonic())
            except BaseException:
                logger.exception("lmc could not tell a tier what is computed here")
        self._flights.close()

    def _keep_up(self, now: float) -> None:
        if landed := [names for until, names in self._landing if until <= now]:
            self._landing = [(until, names) for until, names in self._landing if until > now]
            self._flying -= len(landed)
            self._flights.end([name for names in landed for name in names])
        if self._flying and now >= self._renewed + RENEW_S:
            self._renewed = now
            self._flights.renew()
