"""Digests of weights: what says that two models are the same one."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from blake3 import blake3

logger = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt")


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/lmc`, or `~/.cache/lmc`.

    Raises:
        FileNotFoundError: the user has no home, and nothing says where else.
    """
    # The XDG specification: a value that is not absolute is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError as e:
            raise FileNotFoundError(f"{e}: set XDG_CACHE_HOME to a folder of yours") from e
    return base / "lmc"


def folder_of(model: str, revision: str | None = None, cache: str | Path | None = None) -> Path:
    """The folder of a model: itself, or where the cache of the hub has it. Asks no network.

    Args:
        revision: branch, tag or commit, of a model of the hub.
        cache: folder of the hub's cache, where it is not the user's.

    Raises OSError or ValueError for one that is in neither.
    """
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))


def weights_digest(path: str | Path) -> bytes:
    """BLAKE3, 32 bytes, of the weight files of a model folder: their names and contents.

    Digests of files are kept in the cache folder by path and all that changes with what is in a
    file: size, times of change and inode. So a second call reads no weights, and other weights
    under an old time (`cp -p`, `rsync -t`, a tar of an image) are read. A cache that is damaged or
    cannot be written costs time only.

    Raises ValueError if the folder holds no weight files.
    """
    folder = Path(path).resolve()
    files = sorted({file for glob in WEIGHTS for file in folder.glob(glob)})
    if not files:
        raise ValueError(f"got {path}, want a folder with weights ({', '.join(WEIGHTS)})")
    known = _read_digests()
    complete = True
    total = blake3()
    for file in files:
        state = _state(file)
        match known.get(str(file)):
            case [*seen, str(digest)] if seen == state:
                pass
            case _:
                digest = file_digest(file)
                # One that changed while it was read is read again next time.
                known[str(file)] = [*state, digest]
                complete = False
        total.update(f"{len(file.name)}:{file.name}:{digest}\n".encode())
    if not complete:
        _write_digests(known)
    return total.digest()


def _state(file: Path) -> list[int]:
    """What a file system changes with a file's content, whatever its writer says of times."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino]


def file_digest(file: Path) -> str:
    """BLAKE3 of a file, 64 hex digits."""
    # One thread: the pool behind blake3.AUTO does not survive a fork, and vLLM forks.
    return blake3().update_mmap(file).hexdigest()


def _read_digests() -> dict[str, Any]:
    """File -> [*state, digest], as far as they can be read."""
    try:
        known = json.loads((cache_dir() / "digests.json").read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_digests(known: dict[str, Any]) -> None:
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as work:
            new = Path(work) / "digests.json"
            new.write_text(json.dumps(known, indent=1))
            new.replace(cache_dir() / "digests.json")
    except OSError as e:
        logger.info("digests of weights are not kept: %s", e)
