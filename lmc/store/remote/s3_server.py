"""S3-compatible object stores, through obstore: an object a part, and an object an entry."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from lmc.store import wire
from lmc.store.remote.entries import by_entry, merged
from lmc.store.remote.parts import AT_ONCE, Parts, path_of, then_told
from lmc.store.remote.server import Fault, Key, Put

MULTIPART_BYTES = 16 << 20
TRIES = 10  # to add to an entry that others add to
FIRST_WAIT_S = 0.004
STATUS = re.compile(r"status code: (\d+)")
KINDS = {"401": "refused", "403": "refused", "416": "no_such_range", "507": "full"}
TIMED_OUT = re.compile(r"timed ?out", re.IGNORECASE)


class S3Server(Parts):
    """As `lmc.store.remote.server.Server`; entries are objects too.

    Args:
        store: of obstore.
    """

    def __init__(self, store: Any) -> None:
        super().__init__("lmc-s3")
        import obstore

        self._obs: Any = obstore
        self._store = store
        self._missing = (obstore.exceptions.NotFoundError, FileNotFoundError)

    def entries(self, keys: Sequence[Key]) -> list[bytes]:
        return self._all(lambda key: bytes(self.whole(key) or b""), keys)

    def put(self, items: Sequence[Put]) -> list[Fault | None]:
        return then_told(items, self.put_parts(items), self._tell)

    # -- parts -------------------------------------------------------------------------------

    def put_part(self, item: Put) -> Fault | None:
        data = item.data
        long = len(data) > MULTIPART_BYTES
        options = {"chunk_size": MULTIPART_BYTES // 2, "max_concurrency": AT_ONCE}
        more: dict[str, Any] = {"use_multipart": long} | (options if long else {})
        try:
            with self._faults():
                if len(data):
                    self._obs.put(self._store, path_of(item.part), data, **more)
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
                        found = self._obs.get(self._store, path_of(key))
                        before: bytes = bytes(found.bytes())
                        mode: Any = {"e_tag": found.meta["e_tag"]}
                    except self._missing:
                        before, mode = b"", "create"
                    data = merged(before, frames)
                    try:
                        self._obs.put(self._store, path_of(key), data, mode=mode)
                        return None
                    except (errors.AlreadyExistsError, errors.PreconditionError):
                        time.sleep(wait * (0.5 + random.random()))
                        wait *= 2
                    except errors.NotSupportedError:  # a store without conditions
                        self._obs.put(self._store, path_of(key), data)
                        return None
        except Fault as fault:
            return fault
        return Fault("contended")

    def range(self, key: Key, start: int, end: int) -> memoryview | None:
        try:
            with self._faults(), suppress(*self._missing):
                data = self._obs.get_range(self._store, path_of(key), start=start, end=end)
                return memoryview(data)
        except Fault as fault:
            if str(fault) == "no_such_range":  # it is shorter than what was put
                raise wire.HeaderError("got less than a part") from fault
            raise
        return None

    def whole(self, key: Key) -> memoryview | None:
        with self._faults(), suppress(*self._missing):
            return memoryview(self._obs.get(self._store, path_of(key)).bytes())
        return None

    def is_there(self, key: Key) -> bool:
        with self._faults(), suppress(*self._missing):
            self._obs.head(self._store, path_of(key))
            return True
        return False

    def delete_one(self, key: Key) -> None:
        with self._faults(), suppress(*self._missing):
            self._obs.delete(self._store, path_of(key))

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
