"""Redis and Valkey, through redis-py: one value a part, one an entry."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from lmc.store import wire
from lmc.store.assembly import spans_of
from lmc.store.remote.server import Fault, Key, Put, header_of
from lmc.store.wire import FORMAT, Header


class RedisServer:
    """As `lmc.store.remote.server.Server`.

    A value is read by Python, so that more threads than two wait for each other.

    Args:
        client: of redis-py, of one server or of a cluster.
        prefix: of every key. ttl_s: seconds that a key lasts, or None.
    """

    reads = 2

    def __init__(self, client: Any, prefix: str, ttl_s: int | None) -> None:
        import redis

        self._redis = redis
        self._prefix = f"{prefix}:{FORMAT}:".encode()
        self._client, self._ttl = client, ttl_s
        self._cluster = isinstance(client, redis.RedisCluster)

    def entries(self, keys: Sequence[Key]) -> list[bytes]:
        return [value or b"" for value in self._get([self._name(key) for key in keys])]

    def values(self, names: Sequence[bytes]) -> list[bytes | None]:
        """Of keys that are no parts and no entries; in one go. Raises Fault."""
        return self._get([self._prefix + name for name in names])

    def script(self, script: str, names: Sequence[bytes], arguments: Sequence[Any]) -> Any:
        """Run a script over such keys, all of one slot. Raises Fault."""
        keys = [self._prefix + name for name in names]
        with self._faults():
            return self._client.eval(script, len(keys), *keys, *arguments)

    def holds(self, parts: Sequence[Key]) -> list[bool]:
        with self._faults():
            pipe = self._client.pipeline(transaction=False)
            for part in parts:
                pipe.exists(self._name(part))
            return [bool(there) for there in pipe.execute()]

    def put(self, items: Sequence[Put]) -> list[Fault | None]:
        return self._put(items, parts=True)

    def tell(self, items: Sequence[Put]) -> list[Fault | None]:
        """As `put`, of parts that are elsewhere."""
        return self._put(items, parts=False)

    def _put(self, items: Sequence[Put], parts: bool) -> list[Fault | None]:
        pipe = self._client.pipeline(transaction=False)
        each = 1 if self._ttl is None else 2  # commands of an entry
        for item in items:
            if parts:
                pipe.set(self._name(item.part), item.data, ex=self._ttl)
            for key in item.entries:
                pipe.append(self._name(key), item.header)
                if self._ttl is not None:
                    pipe.expire(self._name(key), self._ttl)
        with self._faults():
            results = pipe.execute(raise_on_error=False)
        done: list[Fault | None] = []
        start = 0
        for item in items:
            end = start + parts + each * len(item.entries)
            wrong = [r for r in results[start:end] if isinstance(r, Exception)]
            done.append(Fault(self._kind(wrong[0])) if wrong else None)
            start = end
        return done

    def get(self, part: Key, header: Header) -> tuple[Header, Iterator[np.ndarray]] | None:
        with self._faults():
            value = self._client.get(self._name(part))
        if value is None:
            return None
        header = header_of(value[: wire.sizes(value[:64])[0]])
        payload = np.frombuffer(value, np.uint8)[header.size :]
        if payload.nbytes != header.payload_bytes:
            raise wire.HeaderError(f"got a payload of {payload.nbytes}: {header.payload_bytes}")
        return header, iter(spans_of(header, payload))

    def delete(self, keys: Sequence[Key]) -> None:
        with self._faults():
            pipe = self._client.pipeline(transaction=False)
            for key in keys:
                pipe.unlink(self._name(key))
            pipe.execute()

    def close(self) -> None:
        self._client.close()

    def _get(self, names: Sequence[bytes]) -> list[bytes | None]:
        if not names:
            return []
        with self._faults():
            get = self._client.mget_nonatomic if self._cluster else self._client.mget
            return list(get(names))

    def _name(self, key: Key) -> bytes:
        return self._prefix + key.kind[:1].encode() + key.digest

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (self._redis.RedisError, OSError, ValueError) as error:
            raise Fault(self._kind(error)) from error

    def _kind(self, error: Exception) -> str:
        """A short word for what went wrong."""
        errors = self._redis.exceptions
        for types, word in (
            (errors.OutOfMemoryError, "full"),
            (errors.AuthenticationError, "refused"),
            (errors.NoPermissionError, "refused"),
            ((errors.TimeoutError, TimeoutError), "timeout"),
            ((errors.ConnectionError, OSError), "connection"),
            (errors.ReadOnlyError, "read_only"),
            (errors.InvalidResponse, "garbage"),
        ):
            if isinstance(error, types):
                return word
        return "garbage" if isinstance(error, ValueError) else "error"


def client_of(url: str, password_env: str, timeout_s: float) -> Any:
    """A client of redis-py for a URL; nothing is sent before it is used.

    Args:
        As the fields of `lmc.store.remote.redis.RedisConfig`.

    Raises:
        ValueError: as `RedisConfig.open`.
    """
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.cluster import RedisCluster
        from redis.retry import Retry
        from redis.sentinel import Sentinel
    except ImportError as e:
        raise ValueError("the redis tier needs redis-py: pip install 'lmc-kv[redis]'") from e

    said: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        # A connection that a server has closed since is opened anew; what is slow is not waited for
        # twice.
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    }
    if password_env:
        if (password := os.environ.get(password_env)) is None:
            raise ValueError(f"password_env: there is no {password_env} in the environment")
        said["password"] = password
    scheme, _, way = urlsplit(url).scheme.partition("+")
    plain = url.replace(f"+{way}", "", 1) if way else url
    if way == "cluster":
        return RedisCluster.from_url(plain, **said)
    if way != "sentinel":
        return redis.Redis.from_url(plain, **said)
    parts = urlsplit(plain)
    where = parts.netloc.rpartition("@")[2].split(",")
    hosts = [(host, int(port or 26379)) for host, _, port in (w.partition(":") for w in where)]
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("url: got no service name, want redis+sentinel://host:26379/service")
    said |= {"ssl": scheme == "rediss", "db": int(db or 0), "username": parts.username}
    said.setdefault("password", parts.password)
    timeouts = {name: said[name] for name in ("socket_timeout", "socket_connect_timeout")}
    return Sentinel(hosts, sentinel_kwargs=timeouts).master_for(service, **said)
