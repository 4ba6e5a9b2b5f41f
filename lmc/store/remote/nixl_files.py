"""Parts in files that NIXL reads and writes: POSIX anywhere, GDS where a file system has it."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmc.model.layout import KVLayout
from lmc.store import wire
from lmc.store.compress import check_name
from lmc.store.remote.keyed import Keyed
from lmc.store.remote.nixl_agent import POLL_S, STUCK, made
from lmc.store.remote.parts import Listed, Parts, path_of
from lmc.store.remote.redis_client import check_url, connecting
from lmc.store.remote.redis_flights import RedisFlights
from lmc.store.remote.redis_server import RedisServer
from lmc.store.remote.server import Fault, Key, Put, check_timeout
from lmc.store.sections import Heads

Plugin = Literal["POSIX", "GDS", "GDS_MT"]


@dataclass(frozen=True)
class NixlFilesConfig:
    """Chunks in files of a folder that all who share it mount, moved by a plugin of NIXL.

    Attributes:
        path: of the folder; it is made.
        directory: the URL of a Redis that says who has what, as `url` of the redis tier.
        directory_password_env: as `password_env` there.
        plugin: POSIX; or GDS or GDS_MT, on file systems that NVIDIA's cuFile knows.
        prefix: of every key in the directory.
        timeout_s: of every transfer, and of every answer of the directory.
        write: `through` when a chunk is stored, `back` when host memory lets it go.
        compression: none, zstd, shuffle_zstd (lossless), int8, int4 or fp8.
    """

    path: str
    directory: str = field(repr=False)
    directory_password_env: str = ""
    plugin: Plugin = "POSIX"
    prefix: str = "lmc:nixl_files"
    timeout_s: float = 5.0
    write: Literal["through", "back"] = "through"
    compression: str = "none"

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path: got nothing, want a folder")
        check_url(self.directory)
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
        """The tier; a directory that is not there yet is one that answers nothing.

        Raises:
            ValueError: no nixl, or a plugin that does not run here; of the directory as the redis
                tier.
            OSError: a folder that cannot be made.
        """
        if find_spec("nixl") is None:
            raise ValueError("the nixl_files tier needs nixl: pip install 'lmc-kv[nixl]'")
        connect = connecting(self.directory, self.directory_password_env, self.timeout_s)
        parts = NixlFiles(Path(self.path), self.plugin, self.timeout_s)
        directory = RedisServer(connect, self.prefix, None)
        of_rank = (layout, heads, exact_variants, self.compression, label)
        tier = Keyed("nixl_files", Listed(parts, directory), *of_rank)
        tier.flights = RedisFlights(directory, tier.counts)
        return tier


class NixlFiles(Parts):
    """A file a part.

    Raises:
        ValueError: a plugin that does not run here.
        OSError: a folder that cannot be made.
    """

    def __init__(self, folder: Path, plugin: Plugin, timeout_s: float) -> None:
        super().__init__("lmc-nixl-files")
        self._folder, self._plugin, self._timeout_s = folder, plugin, timeout_s
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._name = os.urandom(16).hex()
        try:
            self._agent = made(self._name, plugin)
            if plugin not in self._agent.backends:
                raise RuntimeError("it is not there")
        except Exception as error:  # of an extension, of whatever kind
            raise ValueError(f"plugin: {plugin} of NIXL does not run here: {error}") from error
        self._stuck: list[tuple[Any, ExitStack]] = []  # a transfer, and what it still uses
        self._lock = threading.Lock()

    def put_part(self, item: Put) -> Fault | None:
        data, to = np.frombuffer(item.data, np.uint8), self._folder / path_of(item.part)
        if not len(data):
            return None
        new = to.with_name(f"{to.name}.{os.urandom(8).hex()}")
        try:
            with _faults():
                to.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._move("WRITE", data, new, 0)
                    new.rename(to)
                finally:
                    new.unlink(missing_ok=True)
        except Fault as fault:
            return fault
        return None

    def range(self, key: Key, start: int, end: int) -> memoryview | None:
        file = self._folder / path_of(key)
        with _faults():
            try:
                end = min(end, file.stat().st_size)
                if start >= end:
                    raise wire.HeaderError("got less than a part")
                data = np.empty(end - start, np.uint8)
                self._move("READ", data, file, start)
            except FileNotFoundError:
                return None
        return data.data

    def whole(self, key: Key) -> memoryview | None:
        try:
            return self.range(key, 0, 1 << 62)
        except wire.HeaderError:  # an empty file
            return memoryview(b"")

    def is_there(self, key: Key) -> bool:
        with _faults():
            return (self._folder / path_of(key)).exists()

    def delete_one(self, key: Key) -> None:
        with _faults():
            (self._folder / path_of(key)).unlink(missing_ok=True)

    # -- parts -------------------------------------------------------------------------------

    def _move(self, what: Literal["READ", "WRITE"], data: np.ndarray, file: Path, at: int) -> None:
        """All of `data`, from a place in a file or to it; both are kept while NIXL uses them."""
        self._look_at_stuck()
        a, until = self._agent, time.monotonic() + self._timeout_s
        here = (data.ctypes.data, data.nbytes)
        with ExitStack() as held:
            held.callback(lambda: data)  # a reference
            fd = os.open(file, os.O_RDONLY if what == "READ" else os.O_RDWR | os.O_CREAT, 0o600)
            held.callback(os.close, fd)
            there = (at, data.nbytes, fd)
            for kind, of in (("DRAM", (*here, 0, "")), ("FILE", (*there, ""))):
                registered = a.register_memory([of], kind, backends=[self._plugin])
                held.callback(a.deregister_memory, registered, backends=[self._plugin])
            descs = a.get_xfer_descs([(*here, 0)], "DRAM"), a.get_xfer_descs([there], "FILE")
            transfer = a.initialize_xfer(what, *descs, self._name)
            try:
                state = a.transfer(transfer)
                while state == "PROC":
                    if time.monotonic() > until:
                        raise Fault("timeout")
                    time.sleep(POLL_S)
                    state = a.check_xfer_state(transfer)
                if state != "DONE":
                    raise Fault("error")
            finally:
                self._release(transfer, held)

    def _release(self, transfer: Any, held: ExitStack) -> None:
        try:
            self._agent.release_xfer_handle(transfer)
        except Exception:  # it goes on
            with self._lock:
                self._stuck.append((transfer, held.pop_all()))

    def _look_at_stuck(self) -> None:
        with self._lock:
            stuck, self._stuck = self._stuck, []
        for transfer, kept in stuck:
            with kept:
                self._release(transfer, kept)
        if len(self._stuck) >= STUCK:
            raise Fault("stuck")


@contextmanager
def _faults() -> Iterator[None]:
    """Whatever goes wrong with a file is a Fault; not that it is short."""
    try:
        yield
    except (Fault, wire.HeaderError):
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise Fault("full" if full else "error") from error
    except Exception as error:  # of an extension, of whatever kind
        raise Fault("error") from error
