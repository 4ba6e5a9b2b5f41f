"""Files as they come: plain or compressed, one or a folder of them."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import ijson
import zstandard

# What a damaged file raises, by the library that unpacks or parses it.
DAMAGED = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    zstandard.ZstdError,
    ijson.JSONError,
    UnicodeDecodeError,
)


def unpacked(raw: io.BufferedReader[Any]) -> io.BufferedReader:
    """The bytes of a file, unpacked if its first ones say gzip, xz or zstd, whatever its name."""
    start = raw.peek(6)
    if start.startswith(b"\x1f\x8b"):
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)))
    if start.startswith(b"\xfd7zXZ\0"):
        return io.BufferedReader(cast(io.RawIOBase, lzma.LZMAFile(raw)))
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        return io.BufferedReader(_Zstd(raw), 1 << 16)
    return raw


def files_of(path: Path) -> list[Path]:
    """The file, or the JSON files of a folder in the order of their names.

    Raises ValueError for a folder without any.
    """
    if not path.is_dir():
        return [path]
    found = [f for f in sorted(path.iterdir()) if f.is_file() and ".json" in f.name]
    if not found:
        raise ValueError(f"{path}: the folder holds no .json or .jsonl files")
    return found


@contextmanager
def opened(file: Path, tell: Callable[[int], None] | None = None) -> Iterator[io.BufferedReader]:
    """A file's bytes, unpacked, behind a byte order mark if it has one.

    tell: called with how many bytes of the file were read, as they are.
    """
    with io.BufferedReader(_Counted(file, tell)) as raw:
        stream = unpacked(raw)
        # Damage is told when it is read.
        with suppress(*DAMAGED):
            if stream.peek(3).startswith(b"\xef\xbb\xbf"):
                stream.read(3)
        yield stream


class _Counted(io.FileIO):
    """A file that tells how many bytes were read, if anybody wants to know."""

    def __init__(self, file: Path, tell: Callable[[int], None] | None) -> None:
        super().__init__(file)
        self._tell = tell

    def readinto(self, buffer: Any) -> int:
        n = super().readinto(buffer) or 0
        if self._tell:
            self._tell(n)
        return n


class _Zstd(io.RawIOBase):
    """A zstd stream whose early end is an error, as it is with gzip and xz."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw, self._ready = raw, b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False  # of a frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._raw.read(1 << 16)
            if not packed:
                if self._inside:
                    raise EOFError("the compressed file ends before its last frame does")
                return 0
            self._ready = self._unpack(packed)
        into = memoryview(buffer).cast("B")
        n = min(len(into), len(self._ready))
        into[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def _unpack(self, packed: bytes) -> bytes:
        parts = []
        while packed:
            parts.append(self._frame.decompress(packed))
            self._inside = not self._frame.eof
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        return b"".join(parts)
