"""`lmc doctor` says what works, and a tier that does not answer is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmc.cli import doctor
from lmc.cli.app import app
from lmc.experiment.vllm.servers import free_port
from tests.store.remote.servers import valkey


def asked(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_it_says_what_is_there() -> None:
    code, said = asked()
    assert code == 0
    lines = {line[3:23].strip(): line for line in said.splitlines()}
    tiers = [f"{name} tier" for name in ("disk", "redis", "s3", "nixl")]
    for what in ("python", "torch", "vllm", *tiers, "smollm2"):
        assert lines[what].startswith("ok "), lines[what]
    assert "tested" in lines["vllm"] and "no GPU" in lines["torch"]


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "version", absent)
    code, said = asked()
    assert code == 0
    for line in (
        "torch               not installed: pip install 'lmc-kv[hf]'",
        "vllm                not installed",
        "no redis: pip install 'lmc-kv[redis]'",
        "no obstore: pip install 'lmc-kv[s3]'",
        "no lmdb, xxhash, zstandard: pip install 'lmc-kv[store]'",
    ):
        assert line in said


def absent(package: str) -> str:
    raise doctor.PackageNotFoundError(package)


def test_tiers_of_a_config_are_asked(tmp_path: Path) -> None:
    config = tmp_path / "lmc.yaml"
    folder = tmp_path / "kv"
    gone = f"redis://127.0.0.1:{free_port()}"
    config.write_text(
        "tiers:\n"
        f"  - {{name: disk, path: {folder}, capacity: 1MiB}}\n"
        f"  - {{name: redis, url: '{valkey().url}'}}\n"
    )
    code, said = asked("--config", str(config))
    assert (
        code == 0 and "takes a chunk and tells of it" in said and f"{folder} will be made" in said
    )
    assert not folder.exists()
    config.write_text(f"tiers: [{{name: redis, url: '{gone}'}}]")
    code, said = asked("--config", str(config))
    assert code == 1 and "redis               takes nothing (failed): faults:connection" in said
    config.write_text("tiers: [{name: redis, url: 'ftp://h'}]")
    code, said = asked("--config", str(config))
    assert code == 2 and "url: want one that begins with redis://" in said
