"""Two engines, one after the other, and a server between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.connectors.vllm.engine import run_scenario
from tests.connectors.vllm.faulty import Proxy
from tests.connectors.vllm.windowed import same
from tests.store.remote.servers import Valkey, seaweedfs

pytestmark = pytest.mark.engine


def test_documents_of_one_engine_are_reused_and_moved_by_another(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    server = Valkey()
    try:
        tier = {"name": "redis", "url": server.url, "timeout_s": 0.5}
        settings: dict[str, Any] = {"lmc": {"tiers": [tier], "hand_over": True}}
        module = "tests.connectors.vllm.remote:"
        first = run_scenario(module + "stores", tiny_llama_dir, tmp_path, **settings)
        handed = run_scenario(
            module + "is_handed", tiny_llama_dir, tmp_path,
            lmc=settings["lmc"] | {"fetch_patience_s": 1.0},
        )  # fmt: skip
        got = run_scenario(
            module + "shares", tiny_llama_dir, tmp_path, given=(server.process.pid,), **settings
        )
    finally:
        server.stop()
    assert got["recompute"].kinds == {"exact": 110, "recomputed": 140, "new": 20}
    assert same(got["recompute"], got["plain"]) and same(got["exact"], got["plain"])
    assert got["epic"].kinds == {"exact": 110, "moved": 124, "recomputed": 16, "new": 20}
    per_token = sum(got["recompute"].report["bytes"].values()) // 250
    assert got["epic"].report["bytes"] == {"host": 0, "redis": 250 * per_token}
    # What hangs is done without, and is left alone.
    assert got["held"].kinds == {"new": 160} and same(got["held"], got["held_plain"])
    assert got["counts"]["redis:faults:timeout"] >= 1
    _check_handed(first, handed)


def _check_handed(first: dict[str, Any], got: dict[str, Any]) -> None:
    """The prompts that the first engine computed are those of the second, byte by byte."""
    assert first["blended"].kinds == {"exact": 110, "moved": 124, "recomputed": 16, "new": 20}
    assert first["counts"]["hand_overs:kept"] == 2
    assert first["blended"].report["hand_over"] == "kept"
    for name in ("blended", "again"):
        assert got[name].kinds == {"exact": 269, "recomputed": 1}, name
        assert same(got[name], first["blended"]), name
    assert got["held"].kinds["local_blended"] == 256 and same(got["held"], first["blended"])
    assert not same(got["blended"], got["plain"])
    assert got["exact"].kinds == {"exact": 269, "recomputed": 1}
    assert same(got["exact"], got["plain"]) and same(first["exact"], got["plain"])
    # It is nobody's exact prefix, and nobody's who does not name it.
    assert same(got["not_asked_for"], got["plain"])
    assert "local" not in got["not_asked_for"].kinds
    for name in ("unknown", "other_tenant"):
        assert got[name].kinds == {"new": 270} and same(got[name], got["plain"]), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["redis", "s3", "nixl", "nixl_files"])
def test_faults_of_a_server_under_load_fail_no_request_and_are_counted(
    kind: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    server = seaweedfs() if kind == "s3" else Valkey()
    proxy = Proxy(server.port, tmp_path / "control")
    url = f"redis://127.0.0.1:{proxy.port}/0"
    of_kind = {
        "redis": {"url": url},
        "s3": {"url": f"s3://lmc/{tmp_path.name}", "endpoint": f"http://127.0.0.1:{proxy.port}"},
        "nixl": {"directory": url, "capacity": "64MiB"},
        "nixl_files": {"directory": url, "path": str(tmp_path / "files")},
    }[kind]
    tiers = [
        {"name": kind, "timeout_s": 0.4} | of_kind,
        {"name": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB"},
    ]
    try:
        got = run_scenario(
            "tests.connectors.vllm.faulty:faults", tiny_llama_dir, tmp_path,
            given=(kind, server.port, tmp_path / "control"),
            lmc={"tiers": tiers, "fetch_patience_s": 1.0},
        )  # fmt: skip
    finally:
        proxy.close()
        if kind != "s3":
            server.stop()
    plain, (well_s, well) = got.pop("plain"), got.pop("well")
    assert all(answer.report["bytes"][kind] for answer in well[:3])
    for name, seen in got.items():
        told = [key for key in seen["counts"] if "faults:" in key or "failed:" in key]
        assert any(kind in key for key in told), (name, seen["counts"])
        for seconds, answers in (seen["first"], seen["second"]):
            for answer, healthy in zip(answers[:3], well, strict=False):
                assert same(answer, healthy), name
                assert answer.kinds == healthy.kinds, name  # out of the disk, undisturbed
            assert all(same(a, b) for a, b in zip(answers[:2], plain, strict=False))  # none moved
            assert seconds < well_s + 1.0 + 5.0, name  # its patience; and what a busy machine takes
        assert seen["served_again"] < 60, name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["redis", "s3", "nixl_files"])
def test_engines_of_other_ranks_and_pages_share_one_namespace(
    kind: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    server = seaweedfs() if kind == "s3" else Valkey()
    url = f"redis://127.0.0.1:{server.port}/"
    ways: list[dict[str, Any]] = [{}, {"tensor_parallel_size": 2, "block_size": 64}]
    results = []
    try:
        for number, (writer, reader) in enumerate([ways, ways[::-1]]):
            of_kind = {
                "redis": {"url": url + str(number)},
                "s3": {"url": f"s3://lmc/{tmp_path.name}-{number}",
                       "endpoint": f"http://127.0.0.1:{server.port}"},
                "nixl_files": {"directory": url + str(number),
                               "path": str(tmp_path / f"files{number}")},
            }[kind]  # fmt: skip
            lmc = {"tiers": [{"name": kind} | of_kind]}
            both: dict[str, Any] = {"separate_worker": True, "lmc": lmc}
            run_scenario("persist_elsewhere", tiny_llama_dir, tmp_path, **both | writer)
            got = run_scenario("restarted_elsewhere", tiny_llama_dir, tmp_path, **both | reader)
            results.append(got)
    finally:
        if kind != "s3":
            server.stop()
    two, one = results
    assert one["epic"].kinds == two["epic"].kinds
    assert one["epic"].kinds["moved"] > 100
    assert same(one["epic"], two["epic"]) and same(one["plain"], two["plain"])
    # A rank's bytes: those of its heads.
    assert one["epic"].report["bytes"][kind] == 2 * two["epic"].report["bytes"][kind] > 0
