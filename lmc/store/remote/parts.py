"""Parts that are one piece of bytes each, in a store that gives ranges of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from lmc.store import wire
from lmc.store.remote.redis_server import RedisServer
from lmc.store.remote.server import Fault, Key, Put, grouped, header_of
from lmc.store.wire import FORMAT, Header

AT_ONCE = 8  # requests; with 32 SeaweedFS answered a fifth as fast
RANGE_BYTES = 4 << 20  # of a part of more than two the first layers come first

T = TypeVar("T")
A = TypeVar("A")


class Parts(ABC):
    """What is asked of parts, a few at once, by what a store does with one.

    Args:
        name: of its threads.
    """

    reads = AT_ONCE

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix=name)

    @abstractmethod
    def put_part(self, item: Put) -> Fault | None: ...

    @abstractmethod
    def range(self, key: Key, start: int, end: int) -> memoryview | None:
        """Bytes of one, as many as there are; None where there is none.

        Raises:
            Fault: the store does not give them.
            HeaderError: it ends before `start`.
        """

    @abstractmethod
    def whole(self, key: Key) -> memoryview | None: ...

    @abstractmethod
    def is_there(self, key: Key) -> bool: ...

    @abstractmethod
    def delete_one(self, key: Key) -> None: ...

    def put_parts(self, items: Sequence[Put]) -> list[Fault | None]:
        """The objects of parts, without what tells of them."""
        return self._all(self.put_part, items)

    def holds(self, parts: Sequence[Key]) -> list[bool]:
        return self._all(self.is_there, parts)

    def get(self, part: Key, header: Header) -> tuple[Header, Iterator[np.ndarray]] | None:
        total = header.size + header.payload_bytes
        if total <= 2 * RANGE_BYTES:
            data = self.whole(part)
            if data is None:
                return None
            header = header_of(bytes(data[: wire.sizes(data[:64])[0]]))
            return header, self._ranges(part, header, data)
        front = self.range(part, 0, max(header.size + header.sections[0].length, RANGE_BYTES))
        if front is None:
            return None
        size, _ = wire.sizes(front[:64])
        if size > len(front):
            front = self.range(part, 0, size) or memoryview(b"")
        header = header_of(bytes(front[:size]))
        return header, self._ranges(part, header, front)

    def delete(self, keys: Sequence[Key]) -> None:
        self._all(self.delete_one, keys)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ranges(self, part: Key, header: Header, front: memoryview) -> Iterator[np.ndarray]:
        """Spans: of `front`, which begins the object, and then what is behind it, in order."""
        bands = [(header.size + start, header.size + end) for *_, start, end in header.bands()]
        here = np.frombuffer(front, np.uint8)
        behind = [band for band in bands if band[1] > len(front)]
        yield from (here[start:end] for start, end in bands[: len(bands) - len(behind)])
        groups = list(grouped(behind, RANGE_BYTES))
        # As many at once as are allowed, the first ones first.
        coming = [self._threads.submit(self.range, part, g[0][0], g[-1][1]) for g in groups]
        for group, future in zip(groups, coming, strict=True):
            data = np.frombuffer(future.result() or b"", np.uint8)
            first = group[0][0]
            yield from (data[start - first : end - first] for start, end in group)

    def _all(self, do: Callable[[A], T], items: Iterable[A]) -> list[T]:
        try:
            return list(self._threads.map(do, items))
        except (RuntimeError, CancelledError) as error:  # it is closed
            raise Fault("closed") from error


class Listed:
    """Parts in one place, entries in another: a directory that answers for a prompt in one go."""

    def __init__(self, parts: Parts, directory: RedisServer) -> None:
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


def path_of(key: Key) -> str:
    """Where it lies, below what the store is given."""
    return f"lmc-{FORMAT}/{key.kind}/{key.digest.hex()}"
