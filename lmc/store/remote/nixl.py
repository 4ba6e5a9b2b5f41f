"""Chunks in the memory of the engines that put them, which others read through NIXL."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from lmc.model.layout import KVLayout
from lmc.sizes import parse_bytes
from lmc.store.compress import check_name
from lmc.store.remote.keyed import Keyed
from lmc.store.remote.nixl_server import UNIT, NixlServer
from lmc.store.remote.redis_client import check_url, connecting
from lmc.store.remote.redis_flights import RedisFlights
from lmc.store.remote.redis_server import RedisServer
from lmc.store.remote.server import check_timeout
from lmc.store.sections import Heads


@dataclass(frozen=True)
class NixlConfig:
    """Chunks that engines keep for each other, from memory to memory.

    Over what they are read (shared memory, TCP, RDMA) UCX chooses; its environment variables say
    otherwise, such as `UCX_NET_DEVICES` and `UCX_TLS`.

    Attributes:
        directory: the URL of a Redis that says who has what, as `url` of the redis tier.
        directory_password_env: as `password_env` there.
        capacity: of each rank's memory, for what others may read; of too much the oldest goes.
        prefix: of every key in the directory.
        timeout_s: of every transfer, and of every answer of the directory.
        write: `through` when a chunk is stored, `back` when host memory lets it go.
        compression: none, zstd, shuffle_zstd (lossless), int8, int4 or fp8.
    """

    directory: str = field(repr=False)
    capacity: int | str
    directory_password_env: str = ""
    prefix: str = "lmc:nixl"
    timeout_s: float = 1.0
    write: Literal["through", "back"] = "through"
    compression: str = "none"

    def __post_init__(self) -> None:
        check_url(self.directory)
        check_name(self.compression)
        if parse_bytes(self.capacity) < UNIT:
            raise ValueError(f"capacity: got {self.capacity}, want at least {UNIT} bytes")
        check_timeout(self.timeout_s)

    def open(
        self,
        layout: KVLayout,
        *,
        heads: Heads | None = None,
        exact_variants: int = 2,
        label: str = "",
    ) -> Keyed:
        """The tier; a directory that is not there yet is one that answers nothing.

        Raises:
            ValueError: no nixl; of the directory as the redis tier.
        """
        if find_spec("nixl") is None:
            raise ValueError("the nixl tier needs nixl: pip install 'lmc-kv[nixl]'")
        connect = connecting(self.directory, self.directory_password_env, self.timeout_s)
        directory = RedisServer(connect, self.prefix, None)
        server = NixlServer(directory, parse_bytes(self.capacity), self.timeout_s)
        of_rank = (layout, heads, exact_variants)
        tier = Keyed("nixl", server, *of_rank, self.compression, label)
        tier.flights = RedisFlights(directory, tier.counts)
        return tier
