"""Where in the memory of which engine a part lies, as others are told."""

from __future__ import annotations

import struct
from typing import NamedTuple

from lmc.store.wire import MOST_HEADER, MOST_PAYLOAD

MAGIC = b"LMCN"
MOST_RUNS = 4096
AGENT_BYTES = 8
_FRONT = struct.Struct(f"<4sHxx{AGENT_BYTES}s")
_RUN = struct.Struct("<QQ")

Run = tuple[int, int]  # [start, end)


class Location(NamedTuple):
    """The bytes of a part, in order.

    Attributes:
        agent: whose memory it is.
        runs: of addresses there.
    """

    agent: bytes
    runs: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        return sum(end - start for start, end in self.runs)

    def some(self, start: int, end: int) -> list[Run]:
        """Where its bytes `[start, end)` are."""
        found: list[Run] = []
        at = 0
        for first, behind in self.runs:
            a, b = max(start - at, 0), min(end - at, behind - first)
            if a < b:
                found.append((first + a, first + b))
            at += behind - first
        return found

    def packed(self) -> bytes:
        front = _FRONT.pack(MAGIC, len(self.runs), self.agent)
        return front + b"".join(_RUN.pack(*run) for run in self.runs)

    @classmethod
    def unpacked(cls, data: bytes) -> Location:
        """Raises ValueError: bytes that are none."""
        if len(data) < _FRONT.size:
            raise ValueError(f"got {len(data)} bytes, want at least {_FRONT.size}")
        magic, n, agent = _FRONT.unpack_from(data)
        want = _FRONT.size + n * _RUN.size
        if magic != MAGIC or not 0 < n <= MOST_RUNS or len(data) != want:
            raise ValueError(f"got {len(data)} bytes that begin with {magic!r}, and {n} runs")
        runs = tuple(_RUN.iter_unpack(data[_FRONT.size :]))
        where = cls(agent, runs)
        if any(start >= end for start, end in runs) or where.nbytes > MOST_HEADER + MOST_PAYLOAD:
            raise ValueError("got runs that are empty, or too long")
        return where
