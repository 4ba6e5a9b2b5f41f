"""Clients of redis-py for the URLs of a config. No message shows a URL: a password may be in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

SCHEMES = (
    "redis", "rediss", "unix",
    "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel",
)  # fmt: skip


def check_url(url: str) -> None:
    """Raise ValueError unless a URL begins as one of `SCHEMES`."""
    if url.partition("://")[0] not in SCHEMES or "://" not in url:
        raise ValueError(f"url: want one that begins with {'://, '.join(SCHEMES)}://")


def connecting(url: str, password_env: str, timeout_s: float) -> Callable[[], Any]:
    """What makes a client; nothing is sent before it is called.

    Args:
        As the fields of `lmc.store.remote.redis.RedisConfig`.

    Raises:
        ValueError: as `RedisConfig.open`.
    """
    try:
        import redis
        from redis._parsers import _RESP2Parser
        from redis.backoff import NoBackoff
        from redis.cluster import RedisCluster
        from redis.connection import parse_url
        from redis.maint_notifications import MaintNotificationsConfig
        from redis.retry import Retry
        from redis.sentinel import Sentinel
    except ImportError as e:
        raise ValueError("the redis tier needs redis-py: pip install 'lmc-kv[redis]'") from e

    check_url(url)
    scheme, _, way = url.partition("://")[0].partition("+")
    parts = urlsplit(url)
    userinfo, _, hosts = parts.netloc.rpartition("@")
    at = f"{userinfo}@" if userinfo else ""
    first = hosts.partition(",")[0]
    path = parts.path
    service = ""
    if way == "sentinel":
        service, _, db = path.strip("/").partition("/")
        path = f"/{db or 0}"
        if not service:
            raise ValueError("url: got no service name, want redis+sentinel://host:26379/service")
    plain = urlunsplit((scheme, at + first, path, parts.query, ""))
    try:
        said = dict(parse_url(plain))
        where = [(h.partition(":")[0], int(h.partition(":")[2] or 26379)) for h in hosts.split(",")]
    except ValueError:
        raise ValueError("url: redis-py cannot read it; is its password escaped?") from None
    kind = said.pop("connection_class", redis.Connection)
    if password_env:
        if (password := os.environ.get(password_env)) is None:
            raise ValueError(f"password_env: there is no {password_env} in the environment")
        said["password"] = password
    said |= {
        "socket_timeout": timeout_s,
        "decode_responses": False,
        # As few words as can be before the first question, and no server that asks for more time.
        "protocol": 2,
        "driver_info": None,
        # A connection that a server has closed since is opened anew; what is slow is not waited for
        # twice.
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    }
    if scheme != "unix":
        said["socket_connect_timeout"] = timeout_s
    if scheme == "rediss":
        # hiredis's asks the socket whether there is data, and takes the session tickets of TLS 1.3
        # for an answer that nobody has read: such a connection is given up. (A cluster's client
        # takes no parser, and tries again.)
        said["parser_class"] = _RESP2Parser
    try:
        kind(**said)
    except TypeError as e:
        raise ValueError(
            f"url: an option that redis-py does not take: {str(e).split()[-1]}"
        ) from None
    quiet = MaintNotificationsConfig(enabled=False)

    def connect() -> Any:
        if way == "cluster":
            more = {k: v for k, v in said.items() if k not in ("host", "port", "db", "path")}
            secure = {"ssl": True} if scheme == "rediss" else {}
            return RedisCluster(
                said["host"], said.get("port", 6379), maint_notifications_config=quiet,
                **more | secure,
            )  # fmt: skip
        if way == "sentinel":
            more = {k: v for k, v in said.items() if k not in ("host", "port")}
            secure = {"ssl": True} if scheme == "rediss" else {}
            of_sentinels = {k: v for k, v in more.items() if k.startswith(("socket", "ssl"))}
            sentinels = Sentinel(where, sentinel_kwargs=of_sentinels | secure)
            return sentinels.master_for(service, **more | secure)
        pool = redis.ConnectionPool(connection_class=kind, **said)
        return redis.Redis.from_pool(pool)

    return connect
