"""What the tests of remote tiers put, ask for and get."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lmc.store.remote.keyed import Keyed
from lmc.store.remote.redis import RedisConfig
from tests.store.disk.chunks import LAYOUT, Spec, empty, right
from tests.store.remote.servers import Valkey
from tests.store.wanted import brought


@contextmanager
def running(*options: str) -> Iterator[Valkey]:
    server = Valkey(*options)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def opened(url: str, **fields: Any) -> Iterator[Keyed]:
    tier = RedisConfig(url, **{"timeout_s": 0.3} | fields).open(LAYOUT)
    try:
        yield tier
    finally:
        tier.close()


def put(tier: Keyed, *specs: Spec) -> list[str]:
    return list(tier.put([spec.item() for spec in specs]))


def served(tier: Keyed, spec: Spec) -> bool:
    """Whether it comes; what comes is right."""
    into = empty(spec.forms())
    if not brought(tier, spec.record(), into, seconds=2):
        return False
    assert right(into, spec)
    return True


def found(tier: Keyed, spec: Spec) -> bool:
    record = spec.record()
    (told,), _ = tier.lookup_many(record.namespace, [record.key], [], time.monotonic() + 2)
    return bool(told)


def done_without(tier: Keyed) -> set[str]:
    """Ask everything of a tier whose server is gone: it costs deadlines; what faults are counted.

    Of the four specs the first two were put.
    """
    begun = time.monotonic()
    assert put(tier, SPECS[2]) == ["failed"]
    assert not found(tier, SPECS[0]) and not served(tier, SPECS[0])
    assert tier.contains([SPECS[0].record()]) == [False]
    tier.evict([SPECS[1].record()])
    assert time.monotonic() - begun < 6 * 2 * 0.3 + 2
    return {kind for kind in tier.counts if kind.startswith("faults:")}


SPECS = [Spec(i, 0, 20) for i in range(4)]

CHURNED = 6


def large(i: int) -> Spec:
    """Of 5 MB, in several bands and groups of them."""
    return Spec(i, 0, 20_000)
