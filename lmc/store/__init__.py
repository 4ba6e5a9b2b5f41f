"""Where chunks are kept: an index that decides, and tiers that hold bytes.

`Index` (scheduler side) owns keys, variants, eviction and leases; `Chunks` (worker side) owns bytes
by slot: host memory in front, and other tiers, such as the folder of `lmc.store.disk`, behind it.
They may live in different processes. `Store` is both in one.
"""

from __future__ import annotations

from typing import Any

from lmc.store.index import Index
from lmc.store.record import Record, origin_of

__all__ = ["Index", "Record", "Store", "origin_of"]


def __getattr__(name: str) -> Any:
    if name == "Store":  # late: it needs torch, and the simulator has none
        from lmc.store.store import Store

        return Store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
