"""OpenAI servers, each in a process of its own, on loopback."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_S = 600.0  # vLLM compiles the model first
STOP_S = 60.0
ENGINE_STOP_S, KILL_S = 10.0, 1.0


@dataclass(frozen=True)
class Server:
    """One that answers. log: all that it prints. pid: of the process that started all others."""

    url: str
    log: Path
    pid: int

    def post(self, path: str) -> None:
        """Raises OSError where it does not answer with a 2xx."""
        request = urllib.request.Request(self.url + path, method="POST")
        with urllib.request.urlopen(request, timeout=START_S):
            pass

    def get(self, path: str) -> str:
        """Raises OSError as `post`."""
        with urllib.request.urlopen(self.url + path, timeout=START_S) as answer:
            return str(answer.read(), "utf-8")


def lmc_serve(model: str | Path, config: Path) -> list[str]:
    """`lmc serve` of this very lmc."""
    start = "from lmc.cli.app import app; app()"
    return [sys.executable, "-c", start, "serve", str(model), "--config", str(config)]


def vllm_serve(model: str | Path) -> list[str]:
    """vLLM's own server, whichever package it came as."""
    entry = "vllm.entrypoints.launchers.api_server.entry"
    return [sys.executable, "-m", entry, "--model", str(model)]


def free_port() -> int:
    """A port of the loopback that nobody has, and that stays free until a server takes it.

    Systems give out ports by themselves from 32,768 on: one of those may be anybody's connection
    by the time a server starts. It is drawn from below, and from the system's own chance: what
    seeds `random` alike in two processes does not send them to one port.
    """
    while True:
        port = 10_000 + secrets.randbelow(22_768)
        if is_free(port):
            return port


def is_free(port: int) -> bool:
    """Whether nothing has this port of the loopback."""
    with socket.socket() as tried, suppress(OSError):
        tried.bind(("127.0.0.1", port))
        return True
    return False


@contextmanager
def running(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server that answers on a port of its own; it and all that it started are gone in the end.

    Raises:
        RuntimeError: it ended, or has not answered for ten minutes; with the end of its log.
    """
    port = free_port()
    with log.open("w") as out:
        child = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment or {}),
        )  # fmt: skip
    server = Server(f"http://127.0.0.1:{port}", log, child.pid)
    try:
        _wait(server, child)
        yield server
    finally:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_S)
        # Its engine and workers may end after it, as what they stand on may be taken away then.
        ended = child.poll() is not None
        with suppress(ProcessLookupError):  # none of them is left
            for sign, seconds in ((0, ENGINE_STOP_S * ended), (signal.SIGKILL, KILL_S)):
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    os.killpg(child.pid, sign)
                    child.poll()
                    time.sleep(0.1)
        child.wait()


def _wait(server: Server, child: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_S
    while child.poll() is None and time.monotonic() < until:
        try:
            server.get("/health")
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"no server:\n{server.log.read_text()[-6000:]}")
