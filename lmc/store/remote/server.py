"""What a tier needs of a server that holds bytes by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np

from lmc.store import wire
from lmc.store.wire import Header

# Which map a key is of: payloads by part id, and headers of parts by what they are asked for.
Kind = Literal["part", "key", "behind"]


CACHED = 32 << 10  # bytes of a header that is remembered; that of 2,048 tokens has 8 KiB


def header_of(data: bytes) -> Header:
    """`wire.unpack`, of a header alone."""
    return _header_of(data) if len(data) <= CACHED else wire.unpack(data)


@lru_cache(maxsize=4096)  # to unpack one takes longer than to check a small chunk
def _header_of(data: bytes) -> Header:
    return wire.unpack(data)


class Key(NamedTuple):
    """A name in one of the maps; `digest` is of 16 to 40 bytes."""

    kind: Kind
    digest: bytes


class Put(NamedTuple):
    """A part: its bytes under `part`; its id and its header, a frame, added to each entry.

    Attributes:
        data: header and payload; empty where the part is there and only its entries are told.
        frame: `part.digest`, and the header that `data` begins with.
    """

    part: Key
    data: memoryview
    entries: Sequence[Key]
    frame: bytes


class Fault(Exception):  # noqa: N818 a word for what is counted
    """A server did not do what it was asked; the message is a short word to count it by."""


class Server(Protocol):
    """A server, or several that are one. Methods are called by several threads.

    Attributes:
        reads: how many gets at a time it answers soonest.

    Raises:
        Fault: any of the methods but `close`; `full` where there is no room.
    """

    reads: int

    def entries(self, keys: Sequence[Key]) -> list[bytes]:
        """Of each key the frames that were added to it, one behind the other; in one go."""
        ...

    def holds(self, parts: Sequence[Key]) -> list[bool]:
        """Which of the parts are there; in one go."""
        ...

    def put(self, items: Sequence[Put]) -> list[Fault | None]:
        """Hold these, payloads before frames; what went wrong of each.

        A frame takes the place of one with the same id. Nothing that another adds at the same time
        is lost, but of very many in an entry the oldest (`lmc.store.remote.entries.MOST`).
        """
        ...

    def get(self, part: Key, header: Header) -> tuple[Header, Iterator[np.ndarray]] | None:
        """A part: its header, and its spans as `header.bands()` has them, each uint8, the last ones
        perhaps while the first are used. None where it is not there.

        What goes wrong on the way is raised by the iterator too.

        Args:
            header: as an entry has it; another engine may have put the part again since.

        Raises:
            ValueError: what is there is no part.
        """
        ...

    def delete(self, keys: Sequence[Key]) -> None:
        """Let go of parts and entries; of one that is not there, too."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


def check_timeout(timeout_s: float) -> None:
    """Raise ValueError unless a config's seconds are some."""
    if not timeout_s > 0:
        raise ValueError(f"timeout_s: got {timeout_s}, want more than 0")


def grouped(bands: Sequence[tuple[int, int]], nbytes: int) -> Iterator[list[tuple[int, int]]]:
    """Bands `[start, end)`, one behind the other, that are asked for in one go: as many as fit."""
    group: list[tuple[int, int]] = []
    for band in bands:
        if group and band[1] - group[0][0] > nbytes:
            yield group
            group = []
        group.append(band)
    if group:
        yield group
