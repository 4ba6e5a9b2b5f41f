"""What is being computed just now, told among all who share a tier: so that one does it for all.

Single flight, as Go's package of this name has it: who comes first computes, who comes later waits
for what is stored then. Names are digests of what will be stored. All that one request takes it
takes in one go, before it waits for anybody, and nobody waits for who has begun later: so no two
ever wait for each other.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

logger = logging.getLogger(__name__)

NAME_BYTES = 16
LASTS_S = 3.0  # what is not renewed for so long is of one that is gone, or hangs
RENEW_S = 0.5
QUEUED_S = 0.25  # what is not being computed by then is nobody's again: who took it waits itself
TOGETHER = 256  # of what has come at most is asked in one go


class Flights(Protocol):
    """What a tier that several engines share may have as its attribute `flights`.

    Names are of 16 bytes. Nothing is raised: where nothing can be told or known, nobody else
    computes anything, and it is counted by the tier.
    """

    def begin(
        self, requests: Sequence[tuple[Mapping[bytes, int], Collection[bytes]]]
    ) -> list[dict[bytes, int]]:
        """Take the names of each request that nobody else has, all in one go.

        Args:
            requests: of each the names, with the tokens that are computed until they are there;
                and what else it asks about.

        Returns:
            Of each, as `others` has it, of all that it named.
        """
        ...

    def others(self, asked: Collection[bytes]) -> dict[bytes, int]:
        """Which of these others compute, each with the tokens that they said."""
        ...

    def end(self, names: Iterable[bytes]) -> None:
        """The caller computes these no longer; what it has begun twice, once less."""
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
        names, asked: as `Flights.begin` has them; what is asked about only ever grows less.
        others: of `asked`, what others compute as far as is known.
        begun, looked: `time.monotonic()` when it was asked first, and last.
        taken: names that are its own.
        admitted: whether what it has taken is being computed; lapsed: it was not in time.
    """

    def __init__(self, names: Mapping[bytes, int], asked: Collection[bytes]) -> None:
        self.names, self.asked = names, asked
        self.others: dict[bytes, int] = {}
        self.taken: list[bytes] = []
        self.begun = self.looked = time.monotonic()
        self.admitted = self.lapsed = False
        self._answered = threading.Event()

    @property
    def over(self) -> bool:
        """Whether what was asked was answered."""
        return self._answered.is_set()

    def wait(self, timeout_s: float) -> None:
        """Wait for the answer, no longer than that."""
        self._answered.wait(timeout_s)

    def ask(self) -> None:
        """It is asked again."""
        self._answered.clear()
        self.looked = time.monotonic()

    def told(self, others: Mapping[bytes, int]) -> None:
        """It is answered. Who has begun since it asked first is waited for by nobody here."""
        self.others = {name: others[name] for name in self.asked if name in others}
        self.asked = list(self.others)
        self._answered.set()


class SingleFlight:
    """Asks a tier on a thread of its own, and renews what was begun as long as it is computed.

    What has come together while the tier was asked is asked in one go.

    Args:
        flights: the tier's.
    """

    def __init__(self, flights: Flights) -> None:
        self._flights = flights
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._landing: list[tuple[float, Flight]] = []
        self._queued: list[Flight] = []  # those that are not admitted
        self._renewed = 0.0
        self._flying = 0
        self._thread = threading.Thread(target=self._run, name="lmc-flights", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether an answer will come at once, as far as can be told."""
        return self._jobs.empty()

    def begin(self, flight: Flight) -> None:
        """Take what a request computes; returns at once."""
        self._jobs.put(_Job("begin", flight))

    def look(self, flight: Flight) -> None:
        """See what others still compute of what a request waits for; returns at once."""
        flight.ask()
        self._jobs.put(_Job("look", flight))

    def end(self, flight: Flight, linger_s: float = 0.0) -> None:
        """A request computes nothing any more; returns at once.

        Args:
            linger_s: what it has computed is on its way into the tier for so long.
        """
        self._jobs.put(_Job("end", flight, time.monotonic() + linger_s))

    def close(self, timeout_s: float = 1.0) -> None:
        """Let go of all; a tier that hangs is left."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            jobs = self._next()
            try:
                self._do([job for job in jobs if job is not None])
                self._keep_up(time.monotonic())
            except BaseException:  # a tier may be anybody's
                logger.exception("lmc could not ask a tier what others compute")
            if None in jobs:
                break
        self._flights.close()

    def _next(self) -> list[_Job | None]:
        jobs: list[_Job | None] = []
        with contextlib.suppress(queue.Empty):
            jobs.append(self._jobs.get(timeout=RENEW_S if self._flying else None))
            while len(jobs) < TOGETHER:
                jobs.append(self._jobs.get_nowait())
        return jobs

    def _do(self, jobs: Sequence[_Job]) -> None:
        begun = [job.flight for job in jobs if job.kind == "begin"]
        self._flying += len(begun)
        self._landing += [(job.at, job.flight) for job in jobs if job.kind == "end"]
        if begun:
            told = self._flights.begin([(flight.names, flight.asked) for flight in begun])
            for flight, others in zip(begun, told, strict=True):
                flight.taken = [name for name in flight.names if name not in others]
                flight.told(others)
            self._queued += [flight for flight in begun if flight.taken]
        if looks := [job.flight for job in jobs if job.kind == "look"]:
            others = self._flights.others({name for flight in looks for name in flight.asked})
            for flight in looks:
                flight.told(others)

    def _keep_up(self, now: float) -> None:
        if landed := [flight for until, flight in self._landing if until <= now]:
            self._landing = [(until, flight) for until, flight in self._landing if until > now]
            self._flying -= len(landed)
            self._flights.end([name for flight in landed for name in flight.taken])
            for flight in landed:
                flight.taken = []
        self._queued = [f for f in self._queued if f.taken and not f.admitted]
        if late := [flight for flight in self._queued if now > flight.begun + QUEUED_S]:
            self._flights.end([name for flight in late for name in flight.taken])
            for flight in late:
                flight.taken, flight.lapsed = [], True
        if self._flying and now >= self._renewed + RENEW_S:
            self._renewed = now
            self._flights.renew()


@dataclass(frozen=True)
class _Job:
    kind: Literal["begin", "look", "end"]
    flight: Flight
    at: float = 0.0
