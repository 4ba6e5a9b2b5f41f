"""A server on a host of its own, a network namespace, whose network fails while it goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.store.remote.kept import SPECS, done_without, opened, put, served
from tests.store.remote.servers import Valkey

NAME = f"lmc-{os.getpid()}"
HERE, THERE = "10.213.77.1", "10.213.77.2"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Apart(Valkey):
    """A host of its own at the end of a cable."""

    host = THERE

    def command(self) -> list[str]:
        return ["ip", "netns", "exec", NAME, *super().command(), "--protected-mode", "no"]

    def pull_cable(self) -> None:
        ip("-n", NAME, "link", "set", "there", "down")

    def lose_answers(self) -> None:
        ip("-n", NAME, "route", "add", "blackhole", HERE)

    def lose_requests(self) -> None:
        ip("route", "add", "blackhole", THERE)

    def mend(self) -> None:
        ip("-n", NAME, "link", "set", "there", "up")
        for where, whom in ((("-n", NAME), HERE), ((), THERE)):
            subprocess.run(["ip", *where, "route", "del", "blackhole", whom], capture_output=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Apart]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces want root and iproute2")
    try:
        ip("netns", "add", NAME)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    here = f"lmc{os.getpid()}"[:15]
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", "there", "netns", NAME)
        ip("addr", "add", f"{HERE}/30", "dev", here)
        ip("link", "set", here, "up")
        for words in (("addr", "add", f"{THERE}/30", "dev", "there"),
                      ("link", "set", "there", "up")):  # fmt: skip
            ip("-n", NAME, *words)
        started = Apart()
        try:
            yield started
        finally:
            started.stop()
    finally:
        ip("netns", "del", NAME)  # and with it the cable


@pytest.mark.parametrize("fails", [Apart.pull_cable, Apart.lose_answers, Apart.lose_requests])
def test_a_network_that_is_gone_costs_its_deadline_and_nothing_else(
    server: Apart, fails: Callable[[Apart], None]
) -> None:
    with opened(server.url, prefix=fails.__name__) as tier:
        assert put(tier, *SPECS[:2]) == ["stored"] * 2
        try:
            fails(server)
            kinds = done_without(tier)
            assert kinds and kinds <= {"faults:timeout", "faults:connection"}
        finally:
            server.mend()
        until = time.monotonic() + 10
        while not served(tier, SPECS[0]):  # a network may take a moment to find itself
            assert time.monotonic() < until
        assert put(tier, SPECS[3]) == ["stored"] and served(tier, SPECS[3])
