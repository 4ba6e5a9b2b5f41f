"""Traces written to files."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lmc.chunking import Chunker
from lmc.chunking.pieces import split
from lmc.sim.readers.recorded import VERSION
from lmc.sim.trace import Request


def save(requests: Iterable[Request], path: str | Path) -> int:
    """Write requests as a trace of the format `tokens`, and return how many.

    A name that ends in .gz, .xz or .zst is compressed so. The file appears when it is whole.

    Raises ValueError for a request without token ids, and writes nothing then.
    """

    def records() -> Iterator[dict[str, Any]]:
        for n, r in enumerate(requests, 1):
            if r.tokens is None:
                raise ValueError(f"request {n} has no token ids, which the format tokens is of")
            yield {
                "session": r.session,
                "timestamp": r.timestamp,
                "output_length": r.output_tokens,
                "tokens": r.tokens.tolist(),
                "segments": [list(segment) for segment in r.segments],
            }

    return write_lines(records(), path)


def save_hashed(
    requests: Iterable[Request], path: str | Path, chunker: Chunker, *, spans: bool = False
) -> int:
    """Write a trace that others may have: hashes of chunks and lengths, no text, no token ids.

    It is what lmc's recorder writes (format `lmc`), under a salt that is drawn here and kept
    nowhere: who has the file can tell that two texts are the same, and can try no text against it.
    What two prompts share inside a chunk does not show any more; where they share it, in which
    order and when, does.

    Args:
        requests: with token ids.
        path: as of `save`.
        chunker: cuts prompts.
        spans: their segments are chunks.

    Raises ValueError for a request without token ids, and writes nothing then.
    """
    salt = secrets.token_bytes(32)

    def hashed(data: bytes) -> str:
        return hashlib.blake2b(data, key=salt, digest_size=12).hexdigest()

    def records() -> Iterator[dict[str, Any]]:
        for n, r in enumerate(requests, 1):
            if r.tokens is None:
                raise ValueError(f"request {n} has no token ids, and so no chunks")
            marked = [(start, end) for _, start, end in r.segments] if spans else None
            pieces = split(r.tokens, chunker, marked)
            texts = [(r.tokens[p.start : p.end].tobytes(), p.end - p.start) for p in pieces]
            yield {
                "lmc_trace": VERSION,
                "time": r.timestamp,
                "request": str(n),
                "prompt_tokens": r.input_tokens,
                "output_tokens": r.output_tokens,
                "session": hashed(b"session" + r.session.encode()) if r.session else "",
                "chunks": [[hashed(text), length] for text, length in texts],
            }

    return write_lines(records(), path)


def write_lines(records: Iterable[Mapping[str, Any]], path: str | Path) -> int:
    """Write JSON lines, compressed as the name says, and return how many; all or nothing."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    n = 0
    try:
        with _compressed(partial, path.suffix) as file:
            for record in records:
                n += 1
                file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return n


def _compressed(path: Path, suffix: str) -> IO[bytes] | gzip.GzipFile:
    if suffix == ".gz":
        return gzip.open(path, "wb")
    if suffix == ".xz":
        return lzma.open(path, "wb")
    if suffix == ".zst":
        import zstandard

        return zstandard.open(path, "wb")
    return path.open("wb")
