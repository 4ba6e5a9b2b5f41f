"""A chunk out of a tier, as `Tier.get_many` brings it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from lmc.store.record import Record
from lmc.store.sections import Section
from lmc.store.tier import Tier, Wanted


def brought(
    tier: Tier,
    record: Record,
    into: Sequence[Section],
    seconds: float = 60.0,
    seen: Callable[[int], None] = lambda layers: None,
) -> bool:
    """Whether a chunk comes; returns when nothing writes into its destination any more.

    Args:
        seen: told of the layers that are there, whenever there is news.
    """
    news = threading.Event()
    (handle,) = tier.get_many([Wanted(record, into, time.monotonic() + seconds, news.set)])
    end = time.monotonic() + seconds + 60
    while True:
        news.clear()
        layers, over = handle.poll()
        seen(layers)
        if over is not None:
            return over == "here"
        assert time.monotonic() < end
        news.wait(0.01)
