"""S3-compatible object stores, through obstore: an object a part, and an object an entry."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np

from lmc.store import wire
from lmc.store.remote.entries import by_entry, merged
from lmc.store.remote.redis_server import RedisServer
from lmc.store.remote.server import Fault, Key, Put, grouped, header_of
from lmc.store.wire import FORMAT, Header

AT_ONCE = 8  # requests; with 32 SeaweedFS answered a fifth as fast
RANGE_BYTES = 4 << 20  # of a part of more than two the first layers come first
MULTIPART_BYTES = 16 << 20
TRIES = 10  # to add to an entry that others add to
FIRST_WAIT_S = 0.004
STATUS = re.compile(r"status code: (\d+)")
KINDS = {"401": "refused", "403": "refused", "416": "no_such_range", "507": "full"}
TIMED_OUT = re.compile(r"timed ?out", re.IGNORECASE)

T = TypeVar("T")
A = TypeVar("A")


class S3Server:
    """As `lmc.store.remote.server.Server`; entries are objects too.

    Args:
        store: of obstore.
    """

    reads = AT_ONCE

    def __init__(self, store: Any) -> None:
        import obstore

        self._obs: Any = obstore
        self._store = store
        self._missing = (obstore.exceptions.NotFoundError, FileNotFoundError)
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="lmc-s3")

    def entries(self, keys: Sequence[Key]) -> list[bytes]:
        return self._all(lambda key: bytes(self._whole(key) or b""), keys)

    def holds(self, parts: Sequence[Key]) -> list[bool]:
        return self._all(self._is_there, parts)

    def put(self, items: Sequence[Put]) -> list[Fault | None]:
        return then_told(items, self.put_parts(items), self._tell)

    def put_parts(self, items: Sequence[Put]) -> list[Fault | None]:
        """The objects of parts, without what tells of them."""
        return self._all(self._put_part, items)

    def get(self, part: Key, header: Header) -> tuple[Header, Iterator[np.ndarray]] | None:
        total = header.size + header.payload_bytes
        if total <= 2 * RANGE_BYTES:
            data = self._whole(part)
            if data is None:
                return None
            header = header_of(bytes(data[: wire.sizes(data[:64])[0]]))
            return header, self._ranges(part, header, data)
        front = self._range(part, 0, max(header.size + header.sections[0].length, RANGE_BYTES))
        if front is None:
            return None
        size, _ = wire.sizes(front[:64])
        if size > len(front):
            front = self._range(part, 0, size) or memoryview(b"")
        header = header_of(bytes(front[:size]))
        return header, self._ranges(part, header, front)

    def delete(self, keys: Sequence[Key]) -> None:
        self._all(self._delete_one, keys)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- parts -------------------------------------------------------------------------------

    def _put_part(self, item: Put) -> Fault | None:
        data = item.data
        long = len(data) > MULTIPART_BYTES
        options = {"chunk_size": MULTIPART_BYTES // 2, "max_concurrency": AT_ONCE}
        more: dict[str, Any] = {"use_multipart": long} | (options if long else {})
        try:
            with self._faults():
                if len(data):
                    self._obs.put(self._store, _path(item.part), data, **more)
        except Fault as fault:
            return fault
        return None

    def _tell(self, items: Sequence[Put]) -> list[Fault | None]:
        """Add the frames of parts that are there to their entries."""
        new, done = by_entry(items), list[Fault | None]([None] * len(items))
        frames = [(key, [items[i].frame for i in some]) for key, some in new.items()]
        added = self._all(lambda of: self._add(*of), frames)
        for some, fault in zip(new.values(), added, strict=True):
            for i in some:
                done[i] = done[i] or fault
        return done

    def _add(self, key: Key, frames: Sequence[bytes]) -> Fault | None:
        """Add to an entry, as often as others are first."""
        errors, wait = self._obs.exceptions, FIRST_WAIT_S
        try:
            with self._faults():
                for _ in range(TRIES):
                    try:
                        found = self._obs.get(self._store, _path(key))
                        before: bytes = bytes(found.bytes())
                        mode: Any = {"e_tag": found.meta["e_tag"]}
                    except self._missing:
                        before, mode = b"", "create"
                    data = merged(before, frames)
                    try:
                        self._obs.put(self._store, _path(key), data, mode=mode)
                        return None
                    except (errors.AlreadyExistsError, errors.PreconditionError):
                        time.sleep(wait * (0.5 + random.random()))
                        wait *= 2
                    except errors.NotSupportedError:  # a store without conditions
                        self._obs.put(self._store, _path(key), data)
                        return None
        except Fault as fault:
            return fault
        return Fault("contended")

    def _ranges(self, part: Key, header: Header, front: memoryview) -> Iterator[np.ndarray]:
        """Spans: of `front`, which begins the object, and then what is behind it, in order."""
        bands = [(header.size + start, header.size + end) for *_, start, end in header.bands()]
        here = np.frombuffer(front, np.uint8)
        behind = [band for band in bands if band[1] > len(front)]
        yield from (here[start:end] for start, end in bands[: len(bands) - len(behind)])
        groups = list(grouped(behind, RANGE_BYTES))
        # As many at once as are allowed, the first ones first.
        coming = [self._threads.submit(self._range, part, g[0][0], g[-1][1]) for g in groups]
        for group, future in zip(groups, coming, strict=True):
            data = np.frombuffer(future.result() or b"", np.uint8)
            first = group[0][0]
            yield from (data[start - first : end - first] for start, end in group)

    def _range(self, key: Key, start: int, end: int) -> memoryview | None:
        try:
            with self._faults(), suppress(*self._missing):
                data = self._obs.get_range(self._store, _path(key), start=start, end=end)
                return memoryview(data)
        except Fault as fault:
            if str(fault) == "no_such_range":  # it is shorter than what was put
                raise wire.HeaderError("got less than a part") from fault
            raise
        return None

    def _whole(self, key: Key) -> memoryview | None:
        with self._faults(), suppress(*self._missing):
            return memoryview(self._obs.get(self._store, _path(key)).bytes())
        return None

    def _is_there(self, key: Key) -> bool:
        with self._faults(), suppress(*self._missing):
            self._obs.head(self._store, _path(key))
            return True
        return False

    def _delete_one(self, key: Key) -> None:
        with self._faults(), suppress(*self._missing):
            self._obs.delete(self._store, _path(key))

    def _all(self, do: Callable[[A], T], items: Iterable[A]) -> list[T]:
        try:
            return list(self._threads.map(do, items))
        except (RuntimeError, CancelledError) as error:  # it is closed
            raise Fault("closed") from error

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except self._missing as error:
            raise Fault("no_bucket") from error
        except (self._obs.exceptions.BaseError, OSError, RuntimeError) as error:
            raise Fault(self._kind(error)) from error

    def _kind(self, error: Exception) -> str:
        """A short word for what went wrong."""
        errors, said = self._obs.exceptions, str(error)
        if isinstance(error, errors.PermissionDeniedError | errors.UnauthenticatedError):
            return "refused"
        if status := STATUS.search(said):
            return KINDS.get(status[1], "error")
        lost = "error sending request" in said or "connect" in said
        return "timeout" if TIMED_OUT.search(said) else "connection" if lost else "error"


class Listed:
    """Parts in one place, entries in another: a directory that answers for a prompt in one go."""

    def __init__(self, parts: S3Server, directory: RedisServer) -> None:
        self._parts, self._directory = parts, directory
        self.entries = directory.entries
        self.holds, self.get, self.reads = parts.holds, parts.get, parts.reads

    def put(self, items: Sequence[Put]) -> list[Fault | None]:
        return then_told(items, self._parts.put_parts(items), self._directory.put)

    def delete(self, keys: Sequence[Key]) -> None:
        self._parts.delete([key for key in keys if key.kind == "part"])
        self._directory.delete([key for key in keys if key.kind != "part"])

    def close(self) -> None:
        self._parts.close()
        self._directory.close()


def then_told(
    items: Sequence[Put],
    done: list[Fault | None],
    tell: Callable[[Sequence[Put]], list[Fault | None]],
) -> list[Fault | None]:
    """Have told of what is there, and of nothing else; what went wrong of each.

    Args:
        done: what went wrong of the payloads.
    """
    there = [i for i, fault in enumerate(done) if fault is None]
    told = tell([items[i]._replace(data=memoryview(b"")) for i in there])
    for i, fault in zip(there, told, strict=True):
        done[i] = fault
    return done


def store_of(bucket: str, prefix: str, endpoint: str, timeout_s: float) -> Any:
    """A store of obstore; nothing is sent before it is used.

    Raises:
        ValueError: what obstore does not take, or no obstore.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError as e:
        raise ValueError("the s3 tier needs obstore: pip install 'lmc-kv[s3]'") from e
    said: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    client: Any = {
        "timeout": timedelta(seconds=timeout_s),
        "connect_timeout": timedelta(seconds=timeout_s),
        "allow_http": endpoint.startswith("http://"),
    }
    retries: Any = {"max_retries": 1, "retry_timeout": timedelta(seconds=timeout_s)}
    try:
        return S3Store(
            bucket, prefix=prefix or None, client_options=client, retry_config=retries, **said
        )
    except BaseError as e:
        raise ValueError(f"s3: {e}") from e


def _path(key: Key) -> str:
    return f"lmc-{FORMAT}/{key.kind}/{key.digest.hex()}"
