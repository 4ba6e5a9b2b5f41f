"""What a piece of code imports, opens and runs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WATCHED = {"open", "os.system", "os.exec", "subprocess.Popen", "socket.connect", "ctypes.dlopen"}
_events: list[str] = []
_listening: set[int] = set()  # threads


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and event in WATCHED and threading.get_ident() in _listening:
        _events.append(f"{event} {arguments!r:.100}")


@contextmanager
def audited() -> Iterator[list[str]]:
    """All that this thread imports, opens and runs meanwhile; complete once it is left."""
    if not _hooked:  # a hook cannot be taken back
        sys.addaudithook(_hook)
        _hooked.append(True)
    _events.clear()
    before = set(sys.modules)
    _listening.add(threading.get_ident())
    try:
        yield _events
    finally:
        _listening.clear()
        _events.extend(f"import {name}" for name in sorted(set(sys.modules) - before))


_hooked: list[bool] = []
