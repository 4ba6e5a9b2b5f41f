"""What the tests let an engine do whose tier's server fails while requests run."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import redis

from tests.connectors.vllm import persistent
from tests.connectors.vllm import scenarios as s

# What a proxy does to connections. A Redis can be full, too, or want a password.
PROXIED = ("gone", "held", "reset", "slow", "garbage")


class Proxy:
    """A port that hands on to a server, or does otherwise as a file says, from any process."""

    def __init__(self, port: int, control: Path) -> None:
        self._port, self._control = port, control
        self._open: list[socket.socket] = []
        self.mode = ""
        control.write_text("")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        for work in (self._obey, self._accept):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _obey(self) -> None:
        while self._listening.fileno() >= 0:
            self.mode = self._control.read_text()
            if self.mode in ("gone", "reset"):
                while self._open:
                    _reset(self._open.pop())
            time.sleep(0.01)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                one, _ = self._listening.accept()
                if self.mode == "gone":
                    _reset(one)
                    continue
                other = socket.create_connection(("127.0.0.1", self._port))
                self._open += [one, other]
                for way in ((one, other, False), (other, one, True)):
                    threading.Thread(target=self._pump, args=way, daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket, back: bool) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                while self.mode == "held":
                    time.sleep(0.02)
                if back and self.mode == "slow":
                    time.sleep(0.5)
                if back and self.mode == "garbage":
                    data = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n$-1\r\n:<?x"
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _reset(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def faults(session: s.Session, kind: str, port: int, control: Path) -> dict[str, Any]:
    """By fault: answers while it lasts, of prompts that the tier and a disk have, and of others,
    all at once; how long until the tier serves again; and what was counted.

    Args:
        kind: of the tier. port: of its server. control: of the proxy that the engine knows of.
    """

    def now(mode: str) -> None:
        control.write_text(mode)
        time.sleep(0.1)

    counts = persistent.counting(session)
    session.warm()
    asked = [(s.prompt(2, 0, 1), "prefix"), (s.prompt(3, 1), "full_recompute"),
             (s.prompt(0, 4), s.EPIC)]  # fmt: skip
    results: dict[str, Any] = {"plain": [s.plain(session, parts) for parts, _ in asked]}
    for parts, blend in asked:
        session.fresh(parts, blend)
    session.llm.collective_rpc("finish_saves")

    def all_at_once(fresh: list[int]) -> tuple[float, list[s.Answer]]:
        persistent.forget_memory(session)
        session.llm.reset_prefix_cache()
        begun = time.monotonic()
        ids = [session.add(parts, blend, save=False) for parts, blend in asked]
        ids.append(session.add([fresh]))
        answers = session.finish()
        return time.monotonic() - begun, [answers[i] for i in ids]

    def served() -> float:
        """Seconds until the tier's server gives what is asked for again."""
        begun = time.monotonic()
        while time.monotonic() - begun < 60:
            _, answers = all_at_once(s.text(200, 30))
            if any(answer.report["bytes"].get(kind) for answer in answers):
                return time.monotonic() - begun
            time.sleep(0.5)
        return float("inf")

    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        name: (partial(now, name), partial(now, "")) for name in PROXIED
    }
    if kind != "s3":
        there = redis.Redis(port=port)
        there_too = redis.Redis(port=port, password="other")
        ways["full"] = (
            lambda: there.config_set("maxmemory", "1"), lambda: there.config_set("maxmemory", "0"),
        )  # fmt: skip
        ways["refused"] = (
            lambda: (there.config_set("requirepass", "other"), now("reset"), now("")),
            lambda: there_too.config_set("requirepass", ""),
        )
    results["well"] = all_at_once(s.text(199, 200))
    for i, (name, (fails, mend)) in enumerate(ways.items()):
        before = counts.copy()
        fails()
        first = all_at_once(s.text(201 + i, 200))
        session.llm.collective_rpc("finish_saves")
        second = all_at_once(s.text(231 + i, 200))
        mend()
        after = served()
        results[name] = {"first": first, "second": second, "served_again": after,
                         "counts": dict(counts - before)}  # fmt: skip
    return results
