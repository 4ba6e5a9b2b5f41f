"""Parts in the memory of the engines that put them, read by others through NIXL, one-sided.

A Redis says of each part in whose memory it lies and where, and of each engine how it is reached
(NIXL's metadata of its agent), as long as that engine says so every few seconds. What is read may
have been overwritten meanwhile: it is believed as far as it verifies, as everywhere.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import NamedTuple

import numpy as np

from lmc.store import wire
from lmc.store.extents import Extents
from lmc.store.remote.location import Location, Run
from lmc.store.remote.nixl_agent import Agent, Window
from lmc.store.remote.redis_server import RedisServer
from lmc.store.remote.server import Fault, Key, Put, grouped, header_of
from lmc.store.wire import Header

UNIT = 4096  # bytes that a part begins at a multiple of
GROUP_BYTES = 4 << 20  # that one transfer brings, or one band if that has more
LASTS_S = 10  # that an engine is believed to be there
BEATS_S = 3.0
AGENT = b"a"  # what names of agents begin with in the Redis


class Memory:
    """Parts of this engine, in one buffer that others read; of too many the oldest go."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = np.empty(nbytes, np.uint8)
        self._extents = Extents(nbytes // UNIT)
        self._parts: OrderedDict[Key, list[Run]] = OrderedDict()  # runs in bytes of the buffer
        self._lock = threading.Lock()

    def outgoing(self, part: Key, nbytes: int) -> list[Key] | None:
        """What must go for a part of so many bytes, an older one of it too; None: it never fits."""
        need = _units(nbytes) - self._extents.free
        if _units(nbytes) > len(self.buffer) // UNIT:
            return None
        gone: list[Key] = []
        older = [part] if part in self._parts else []
        for other in chain(older, (key for key in self._parts if key != part)):
            if need <= 0 and other != part:
                break
            need -= sum(end - start for start, end in self._parts[other]) // UNIT
            gone.append(other)
        return gone

    def put(self, part: Key, data: memoryview) -> list[Run]:
        """Where it lies now; there is room for it."""
        with self._lock:
            taken = self._extents.take(_units(len(data)))
            assert taken is not None
            runs = [(start * UNIT, end * UNIT) for start, end in taken]
            self._parts[part] = runs
            at = 0
            for start, end in runs:
                some = data[at : at + end - start]
                self.buffer[start : start + len(some)] = np.frombuffer(some, np.uint8)
                at += len(some)
        return runs

    def drop(self, part: Key) -> None:
        with self._lock:
            runs = self._parts.pop(part, [])
            self._extents.give([(start // UNIT, end // UNIT) for start, end in runs])

    def copy(self, part: Key, runs: Sequence[Run], into: np.ndarray) -> bool:
        """Bytes of a part of which `runs` are some; whether it is there still."""
        with self._lock:
            if part not in self._parts:
                return False
            at = 0
            for start, end in runs:
                into[at : at + end - start] = self.buffer[start:end]
                at += end - start
        return True


class Pull(NamedTuple):
    """Bytes on their way.

    Attributes:
        into: where they go.
        wait: returns when they are there; raises Fault, or HeaderError where they have gone.
        cancel: where nobody waits.
    """

    into: np.ndarray
    wait: Callable[[], None]
    cancel: Callable[[], None]


class NixlServer:
    """As `lmc.store.remote.server.Server`.

    An agent is made when something is put or read first, so that who only asks has none.

    Args:
        directory: what says where parts lie; it has the entries too.
        nbytes: of this process's memory, for parts. timeout_s: of a transfer.
    """

    reads = 4

    def __init__(self, directory: RedisServer, nbytes: int, timeout_s: float) -> None:
        self._directory, self._nbytes, self._timeout_s = directory, nbytes, timeout_s
        self.entries = directory.entries
        self._memory: Memory | None = None
        self._agent: Agent | None = None
        self._windows: list[Window] = []
        self._there: dict[bytes, tuple[float, bytes]] = {}  # agents: until when, metadata
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._beat: threading.Thread | None = None

    def holds(self, parts: Sequence[Key]) -> list[bool]:
        told = [_location(data) for data in self._directory.entries(parts)]
        there = self._alive({where.agent for where in told if where})
        dead = [p for p, w in zip(parts, told, strict=True) if w and w.agent not in there]
        if dead:  # nobody will ever read these
            self._directory.delete(dead)
        return [where is not None and where.agent in there for where in told]

    def put(self, items: Sequence[Put]) -> list[Fault | None]:
        done: list[Fault | None] = [None] * len(items)
        told: list[Put] = []
        for i, item in enumerate(items):
            if len(item.data):
                where = self._hold(item)
                if where is None:
                    done[i] = Fault("full")
                    continue
                item = item._replace(data=memoryview(where.packed()))
            told.append(item)
        if told:
            self._announce()
        here = [i for i, fault in enumerate(done) if fault is None]
        for i, fault in zip(here, self._directory.put(told), strict=True):
            done[i] = fault
        return done

    def get(self, part: Key, header: Header) -> tuple[Header, Iterator[np.ndarray]] | None:
        where = _location(self._directory.entries([part])[0])
        if where is None:
            return None
        if where.nbytes != header.size + header.payload_bytes:
            # Another engine has put it again since, with a header of its own.
            header = self._header(part, where)
        spans = self._spans(part, where, header)
        try:
            found = header_of(next(spans).tobytes())
            if found.id != header.id or found.payload_bytes != header.payload_bytes:
                raise wire.HeaderError("another part")
        except BaseException:
            spans.close()
            raise
        return found, spans

    def delete(self, keys: Sequence[Key]) -> None:
        self._directory.delete(keys)
        for key in keys:
            if self._memory is not None and key.kind == "part":
                self._memory.drop(key)

    def close(self) -> None:
        self._closing.set()
        if self._beat is not None:
            self._beat.join()
        with suppress(Fault):
            if self._agent is not None:
                self._directory.forget(AGENT + self._agent.id)
        self._directory.close()

    # -- what this engine has ----------------------------------------------------------------

    def _hold(self, item: Put) -> Location | None:
        """Where a part lies in this engine's memory; None where there is no room."""
        agent, memory = self._made()
        gone = memory.outgoing(item.part, len(item.data))
        if gone is None:
            return None
        if gone:
            self._directory.delete(gone)  # before anything else lies there
        for other in gone:
            memory.drop(other)
        runs, left = [], len(item.data)
        for start, end in memory.put(item.part, item.data):
            n = min(left, end - start)
            runs.append((agent.address + start, agent.address + start + n))
            left -= n
        return Location(agent.id, tuple(runs))

    def _made(self) -> tuple[Agent, Memory]:
        with self._lock:
            if self._closing.is_set():
                raise Fault("closed")
            if self._memory is None:
                self._memory = Memory(self._nbytes)
            if self._agent is None:
                self._agent = Agent(self._memory.buffer)
            return self._agent, self._memory

    def _announce(self) -> None:
        """Say that this engine is there, and go on saying so."""
        with self._lock:
            if self._beat is not None or self._agent is None:
                return
            self._say()
            self._beat = threading.Thread(target=self._beats, name="lmc-nixl", daemon=True)
            self._beat.start()

    def _say(self) -> None:
        assert self._agent is not None
        self._directory.keep(AGENT + self._agent.id, self._agent.metadata, LASTS_S)

    def _beats(self) -> None:
        while not self._closing.wait(BEATS_S):
            with suppress(Fault):
                self._say()

    # -- what others have --------------------------------------------------------------------

    def _alive(self, agents: set[bytes]) -> set[bytes]:
        """Which of them are there, as far as is known for a second."""
        now = time.monotonic()
        asked = [a for a in agents if self._there.get(a, (0.0, b""))[0] < now]
        for id, said in zip(asked, self._directory.values([AGENT + a for a in asked]), strict=True):
            self._there.pop(id, None)
            if said:
                self._there[id] = (now + 1.0, said)
        return {agent for agent in agents if agent in self._there}

    def _header(self, part: Key, where: Location) -> Header:
        front = self._bytes(part, where, 0, min(64, where.nbytes))
        size, payload = wire.sizes(front)
        if size + payload != where.nbytes:
            raise wire.HeaderError(f"got a part of {where.nbytes} bytes, want {size + payload}")
        return header_of(self._bytes(part, where, 0, size))

    def _bytes(self, part: Key, where: Location, start: int, end: int) -> bytes:
        with self._window() as window:
            pull = self._pull(part, where, start, end, window.of(0, end - start))
            pull.wait()
            return pull.into.tobytes()

    def _spans(
        self, part: Key, where: Location, header: Header
    ) -> Generator[np.ndarray, None, None]:
        """First the header's bytes, then those of `header.bands()`."""
        size = header.size
        bands = [(0, size), *((size + start, size + end) for *_, start, end in header.bands())]
        with self._window() as window:
            groups = [*grouped(bands, GROUP_BYTES)]
            begun: list[Pull] = []  # one group ahead of the one that is used
            try:
                for turn in range(len(groups) + 1):
                    if turn < len(groups):
                        first, last = groups[turn][0][0], groups[turn][-1][1]
                        buffer = window.of(turn, last - first)
                        begun.append(self._pull(part, where, first, last, buffer))
                    if turn:
                        pull = begun.pop(0)
                        pull.wait()
                        first = groups[turn - 1][0][0]
                        yield from (pull.into[a - first : b - first] for a, b in groups[turn - 1])
            finally:
                for pull in begun:
                    pull.cancel()

    def _pull(self, part: Key, where: Location, start: int, end: int, buffer: np.ndarray) -> Pull:
        """Begin to bring some bytes of a part into a buffer of a window."""
        agent, memory = self._made()
        into = buffer[: end - start]
        runs = where.some(start, end)
        if where.agent == agent.id:
            mine = [(a - agent.address, b - agent.address) for a, b in runs]

            def copied() -> None:
                if not memory.copy(part, mine, into):
                    raise wire.HeaderError("it has gone")

            return Pull(into, copied, lambda: None)
        if not self._alive({where.agent}):
            raise Fault("gone")
        agent.meet(where.agent, self._there[where.agent][1])
        transfer = agent.begin(where.agent, runs, into)
        until = time.monotonic() + self._timeout_s
        return Pull(
            into,
            lambda: agent.wait(transfer, where.agent, buffer, until),
            lambda: agent.release(transfer, buffer),
        )

    @contextmanager
    def _window(self) -> Iterator[Window]:
        agent, _ = self._made()
        with self._lock:
            window = self._windows.pop() if self._windows else Window(agent)
        try:
            yield window
        finally:
            self._windows.append(window)


def _units(nbytes: int) -> int:
    return -(-nbytes // UNIT)


def _location(data: bytes) -> Location | None:
    """What is told of a part; None where nothing is, or nothing that can be read."""
    try:
        return Location.unpacked(data) if data else None
    except ValueError:
        return None
