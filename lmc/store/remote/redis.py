"""Redis and Valkey: one value a part, one an entry; also as cluster, behind sentinels, over TLS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmc.model.layout import KVLayout
from lmc.store.compress import check_name
from lmc.store.remote.keyed import Keyed
from lmc.store.remote.redis_client import check_url, connecting
from lmc.store.remote.redis_flights import RedisFlights
from lmc.store.remote.redis_server import RedisServer
from lmc.store.remote.server import check_timeout
from lmc.store.sections import Heads


@dataclass(frozen=True)
class RedisConfig:
    """Chunks on a Redis or Valkey server, shared by all who name it.

    Attributes:
        url: `redis://host:6379/0`, `rediss://` over TLS, `unix:///path`, `redis+cluster://host` or
            `redis+sentinel://host:26379,other:26379/service/0`; what redis-py takes behind a `?`
            (`ssl_ca_certs=...`) too. A user and a password may stand in it.
        password_env: the name of an environment variable that has the password.
        prefix: of every key.
        ttl_s: seconds that a chunk lasts behind its put; by default as long as the server likes.
        timeout_s: of every answer, and of connecting.
        write: `through` when a chunk is stored, `back` when host memory lets it go.
        compression: none, zstd, shuffle_zstd (lossless), int8, int4 or fp8.
    """

    url: str = field(repr=False)
    password_env: str = ""
    prefix: str = "lmc"
    ttl_s: int | None = None
    timeout_s: float = 1.0
    write: Literal["through", "back"] = "through"
    compression: str = "none"

    def __post_init__(self) -> None:
        check_url(self.url)
        check_name(self.compression)
        if self.ttl_s is not None and self.ttl_s < 1:
            raise ValueError(f"ttl_s: got {self.ttl_s}, want at least 1, or null")
        check_timeout(self.timeout_s)

    def open(
        self,
        layout: KVLayout,
        *,
        heads: Heads | None = None,
        exact_variants: int = 2,
        label: str = "",
    ) -> Keyed:
        """The tier; a server that is not there yet is one that answers nothing.

        Raises:
            ValueError: a URL that redis-py does not take, a password that is not in the
                environment, or no redis-py.
        """
        connect = connecting(self.url, self.password_env, self.timeout_s)
        server = RedisServer(connect, self.prefix, self.ttl_s)
        of_rank = (layout, heads, exact_variants)
        tier = Keyed("redis", server, *of_rank, self.compression, label)
        tier.flights = RedisFlights(server, tier.counts)
        return tier
