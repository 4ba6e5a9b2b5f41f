"""What is remembered of texts that are not stored any more, or elsewhere: only why.

A few megabytes, however long an engine runs: each note has one place, by a hash, and a new one
takes the place of an older. So what is long past is forgotten, text by text.
"""

from __future__ import annotations

import numpy as np

from lmc.chunking.cdc import splitmix64
from lmc.store.causes import CAUSES
from lmc.store.record import Record

MODEL = 32  # bytes of a namespace that name the model; what follows is the tenant
PLACES = 1 << 19  # notes of contents: some 17 million tokens in chunks of 33
WINDOW = 16  # tokens
SAMPLED = 8  # one window in so many is noted
WINDOWS = 1 << 20  # notes of windows: some 8 million tokens
NAMES = tuple(CAUSES)
_64 = (1 << 64) - 1


class History:
    """Notes of contents by tenant, of contents whoever had them, and of windows of text.

    Hashes stand for contents, so that of some 2^48 questions one is answered wrongly.
    """

    def __init__(self) -> None:
        # Pages that nothing was written to take no memory.
        self._own = np.zeros(PLACES, np.uint64).data
        self._any = np.zeros(PLACES, np.uint64).data
        self._windows = np.zeros(WINDOWS, np.uint32)

    def stored(self, record: Record) -> None:
        """A record was taken in."""
        content = hash(record.tokens) & _64
        tenant = hash(record.namespace[MODEL:]) & 0xFFFF
        self._any[content % PLACES] = content >> 16 << 16 | tenant
        if record.tail:
            self.note(record, "open_end")

    def note(self, record: Record, cause: str) -> None:
        """A record is gone, or was not taken in."""
        key = _of_tenant(record.namespace, record.tokens)
        model = hash(record.namespace[:MODEL]) & 0xFF
        self._own[key % PLACES] = key >> 16 << 16 | model << 8 | NAMES.index(cause)

    def own(self, namespace: bytes, content: bytes) -> str | None:
        """Why this tenant's content is not stored, if that is remembered."""
        key = _of_tenant(namespace, content)
        noted = self._own[key % PLACES]
        if noted >> 16 != key >> 16:
            return None
        if noted >> 8 & 0xFF != hash(namespace[:MODEL]) & 0xFF:
            return "other_weights"
        return NAMES[noted & 0xFF]

    def of_others(self, namespace: bytes, content: bytes) -> bool:
        """Whether another tenant was the last to store a content."""
        key = hash(content) & _64
        noted = self._any[key % PLACES]
        return noted >> 16 == key >> 16 and noted & 0xFFFF != hash(namespace[MODEL:]) & 0xFFFF

    # -- text, however it was cut ------------------------------------------------------------

    def saw(self, namespace: bytes, tokens: np.ndarray) -> None:
        """Tokens [T] were stored, or were to be; one pass over them."""
        _, hashes = _sampled(namespace, tokens)
        self._windows[hashes % np.uint64(WINDOWS)] = hashes >> np.uint64(32)

    def seen(self, namespace: bytes, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where sampled windows of tokens [T] start, and whether each is known: [S] both.

        Of one text the same windows are sampled wherever it stands.
        """
        starts, hashes = _sampled(namespace, tokens)
        known = self._windows[hashes % np.uint64(WINDOWS)] == hashes >> np.uint64(32)
        return starts, known


def _of_tenant(namespace: bytes, content: bytes) -> int:
    return hash((content, namespace[MODEL:])) & _64


def _sampled(namespace: bytes, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where sampled windows start, and their hashes, uint64; those of another namespace differ."""
    if len(tokens) < WINDOW:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    hashes = tokens.astype(np.uint64) ^ np.uint64(hash(namespace) & _64)
    splitmix64(hashes)
    width = 1
    while width < WINDOW:
        # Of two halves, in order: an odd factor makes them count differently.
        hashes = hashes[:-width] * np.uint64(0x9E3779B97F4A7C15) + hashes[width:]
        width *= 2
    hashes ^= hashes >> np.uint64(29)
    starts = np.flatnonzero(hashes % np.uint64(SAMPLED) == 0)
    picked = hashes[starts]
    splitmix64(picked)
    return starts, picked
