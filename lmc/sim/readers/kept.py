"""Traces of text that were tokenised once, kept so that the next look need not do it again."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lmc.model.exports import resolve
from lmc.model.weights import cache_dir
from lmc.sim.readers.files import files_of
from lmc.sim.trace import Request

MOST_TOKENS = 1 << 27  # of a trace; a longer one is tokenised every time
MOST_BYTES = 4 << 30  # of all that is kept; the longest unused go first


def place(path: Path, spec: Mapping[str, Any]) -> Path | None:
    """Where the requests of a trace are kept, by its files' sizes and times, and how it is read.

    None where nothing is: a file was written a moment ago, so that it may change unseen; what
    tokenises is no file, and may become another under its name; or the user has no folder for
    caches.
    """
    tokenizer = Path(resolve(str(spec.get("tokenizer", ""))))
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    stats = [(str(file.resolve()), file.stat()) for file in files_of(path)]
    if any(s.st_mtime > time.time() - 2 for _, s in stats) or not tokenizer.is_file():
        return None
    # Who copies a file over another may keep its size and time; not its inode and ctime.
    of_files = [(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in stats]
    said = [_readers(), spec, of_files, hashlib.sha256(tokenizer.read_bytes()).hexdigest()]
    name = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:32]
    try:
        return cache_dir() / "traces" / f"{name}.npz"
    except FileNotFoundError:
        return None


@cache
def _readers() -> str:
    """Of the code that reads: what another version of it made of a file is not looked at."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def load(file: Path) -> tuple[list[Request], list[list[Any]], int] | None:
    """Requests, bad lines and their number; None where nothing, or nothing whole, is kept."""
    try:
        with np.load(file) as kept:
            arrays = {name: kept[name] for name in kept.files}
        about = json.loads(arrays["about"].tobytes())
        os.utime(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    tokens, offsets = arrays["tokens"], arrays["offsets"].tolist()
    requests = [
        Request(
            timestamp=at,
            session=session,
            input_tokens=end - start,
            output_tokens=output,
            tokens=tokens[start:end],
            segments=[(name, a, b) for name, a, b in segments],
        )
        for (start, end), at, session, output, segments in zip(
            pairwise(offsets),
            arrays["timestamps"].tolist(),
            about["sessions"],
            arrays["outputs"].tolist(),
            about["segments"],
            strict=True,
        )
    ]
    return requests, about["bad"], about["bad_count"]


def keep(
    file: Path, requests: Sequence[Request], bad: Iterable[Sequence[Any]], bad_count: int
) -> None:
    """Keep what was read whole; what cannot be written is not."""
    ends = np.cumsum([0, *(r.input_tokens for r in requests)])
    if not requests or ends[-1] > MOST_TOKENS:
        return
    about = {
        "sessions": [r.session for r in requests],
        "segments": [list(r.segments) for r in requests],
        "bad": [list(line) for line in bad],
        "bad_count": bad_count,
    }
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Prompts are nobody else's.
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            np.savez(
                out,
                tokens=np.concatenate([r.tokens for r in requests if r.tokens is not None]),
                offsets=ends,
                timestamps=np.array([r.timestamp for r in requests]),
                outputs=np.array([r.output_tokens for r in requests], np.int64),
                about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            )
        partial.replace(file)
        _make_room(file.parent)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def _make_room(folder: Path) -> None:
    for file, stat in _stats(folder, "*.partial"):  # of who was stopped
        if stat.st_mtime < time.time() - 86400:
            file.unlink(missing_ok=True)
    kept = sorted(_stats(folder, "*.npz"), key=lambda item: item[1].st_mtime)
    total = sum(stat.st_size for _, stat in kept)
    for file, stat in kept[:-1]:
        if total <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= stat.st_size


def _stats(folder: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    for file in folder.glob(pattern):
        try:
            yield file, file.stat()
        except OSError:
            continue
