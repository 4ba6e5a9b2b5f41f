"""S3-compatible stores: faults are counted misses, no entry is lost, first layers come first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lmc.store.remote.keyed import Keyed
from lmc.store.remote.s3 import S3Config
from tests.store.disk.chunks import LAYOUT, Spec, empty, right
from tests.store.remote.kept import SPECS, found, put, served
from tests.store.remote.servers import SeaweedFS, seaweedfs, valkey
from tests.store.wanted import brought


@contextmanager
def opened(path: Path | str, endpoint: str = "", **fields: Any) -> Iterator[Keyed]:
    endpoint = endpoint or seaweedfs().endpoint
    tier = S3Config(f"s3://lmc/{path}".replace("//", "/").replace("s3:/", "s3://"),
                    endpoint=endpoint, **fields).open(LAYOUT)  # fmt: skip
    try:
        yield tier
    finally:
        tier.close()


@pytest.mark.slow  # it takes half a minute to come back
def test_a_store_that_is_gone_is_done_without_and_found_again(tmp_path: Path) -> None:
    seaweedfs()  # credentials
    server = SeaweedFS()
    try:
        with opened(tmp_path, server.endpoint, timeout_s=1.0) as tier:
            assert put(tier, *SPECS[:2]) == ["stored"] * 2
            for gone, back, kinds in (
                (server.hold, server.go_on, {"faults:timeout"}),
                (server.kill, server.start, {"faults:connection", "faults:timeout"}),
            ):
                tier.counts.clear()
                gone()
                assert put(tier, SPECS[2]) == ["failed"]
                assert not found(tier, SPECS[0]) and not served(tier, SPECS[0])
                assert {kind for kind in tier.counts if kind.startswith("faults:")} <= kinds
                back()
                until = time.monotonic() + 30
                while not served(tier, SPECS[0]):
                    assert time.monotonic() < until
    finally:
        server.stop()


class Odd(BaseHTTPRequestHandler):
    """Answers every request with one status and no sense."""

    status = 500

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"\x00garbage<xml>" * 100)

    do_PUT = do_HEAD = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "kind"),
    [(500, "error"), (403, "refused"), (200, ""), (507, "full"), (404, "no_bucket")],
)
def test_what_answers_otherwise_than_a_store_ends_nothing(status: int, kind: str) -> None:
    seaweedfs()  # credentials
    handler = type("Handler", (Odd,), {"status": status})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        with opened("any", endpoint, timeout_s=1.0) as tier:
            outcome = put(tier, SPECS[0])
            assert not found(tier, SPECS[0]) and not served(tier, SPECS[0])
            assert outcome != ["known"]
            if kind:
                assert outcome == ["failed"]
                assert tier.counts[f"faults:{kind}"]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("listed", [False, True])
def test_engines_that_put_at_once_lose_nothing_of_each_other(listed: bool, tmp_path: Path) -> None:
    more = {"directory": valkey().url} if listed else {}
    with opened(tmp_path, **more) as one, opened(tmp_path, **more) as other:
        # The same content behind different texts, so that one entry tells of all.
        variants = [Spec(1, context, 20, origin) for context, origin in
                    ((1, "exact"), (2, "exact"), (3, "isolated"), (4, "anchored"))]  # fmt: skip
        threads = [
            threading.Thread(target=put, args=(tier, spec))
            for tier, spec in zip([one, other, one, other], variants, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        record = variants[0].record()
        (told,), _ = one.lookup_many(record.namespace, [record.key], [], time.monotonic() + 5)
        assert {r.id for r in told} == {spec.record().id for spec in variants}
        assert all(served(other, spec) for spec in variants)


def test_the_first_layers_of_a_large_chunk_come_first(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        large = Spec(7, 0, 60_000)  # 15 MB
        assert put(tier, large) == ["stored"]
        into, seen = empty(large.forms()), []
        assert brought(tier, large.record(), into, seen=seen.append) and right(into, large)
        assert sorted(set(seen)) == seen or seen == sorted(seen)
        assert len({layers for layers in seen if 0 < layers < LAYOUT.L}) >= 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"url": "redis://b"}, "url: want s3://"),
        ({"url": "s3://"}, "url: want s3://"),
        ({"url": "s3://b", "endpoint": "ftp://h"}, "endpoint: want"),
        ({"url": "s3://b", "timeout_s": -1}, "timeout_s: got -1"),
        ({"url": "s3://b", "compression": "zip"}, "compression: got 'zip'"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        S3Config(**fields)
