"""Redis and Valkey, through redis-py: one value a part, one an entry."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lmc.store import wire
from lmc.store.assembly import spans_of
from lmc.store.remote.entries import ID_BYTES, MOST, MOST_BYTES, by_entry
from lmc.store.remote.server import Fault, Key, Put, header_of
from lmc.store.wire import FORMAT, Header

# `lmc.store.remote.entries.merged`, on the server, so that nobody's frames are lost.
# KEYS: the entry. ARGV: most frames, most bytes, seconds or 0, new frames.
MERGE = f"""
local old = redis.pcall('GET', KEYS[1])
if type(old) ~= 'string' then
  if type(old) == 'table' then redis.call('DEL', KEYS[1]) end
  old = ''
end
local kept, new, at, total = {{}}, {{}}, 1, 0
for i = 4, #ARGV do new[string.sub(ARGV[i], 1, {ID_BYTES})] = true end
while at <= #old and string.sub(old, at + {ID_BYTES}, at + {ID_BYTES + 3}) == 'LMCW' do
  local a, b, c, d = string.byte(old, at + {ID_BYTES + 8}, at + {ID_BYTES + 11})
  local size = d and {ID_BYTES} + a + b * 256 + c * 65536 + d * 16777216
  if not size or size <= {ID_BYTES} or at + size - 1 > #old then break end
  if not new[string.sub(old, at, at + {ID_BYTES - 1})] then
    kept[#kept + 1] = string.sub(old, at, at + size - 1)
  end
  at = at + size
end
for i = 4, #ARGV do kept[#kept + 1] = ARGV[i] end
for _, frame in ipairs(kept) do total = total + #frame end
local first = 1
while first < #kept and (#kept - first + 1 > tonumber(ARGV[1]) or total > tonumber(ARGV[2])) do
  total = total - #kept[first]
  first = first + 1
end
local value = table.concat(kept, '', first)
if tonumber(ARGV[3]) > 0 then
  redis.call('SET', KEYS[1], value, 'EX', ARGV[3])
else
  redis.call('SET', KEYS[1], value)
end
"""


class RedisServer:
    """As `lmc.store.remote.server.Server`.

    A value is read by Python, so that more threads than two wait for each other.

    Args:
        connect: makes a client of redis-py, of one server or of a cluster, which may connect; it is
            called when one is needed first, and again where it failed.
        prefix: of every key. ttl_s: seconds that a key lasts, or None.
    """

    reads = 2

    def __init__(self, connect: Callable[[], Any], prefix: str, ttl_s: int | None) -> None:
        import redis

        self._redis = redis
        self._prefix = f"{prefix}:{FORMAT}:".encode()
        self._connect, self._ttl = connect, ttl_s
        self._made: Any = None
        self._closed = False
        self._lock = threading.Lock()

    def entries(self, keys: Sequence[Key]) -> list[bytes]:
        return [value or b"" for value in self._get([self._name(key) for key in keys])]

    def values(self, names: Sequence[bytes]) -> list[bytes | None]:
        """Of keys that are no parts and no entries; in one go. Raises Fault."""
        return self._get([self._prefix + name for name in names])

    def keep(self, name: bytes, value: bytes, seconds: int) -> None:
        """Such a key, for so long. Raises Fault."""
        with self._faults() as client:
            client.set(self._prefix + name, value, ex=seconds)

    def forget(self, name: bytes) -> None:
        """Let go of such a key. Raises Fault."""
        with self._faults() as client:
            client.unlink(self._prefix + name)

    def script(self, script: str, names: Sequence[bytes], arguments: Sequence[Any]) -> Any:
        """Run a script over such keys, all of one slot. Raises Fault."""
        keys = [self._prefix + name for name in names]
        with self._faults() as client:
            return client.eval(script, len(keys), *keys, *arguments)

    def holds(self, parts: Sequence[Key]) -> list[bool]:
        with self._faults() as client:
            pipe = client.pipeline(transaction=False)
            for part in parts:
                pipe.exists(self._name(part))
            said = pipe.execute()
            if not all(type(there) is int for there in said):
                raise ValueError(f"got {type(said[0]).__name__} for whether a key exists")
            return [bool(there) for there in said]

    def put(self, items: Sequence[Put]) -> list[Fault | None]:
        if not items:
            return []
        new = by_entry(items)
        done: list[Fault | None] = [None] * len(items)
        with self._faults() as client:
            parts = [i for i, item in enumerate(items) if len(item.data)]
            pipe = client.pipeline(transaction=False)
            for i in parts:
                pipe.set(self._name(items[i].part), items[i].data, ex=self._ttl)
            # A cluster's pipelines take no scripts.
            apart = isinstance(client, self._redis.RedisCluster)
            for key, some in () if apart else new.items():
                pipe.eval(*self._merging(key, [items[i].frame for i in some]))
            said = pipe.execute(raise_on_error=False)
            for i, result in zip(parts, said, strict=False):
                if isinstance(result, Exception):
                    done[i] = Fault(self._kind(result))
            told = said[len(parts) :]
            if apart:
                told = [self._merged(client, key, items, some) for key, some in new.items()]
            for some, result in zip(new.values(), told, strict=True):
                if isinstance(result, Exception):
                    fault = result if isinstance(result, Fault) else Fault(self._kind(result))
                    for i in some:
                        done[i] = done[i] or fault
        return done

    def get(self, part: Key, header: Header) -> tuple[Header, Iterator[np.ndarray]] | None:
        with self._faults() as client:
            try:
                value = client.get(self._name(part))
            except self._redis.ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                value = b""
            if value is not None and not isinstance(value, bytes):
                raise ValueError(f"got {type(value).__name__} for a value")
        if value is None:
            return None
        header = header_of(value[: wire.sizes(value[:64])[0]])
        payload = np.frombuffer(value, np.uint8)[header.size :]
        if payload.nbytes != header.payload_bytes:
            raise wire.HeaderError(f"got a payload of {payload.nbytes}: {header.payload_bytes}")
        return header, iter(spans_of(header, payload))

    def delete(self, keys: Sequence[Key]) -> None:
        with self._faults() as client:
            pipe = client.pipeline(transaction=False)
            for key in keys:
                pipe.unlink(self._name(key))
            pipe.execute()

    def close(self) -> None:
        with self._lock:
            client, self._made, self._closed = self._made, None, True
        if client is not None:
            client.close()

    # -- parts -------------------------------------------------------------------------------

    def _get(self, names: Sequence[bytes]) -> list[bytes | None]:
        if not names:
            return []
        with self._faults() as client:
            apart = isinstance(client, self._redis.RedisCluster)
            said = (client.mget_nonatomic if apart else client.mget)(names)
            if not isinstance(said, list) or len(said) != len(names):
                raise ValueError(f"got no {len(names)} values")
            if not all(value is None or isinstance(value, bytes) for value in said):
                raise ValueError("got values that are no bytes")
            return said

    def _merging(self, key: Key, frames: Sequence[bytes]) -> tuple[Any, ...]:
        return (MERGE, 1, self._name(key), MOST, MOST_BYTES, self._ttl or 0, *frames)

    def _merged(
        self, client: Any, key: Key, items: Sequence[Put], some: Sequence[int]
    ) -> Fault | None:
        try:
            with self._faults():
                client.eval(*self._merging(key, [items[i].frame for i in some]))
        except Fault as fault:
            return fault
        return None

    def _name(self, key: Key) -> bytes:
        return self._prefix + key.kind[:1].encode() + key.digest

    @contextmanager
    def _faults(self) -> Iterator[Any]:
        """A client; whatever it or the server does is a Fault."""
        try:
            with self._lock:
                if self._closed:
                    raise Fault("closed")
                if self._made is None:
                    self._made = self._connect()
                client = self._made
            yield client
        except Fault:
            raise
        except Exception as error:  # redis-py raises of all kinds where a server talks nonsense
            raise Fault(self._kind(error)) from error

    def _kind(self, error: Exception) -> str:
        """A short word for what went wrong."""
        errors = self._redis.exceptions
        for types, word in (
            (errors.OutOfMemoryError, "full"),
            (errors.AuthenticationError, "refused"),
            (errors.NoPermissionError, "refused"),
            ((errors.TimeoutError, TimeoutError), "timeout"),
            ((errors.ConnectionError, errors.RedisClusterException, OSError), "connection"),
            (errors.ReadOnlyError, "read_only"),
            (errors.InvalidResponse, "garbage"),
        ):
            if isinstance(error, types):
                return word
        if "OOM" in str(error)[:200]:  # out of a script
            return "full"
        return "error" if isinstance(error, errors.RedisError) else "garbage"
