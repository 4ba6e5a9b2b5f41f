"""The wheel and the sdist as a user installs them, the extras as they resolve, no network after.

Slow: they build, download and install. What pip and uv reach, and the Pythons that the machine
has, say what is tried; all of it is named in the report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
EXTRAS = ("", "sim", "store")
pytestmark = [pytest.mark.slow, pytest.mark.alone]

SIM = """
import lmc, sys
reading = lmc.read_trace("t.jsonl")
assert reading.count == 0 and len(list(reading)) == 20
assert not {"torch", "vllm", "transformers"} & set(sys.modules)
"""
STORE = """
import numpy as np, sys
from lmc.model.layout import KVLayout
from lmc.store.disk.tier import Disk
from lmc.store import Index
from lmc.store.keep import keep
from lmc.chunking.pieces import Piece
layout = KVLayout(2, 1, 8, "float32")
(_, record), = keep(Index(1 << 20), b"n", np.arange(9), [Piece(0, 9)], None, layout.bytes_per_token)
rows = np.arange(record.nbytes, dtype=np.uint8).reshape(2, 2, 9, 32)
with __import__("contextlib").closing(Disk("kv", 1 << 24, layout=layout)) as disk:
    assert disk.put([(record, [rows])]) == [True]
    assert np.array_equal(disk.get(record)[0], rows)
assert "torch" not in sys.modules
"""


def run(*command: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        capture_output=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, and the sdist it was built from."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", out, ROOT, cwd=out)
    return out


def python_of(version: str) -> str:
    """An interpreter of that version which can make an environment."""
    for name in (
        f"python{version}",
        *(Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"),
    ):
        command = [str(name), "-c", "import venv, sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.strip() == version:
            return str(name)
    pytest.skip(f"this machine has no Python {version}")


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
@pytest.mark.parametrize("version", PYTHONS)
@pytest.mark.timeout(900)
def test_installs_and_runs(version: str, kind: str, built: Path, tmp_path: Path) -> None:
    if kind == "tar.gz" and version != "3.11":
        pytest.skip("the sdist gives the same wheel on every Python")
    run(python_of(version), "-m", "venv", "env", cwd=tmp_path)
    python, lmc = tmp_path / "env/bin/python", tmp_path / "env/bin/lmc"
    (archive,) = built.glob(f"*.{kind}")
    for extra in EXTRAS:
        what = f"{archive}[{extra}]" if extra else archive
        run(python, "-m", "pip", "install", "-q", what, cwd=tmp_path)
        assert run(lmc, "--version", cwd=tmp_path).stdout.strip() == "0.1.0"
        run(lmc, "trace", "make", "rag:count=20", "--out", "t.jsonl", cwd=tmp_path)
        if extra == "":
            done = subprocess.run(
                [lmc, "sim", "t.jsonl"], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 2 and "pip install '.[sim]'" in done.stderr, done.stderr
        elif extra == "sim":
            run(python, "-c", SIM, cwd=tmp_path)
            command = (lmc, "sim", "t.jsonl", "--metric", "store", "--unit", "bytes", "--json")
            assert '"hit_rate"' in run(*command, cwd=tmp_path).stdout
            assert "moved" in run(lmc, "reuse", "t.jsonl", "--scope", "trace", cwd=tmp_path).stdout
        else:
            run(python, "-c", STORE, cwd=tmp_path)
            assert "1 sound record" in run(lmc, "store", "verify", "kv", cwd=tmp_path).stdout
    installed = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout
    assert not {"torch", "vllm", "transformers"} & {p.split("==")[0] for p in installed.split()}


def test_the_wheel_holds_kernels_and_profiles_and_no_tests(built: Path) -> None:
    import zipfile

    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lmc/kernels/gather.py" in names
    assert any(name.startswith("lmc/quality/profiles/") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "kernels/"))]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("extra", ["store", "sim", "hf", "cuda", "rocm", "notebooks", "dev"])
def test_every_extra_resolves(extra: str, tmp_path: Path) -> None:
    """For Linux on x86; CUDA's vLLM among them. ROCm's comes from its vendor's index."""
    version = "3.12" if extra in ("cuda", "dev") else "3.10"
    done = run(
        sys.executable, "-m", "uv", "pip", "compile", ROOT / "pyproject.toml", "--extra", extra,
        "--python-version", version, "--python-platform", "x86_64-manylinux_2_28", "-q",
        cwd=tmp_path,
    )  # fmt: skip
    names = {line.split("==")[0] for line in done.stdout.splitlines() if "==" in line}
    assert ("vllm" in names) == (extra == "cuda")
    assert ("torch" in names) == (extra in ("hf", "cuda"))
    assert "numpy" in names


@pytest.mark.engine
@pytest.mark.timeout(2400)
def test_the_demo_runs_without_a_network(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this machine")
    # As a machine without a network has it: the loopback is there, and nothing else.
    alone = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "alone"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody leave the network")
    for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy2(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    # What was set up is not set up again: a network would be needed.
    done = run(*alone, "make", "-o", ".venv/.ready", "demo", cwd=tmp_path, env=environment)
    assert "Time to first token" in done.stdout
    assert (tmp_path / "results/demo/rows.jsonl").stat().st_size > 0
