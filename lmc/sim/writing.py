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

import numpy as np

from lmc.chunking import Chunker
from lmc.chunking.cdc import Cdc, splitmix64
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
    nowhere: who has the file can tell that two texts are the same, and can try no text against its
    hashes. Where content decides on cuts, it is content under the salt, or the lengths of chunks
    would tell of it. Times count from the first request, in tenths of a second. What stays are
    lengths of prompts and answers, and with the chunker `explicit` of messages: who has the texts
    may know them again by these. What two prompts share inside a chunk does not show any more;
    where they share it, in which order and when, does.

    Args:
        requests: with token ids.
        path: as of `save`.
        chunker: cuts prompts.
        spans: their segments are chunks.

    Raises ValueError for a request without token ids, and writes nothing then.
    """
    salt = secrets.token_bytes(32)
    turn = np.uint64(secrets.randbits(64))
    begun: float | None = None

    def hashed(data: bytes) -> str:
        return hashlib.blake2b(data, key=salt, digest_size=12).hexdigest()

    def records() -> Iterator[dict[str, Any]]:
        nonlocal begun
        for n, r in enumerate(requests, 1):
            if r.tokens is None:
                raise ValueError(f"request {n} has no token ids, and so no chunks")
            begun = r.timestamp if begun is None else begun
            ids = r.tokens
            if isinstance(chunker, Cdc):
                ids = (splitmix64(ids.astype(np.uint64) ^ turn) >> np.uint64(33)).astype(np.int32)
            marked = [(start, end) for _, start, end in r.segments] if spans else None
            pieces = split(ids, chunker, marked)
            texts = [(r.tokens[p.start : p.end].tobytes(), p.end - p.start) for p in pieces]
            yield {
                "lmc_trace": VERSION,
                "time": round(r.timestamp - begun, 1),
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
    # A pipe or a device is written to as it is, and not replaced.
    in_place = path.exists() and not path.is_file()
    partial = path if in_place else path.with_name(path.name + ".partial")
    n = 0
    try:
        with _compressed(partial, path.suffix) as file:
            for record in records:
                n += 1
                file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        if not in_place:
            partial.replace(path)
    finally:
        if not in_place:
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
