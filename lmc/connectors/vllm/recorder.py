"""The recorder: one line a finished request, written behind the scheduler's back.

Lines are JSON. Chunks of a prompt stand in them as keyed hashes (BLAKE3), whose key is random and
lies in a file of its own beside them: equal texts of one tenant have equal hashes within a folder,
also after a restart, and whoever is given the `.jsonl` files alone can try no texts against them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from vllm.logger import init_logger

from lmc.chunking.pieces import Piece, content_keys
from lmc.connectors.vllm.config import Trace
from lmc.store.disk.place import open_folder, write_file

logger = init_logger(f"vllm.{__name__}")  # else vLLM prints none of it

VERSION = 1  # of a line
SALT_FILE, SALT = "salt", 32  # bytes
HASH = 12  # bytes
QUEUED_TOKENS, QUEUED_LINES = 1 << 22, 4096  # that wait to be written; more are dropped
CLOSING_S = 5.0


@dataclass(frozen=True)
class Entry:
    """What is recorded of one request.

    Attributes:
        line: all but what its text was.
        namespace: of its KV. tenant: its cache salt, or "".
        tokens: `[T]` of its prompt; None where its KV is none of lmc's.
        pieces: the chunks of it.
    """

    line: dict[str, Any]
    namespace: bytes
    tenant: str
    tokens: np.ndarray | None
    pieces: list[Piece]


class Recorder:
    """Writes entries into files of a folder, on a thread of its own; nothing here ever raises.

    Attributes:
        counts: lines written, dropped (the queue was full, or the line too long for a file) and
            failed (the disk's fault).

    Raises:
        ValueError, OSError: a folder that cannot be used, as of the disk tier.
    """

    def __init__(self, config: Trace) -> None:
        self.counts: Counter[str] = Counter()
        self._config = config
        self._place = open_folder(Path(config.path).expanduser(), read_only=False)
        try:
            self._salt = _salt_in(self._place)
        except BaseException:
            os.close(self._place)
            raise
        self._file: int | None = None
        self._written = 0  # bytes of the file
        self._queue: deque[Entry] = deque()
        self._tokens = 0
        self._told: set[int | None] = set()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lmc-record", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Have a line written, or count it as dropped."""
        T = 0 if entry.tokens is None else len(entry.tokens)
        with self._changed:
            room = self._tokens + T <= QUEUED_TOKENS or not self._queue
            if room and len(self._queue) < QUEUED_LINES and not self._closing:
                self._queue.append(entry)
                self._tokens += T
                self._changed.notify()
                return
            self.counts["lines_dropped"] += 1

    def close(self) -> None:
        """Write what waits, as far as there is time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSING_S)
        with self._changed:
            if self._queue:
                logger.warning("lmc leaves %d requests unrecorded", len(self._queue))

    # -- on its thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    break
                entry = self._queue.popleft()
                self._tokens -= 0 if entry.tokens is None else len(entry.tokens)
            outcome = "lines_failed"
            try:
                outcome = self._write(self._line(entry))
            except OSError as error:
                self._said(error)
            except Exception:
                logger.exception("lmc could not record a request")
            with self._changed:
                self.counts[outcome] += 1
        self._let_go()
        os.close(self._place)

    def _line(self, entry: Entry) -> bytes:
        line = {"lmc_trace": VERSION, **entry.line}
        if entry.tenant:
            line["tenant"] = self._hashed(entry.tenant.encode("utf-8", "surrogatepass"))
        if entry.tokens is not None and self._config.tokens == "ids":
            line["tokens"] = entry.tokens.tolist()
        elif entry.tokens is not None:
            ids = entry.tokens.astype("<i8").tobytes()
            contents = [ids[8 * start : 8 * end] for start, end, _ in entry.pieces]
            keys = content_keys(entry.namespace, contents)
            lengths = [end - start for start, end, _ in entry.pieces]
            line["chunks"] = [[self._hashed(k), n] for k, n in zip(keys, lengths, strict=True)]
        return json.dumps(line, separators=(",", ":")).encode() + b"\n"

    def _hashed(self, what: bytes) -> str:
        return blake3(what, key=self._salt).hexdigest(HASH)

    def _write(self, line: bytes) -> str:
        """What became of a line; a file has it whole, or not at all."""
        most = int(self._config.max_bytes)
        if len(line) > most:
            return "lines_dropped"
        if self._file is not None and (
            self._written + len(line) > most or not os.fstat(self._file).st_nlink
        ):
            self._let_go()
        if self._file is None:
            self._file, self._written = _new_file(self._place), 0
            _keep_latest(self._place, self._config.files)
        done = 0
        try:
            while done < len(line):
                done += os.write(self._file, line[done:])
        except OSError:
            if done:
                os.ftruncate(self._file, self._written)
            raise
        self._written += len(line)
        return "lines_written"

    def _let_go(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                os.close(file)

    def _said(self, error: OSError) -> None:
        """Once a kind: a disk that is full stays so."""
        told = logger.debug if error.errno in self._told else logger.warning
        self._told.add(error.errno)
        told("lmc could not record a request: %s", error)


def _salt_in(place: int) -> bytes:
    """The key of a folder's hashes; made by whoever is the first to open it.

    Raises:
        ValueError: the file is something else. OSError: it cannot be read or made.
    """
    with contextlib.suppress(FileNotFoundError):
        return _read_salt(place)
    new = f"{SALT_FILE}.{os.urandom(8).hex()}"
    write_file(place, new, os.urandom(SALT))
    try:
        # Unlike a rename, a link does not replace what another engine has put there meanwhile.
        with contextlib.suppress(FileExistsError):
            os.link(new, SALT_FILE, src_dir_fd=place, dst_dir_fd=place)
    finally:
        os.unlink(new, dir_fd=place)
    return _read_salt(place)


def _read_salt(place: int) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(SALT_FILE, flags, dir_fd=place)
    try:
        salt = os.read(file, SALT + 1)
    finally:
        os.close(file)
    if len(salt) != SALT:
        raise ValueError(
            f"trace: the file {SALT_FILE} of its folder is no key of lmc's (it has "
            f"{'more than ' * (len(salt) > SALT)}{min(len(salt), SALT)} bytes, want {SALT}): "
            "name another folder"
        )
    return salt


def _new_file(place: int) -> int:
    """A file of its own for this engine, locked as long as it is written to."""
    seconds, ns = divmod(time.time_ns(), 10**9)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
    name = f"trace-{stamp}-{ns:09d}-{os.urandom(4).hex()}.jsonl"  # in the order of their names
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(name, flags, 0o600, dir_fd=place)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _keep_latest(place: int, files: int) -> None:
    """Remove all but the latest files of a folder, as far as no engine writes to them."""
    with os.scandir(place) as entries:
        names = sorted(e.name for e in entries if e.name.startswith("trace-"))
    for name in names[: max(0, len(names) - files)]:
        with contextlib.suppress(OSError):
            _remove_unused(place, name)


def _remove_unused(place: int, name: str) -> None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(name, flags, dir_fd=place)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=place)
    finally:
        os.close(file)
