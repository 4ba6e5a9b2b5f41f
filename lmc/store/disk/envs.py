"""Environments of LMDB that this process has open: each once, and none of its parent's."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lmc.store.disk.env import ClosedError, Env, key_of

FORK_S = 0.5  # how long a fork waits for transactions to end
OPEN_S = 2.0  # for others to be done with what they write

_shared: weakref.WeakValueDictionary[tuple[int, int], Env] = weakref.WeakValueDictionary()
_opening: dict[tuple[int, int], _Opening] = {}
_inherited: dict[tuple[int, int], Any] = {}
_forks = threading.local()
_sharing = threading.Lock()


def opened(folder: Path, tables: Sequence[str], dups: Collection[str], patience_s: float) -> Env:
    """The environment of a folder; the same for all in this process.

    To open it LMDB must be its writer for a moment. A writer that is stopped keeps that from
    happening, and who waits for it is a thread of its own: it is asked for again then.

    Raises:
        TimeoutError: it is not open yet.
        ClosedError: the parent has it open, and was busy with it when this process was forked.
        lmdb.Error, OSError: it cannot be used.
    """
    with _sharing:
        key = key_of(folder)
        env = _shared.get(key)
        if env is not None and not env.closed:
            return env
        if key in _inherited:
            raise ClosedError("it is open in the process that this one was forked from")
        opening = _opening.get(key)
        if opening is None:
            opening = _opening[key] = _Opening(folder, tables, dups)
            opening.thread = threading.Thread(target=opening.run, args=(key,), daemon=True)
            opening.thread.start()
            patience_s = OPEN_S
    opening.thread.join(patience_s)
    if opening.error is not None:
        raise opening.error
    if opening.env is None:
        raise TimeoutError("another process has been writing to the index all the time")
    return opening.env


class _Opening:
    """An environment that is being opened."""

    def __init__(self, folder: Path, tables: Sequence[str], dups: Collection[str]) -> None:
        self._arguments = folder, tables, dups
        self.thread = threading.current_thread()  # until it has one
        self.env: Env | None = None
        self.error: Exception | None = None

    def run(self, key: tuple[int, int]) -> None:
        try:
            env = Env(*self._arguments)
            with _sharing:
                _shared[env.key] = env
            self.env = env
        except Exception as e:
            self.error = e
        finally:
            with _sharing:
                _opening.pop(key, None)


def _before_fork() -> None:
    until = time.monotonic() + FORK_S
    _forks.paused = [(env, env.pause(until)) for env in list(_shared.values())]


def _after_in_parent() -> None:
    for env, quiet in _forks.paused:
        if quiet is not None:
            env.resume()
    _forks.paused = []


def _after_in_child() -> None:
    """Let go of what was inherited, without a word to LMDB: it is the parent's.

    To close it would end the parent's transactions. Objects of a process that is not theirs do
    nothing when they are freed, and then the child may open the same file. But where a thread of
    the parent was within LMDB, its locks stay locked here: nothing is freed, and what is open
    cannot be opened again.
    """
    global _sharing
    _sharing = threading.Lock()
    for env, quiet in _forks.paused:
        kept = env.inherited()
        if not quiet:
            _inherited[env.key] = kept
        del kept
    _forks.paused = []
    _shared.clear()
    _opening.clear()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
