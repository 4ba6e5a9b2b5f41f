"""S3-compatible object stores as a config names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from lmc.model.layout import KVLayout
from lmc.store.compress import check_name
from lmc.store.remote.keyed import Keyed
from lmc.store.remote.parts import Listed
from lmc.store.remote.redis_client import connecting
from lmc.store.remote.redis_flights import RedisFlights
from lmc.store.remote.redis_server import RedisServer
from lmc.store.remote.s3_server import S3Server, store_of
from lmc.store.remote.server import check_timeout
from lmc.store.sections import Heads


@dataclass(frozen=True)
class S3Config:
    """Chunks in a bucket, shared by all who name it.

    Credentials are those of the environment, as every S3 client takes them (`AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, or the machine's role).

    Attributes:
        url: `s3://bucket/prefix`.
        endpoint: of what is not Amazon's, such as `http://127.0.0.1:8333`.
        directory: the URL of a Redis that has the entries, so that a prompt is one question;
            without one each chunk is an object that is asked for.
        directory_password_env: as `password_env` of the redis tier.
        timeout_s: of every request.
        write: `through` when a chunk is stored, `back` when host memory lets it go.
        compression: none, zstd, shuffle_zstd (lossless), int8, int4 or fp8.
    """

    url: str
    endpoint: str = field(default="", repr=False)
    directory: str = field(default="", repr=False)
    directory_password_env: str = ""
    timeout_s: float = 5.0
    write: Literal["through", "back"] = "through"
    compression: str = "none"

    def __post_init__(self) -> None:
        where = urlsplit(self.url)
        if where.scheme != "s3" or not where.netloc or "@" in where.netloc:
            raise ValueError("url: want s3://bucket or s3://bucket/prefix")
        if self.endpoint and urlsplit(self.endpoint).scheme not in ("http", "https"):
            raise ValueError("endpoint: want one that begins with http:// or https://")
        check_name(self.compression)
        check_timeout(self.timeout_s)

    def open(
        self,
        layout: KVLayout,
        *,
        heads: Heads | None = None,
        exact_variants: int = 2,
        label: str = "",
    ) -> Keyed:
        """The tier; a store that is not there yet is one that answers nothing.

        Raises:
            ValueError: what obstore does not take, or no obstore; of a directory as the redis tier.
        """
        where = urlsplit(self.url)
        bucket, prefix = where.netloc, where.path.strip("/")
        parts = S3Server(store_of(bucket, prefix, self.endpoint, self.timeout_s))
        of_rank = (layout, heads, exact_variants, self.compression, label)
        if not self.directory:
            return Keyed("s3", parts, *of_rank)
        connect = connecting(self.directory, self.directory_password_env, self.timeout_s)
        entries = RedisServer(connect, f"lmc:{bucket}/{prefix}", None)
        tier = Keyed("s3", Listed(parts, entries), *of_rank)
        tier.flights = RedisFlights(entries, tier.counts)
        return tier
