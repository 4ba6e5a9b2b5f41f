"""Where chunks are kept: an index that decides, and tiers that hold bytes.

`Index` (scheduler side) owns keys, variants, eviction and leases; `HostMemory` (worker side)
owns bytes by slot. They may live in different processes.
"""

from lmc.store.index import Index
from lmc.store.record import Record, origin_of

__all__ = ["Index", "Record", "origin_of"]
