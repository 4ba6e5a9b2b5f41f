"""How long what lmc does in a step keeps the others waiting that the step is for."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lmc.connectors.vllm.messages import LMCStats, Observed, StepMetadata

# Claims are served before the step's forward; texts are computed alone, and copies waited for
# before their blocks are another's, after and before it.
Cause = Literal["claims", "isolated", "copies"]
UNDER_WAY = 1024  # measurements that a device has yet to come to


@dataclass(frozen=True)
class _Taken:
    """Something a step did, and when it began and ended: seconds, or events of the device."""

    cause: Cause
    computes: bool
    decodes: int
    begun: Any
    ended: Any

    @property
    def over(self) -> bool:
        return isinstance(self.ended, float) or bool(self.ended.query())

    @property
    def seconds(self) -> float:
        if isinstance(self.ended, float):
            return self.ended - float(self.begun)
        return float(self.begun.elapsed_time(self.ended)) / 1000


class Stalls:
    """Measures, on one rank, what a step's forward or the next step has to wait for.

    On a GPU it is the device's time, which nobody waits for to read it (untested on a GPU).
    """

    def __init__(self) -> None:
        self._taken: deque[_Taken] = deque(maxlen=UNDER_WAY)

    @contextmanager
    def during(self, cause: Cause, step: StepMetadata) -> Iterator[None]:
        """What is done within is what a step does for `cause`; nothing where it has none."""
        if not {"claims": step.claims, "isolated": step.encodes, "copies": step.reused}[cause]:
            yield
            return
        computes = any(claim.computes for claim in step.claims)
        begun = _now()
        try:
            yield
        finally:
            self._taken.append(_Taken(cause, computes, step.decodes, begun, _now()))

    def take(self) -> LMCStats:
        """What has ended since the last call."""
        counts: Counter[str] = Counter()
        observed = Observed()
        while self._taken and self._taken[0].over:
            taken = self._taken.popleft()
            seconds = taken.seconds
            if taken.cause == "claims":
                observed.add("blend_seconds" if taken.computes else "load_seconds", seconds)
            if taken.decodes:
                observed.add(f"stall_seconds:{taken.cause}", seconds)
                counts[f"stalled_us:{taken.cause}"] += round(1e6 * seconds * taken.decodes)
        return LMCStats.of(counts, observed)


def _now() -> Any:
    """Seconds; on a GPU an event behind all that it was given so far."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
