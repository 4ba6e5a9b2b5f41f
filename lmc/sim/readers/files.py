"""Files as they come: plain or compressed, one or a folder of them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import ijson
import zstandard

PACKED = 1 << 14  # bytes unpacked at once, which gzip makes a thousand times as many, zstd more
UNPACKED = 1 << 20  # bytes at once of xz and bzip2, where a few bytes may become any number
SUFFIX = re.compile(r"\.(jsonl?|traj)(\.(gz|xz|zst|bz2))?$")
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


class Packing(NamedTuple):
    """A way in which files are compressed.

    begins: whether a frame begins with these bytes, four or more where there are.
    frame: what unpacks one, with `decompress`, `eof` and `unused_data`.
    """

    begins: Callable[[bytes], bool]
    frame: Callable[[], Any]


def unpacked(raw: io.BufferedReader[Any]) -> io.BufferedReader:
    """The bytes of a file, unpacked if its first ones say so, whatever its name."""
    start = raw.peek(4)
    packing = next((packing for packing in PACKINGS if packing.begins(start)), None)
    return io.BufferedReader(_Frames(raw, packing), 1 << 16) if packing else raw


def readable_again(trace: Path | Iterable[Mapping[str, Any]]) -> tuple[Path, Any]:
    """A path that can be read as often as one likes, and what it lasts as long as.

    A pipe (`-`, /dev/stdin, a FIFO, a shell's `<(...)`) is copied into a file of its own first, and
    so are records, such as the rows of a data set, one a line.
    """
    if isinstance(trace, Path):
        path = Path("/dev/stdin") if str(trace) == "-" else trace
        if not path.exists() or path.is_dir() or path.is_file():
            return path, None
    folder = tempfile.TemporaryDirectory(prefix="lmc-")
    copy = Path(folder.name) / ("pipe" if isinstance(trace, Path) else "records")
    with copy.open("wb") as target:
        if isinstance(trace, Path):
            with path.open("rb") as source:
                shutil.copyfileobj(source, target)
        else:
            for record in trace:
                target.write(json.dumps(record, default=str).encode() + b"\n")
    return copy, folder


def files_of(path: Path) -> list[Path]:
    """The file, or the JSON files of a folder and those below it, in the order of their names.

    Raises ValueError for a folder without any.
    """
    if not path.is_dir():
        return [path]
    found = [f for f in sorted(path.rglob("*")) if f.is_file() and SUFFIX.search(f.name)]
    if not found:
        raise ValueError(f"{path}: the folder holds no .json, .jsonl or .traj files")
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
        frames = stream.raw
        if isinstance(frames, _Frames) and not stream.read(1):
            frames.check()


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


class _Frames(io.RawIOBase):
    """Compressed frames, one behind the other, whose early end is an error.

    What stands behind the last of them and begins none is left out, and told by `check`.
    """

    def __init__(self, raw: io.BufferedReader[Any], packing: Packing) -> None:
        self._raw, self._packing, self._ready = raw, packing, memoryview(b"")
        self._frame: Any = None  # that is being unpacked
        self._packed = b""  # of what was read, behind the end of a frame
        self._behind = 0  # bytes that are none

    def check(self) -> None:
        """Raise EOFError where bytes behind the last frame were left out."""
        if self._behind:
            raise EOFError(f"{self._behind} bytes behind the end of what is compressed")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            frame = self._frame
            # A frame that has more to give than was asked for is read on with nothing.
            more = frame is None or getattr(frame, "needs_input", True)
            packed = self._packed or (self._raw.read(PACKED) if more else b"")
            if not packed and more:
                if frame is not None:
                    raise EOFError("the compressed file ends before its last frame does")
                return 0
            self._ready = memoryview(self._unpack(packed))
        into = memoryview(buffer).cast("B")
        n = min(len(into), len(self._ready))
        into[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def _unpack(self, packed: bytes) -> bytes:
        """What comes next, by one call, so that damage costs nothing of what is in front of it."""
        self._packed = b""
        if self._frame is None:
            head = packed if len(packed) >= 4 else packed + self._raw.peek(4)[:4]
            if self._behind or not self._packing.begins(head):
                # As gzip and xz have it, zeros are padding.
                self._behind += len(packed) if packed.strip(b"\0") else 0
                return b""
            self._frame = self._packing.frame()
        bounded = [UNPACKED] if hasattr(self._frame, "needs_input") else []
        try:
            part: bytes = self._frame.decompress(packed, *bounded)
        except OSError as error:  # of bz2, for what is damaged; all others have their own
            raise EOFError(str(error)) from error
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return part


def _begins_zstd(head: bytes) -> bool:
    """A frame of data, or one to skip, with which files of `pzstd` begin."""
    skipped = 0x50 <= head[0] <= 0x5F if head else False
    return head[:4] == b"\x28\xb5\x2f\xfd" or (skipped and head[1:4] == b"\x2a\x4d\x18")


PACKINGS = (
    Packing(lambda head: head.startswith(b"\x1f\x8b"), lambda: zlib.decompressobj(31)),
    Packing(
        lambda head: head.startswith(b"\xfd7zX"), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)
    ),
    Packing(lambda head: re.match(b"BZh[1-9]", head) is not None, bz2.BZ2Decompressor),
    # Any window that the format knows, as of `zstd --long=31`.
    Packing(
        _begins_zstd,
        lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    ),
)
