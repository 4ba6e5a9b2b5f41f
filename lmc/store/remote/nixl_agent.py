"""NIXL, as far as memory of other engines is read: an agent, and buffers that it reads into."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from lmc.store.remote.location import AGENT_BYTES, Run
from lmc.store.remote.server import Fault

BUFFER_BYTES = 4 << 20  # at least
POLL_S = 0.0005  # less takes the processor from the transport
STUCK = 8  # transfers that neither end nor can be called off; then no more are begun


class Agent:
    """NIXL's agent of this process, and those of others as far as they were met.

    Args:
        memory: that others may read.

    Raises:
        Fault: `no_nixl`, where it cannot be had.
    """

    def __init__(self, memory: np.ndarray) -> None:
        try:
            self.id = os.urandom(AGENT_BYTES)
            self._agent = made(self.id.hex(), "UCX")
            self.address = memory.ctypes.data
            self._registered = self.register(memory)
            self.metadata: bytes = self._agent.get_agent_metadata()
        except Exception as error:  # of an extension, of whatever kind
            raise Fault("no_nixl") from error
        self._met: dict[bytes, bytes] = {}  # metadata, by id
        self._stuck: list[tuple[Any, Any]] = []  # a transfer, and what it may still write
        self._lock = threading.Lock()

    def register(self, memory: np.ndarray) -> Any:
        return self._agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")

    def deregister(self, registered: Any) -> None:
        with suppress(Exception):
            self._agent.deregister_memory(registered)

    def meet(self, id: bytes, metadata: bytes) -> None:
        """Know how another one is reached."""
        with self._lock:
            if self._met.get(id) == metadata:
                return
            self._forget(id)
            with faults("connection"):
                self._agent.add_remote_agent(metadata)
            self._met[id] = metadata

    def begin(self, of: bytes, runs: Sequence[Run], into: np.ndarray) -> Any:
        """Begin to read from another's memory.

        Args:
            runs: addresses there, `[start, end)`. into: as many bytes, registered.
        """
        self._look_at_stuck()
        here, at = [], into.ctypes.data
        for start, end in runs:
            here.append((at, end - start, 0))
            at += end - start
        there = [(start, end - start, 0) for start, end in runs]
        try:
            with faults("connection"):
                a = self._agent
                descs = (a.get_xfer_descs(here, "DRAM"), a.get_xfer_descs(there, "DRAM"))
                transfer = a.initialize_xfer("READ", *descs, of.hex())
                if a.transfer(transfer) == "ERR":
                    raise Fault("connection")
        except Fault:
            with self._lock:
                self._forget(of)  # it may have come back as another one
            raise
        return transfer

    def wait(self, transfer: Any, of: bytes, into: Any, until: float) -> None:
        """Return when it is done.

        Args:
            into: what it writes, which is kept from others where it does not end.

        Raises:
            Fault: it failed, or took longer than `until`.
        """
        try:
            with faults("connection"):
                while (state := self._agent.check_xfer_state(transfer)) == "PROC":
                    if time.monotonic() > until:
                        raise Fault("timeout")
                    time.sleep(POLL_S)
                if state != "DONE":
                    raise Fault("connection")
        except Fault:
            with self._lock:
                self._forget(of)
            raise
        finally:
            self.release(transfer, into)

    def release(self, transfer: Any, into: Any) -> None:
        """Nobody waits for it any more; while it goes on, `into` is what it may write."""
        try:
            self._agent.release_xfer_handle(transfer)
        except Exception:  # it goes on
            with self._lock:
                self._stuck.append((transfer, into))

    def _look_at_stuck(self) -> None:
        with self._lock:
            stuck, self._stuck = self._stuck, []
        for transfer, into in stuck:
            self.release(transfer, into)
        if len(self._stuck) >= STUCK:
            raise Fault("stuck")

    def holds(self, into: Any) -> bool:
        """Whether a transfer that was given up may still write there."""
        with self._lock:
            return any(other is into for _, other in self._stuck)

    def _forget(self, id: bytes) -> None:
        if self._met.pop(id, None) is not None:
            with suppress(Exception):
                self._agent.remove_remote_agent(id.hex())


class Window:
    """Two buffers of one reader: one is filled while the other is used."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._buffers: list[tuple[np.ndarray, Any] | None] = [None, None]

    def of(self, turn: int, nbytes: int) -> np.ndarray:
        """Room for so many bytes, registered."""
        held = self._buffers[turn % 2]
        if held is not None and self._agent.holds(held[0]):
            held = None  # it is the transfer's
        elif held is not None and held[0].nbytes < nbytes:
            self._agent.deregister(held[1])
            held = None
        if held is None:
            buffer = np.empty(max(nbytes, BUFFER_BYTES), np.uint8)
            with faults("no_nixl"):
                held = (buffer, self._agent.register(buffer))
            self._buffers[turn % 2] = held
        return held[0]


def made(name: str, plugin: str) -> Any:
    """NIXL's own agent, with one plugin; raises whatever its extension does."""
    from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t

    if "NIXL_LOG_LEVEL" not in os.environ:  # it would say each step on standard output
        logging.getLogger("nixl").setLevel(logging.WARNING)
    strict = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
    return nixl_agent(name, nixl_agent_config(backends=[plugin], sync_mode=strict))


@contextmanager
def faults(kind: str) -> Iterator[None]:
    """Whatever NIXL raises is a Fault."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:  # of an extension, of whatever kind
        raise Fault(kind) from error
