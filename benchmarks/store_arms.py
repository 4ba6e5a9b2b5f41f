"""What benchmarks/store.py measures with: chunks in aligned memory, raw files, rounds of arms."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmc.chunking.pieces import chunk_key
from lmc.model.layout import KVLayout
from lmc.results.statistics import bootstrap
from lmc.store.disk.header import padded
from lmc.store.disk.segments import aligned
from lmc.store.record import Record
from lmc.store.sections import Section, full_attention

SIZES = [64 << 10, 256 << 10, 1 << 20, 2 << 20, 4 << 20, 16 << 20]
PASS_BYTES = 64 << 20  # more than a last-level cache holds
READERS = [1, 2, 4]
READER_CHUNK = 1 << 20
OUT = Path(__file__).parent / "results" / "store.jsonl"
NAMESPACE = b"benchmark"

Item = tuple[Record, Sequence[Section]]
Arm = Callable[[], float]  # does its work once and says how many seconds that took


@dataclass(frozen=True)
class Chunks:
    """Chunks of one size, in aligned memory.

    Attributes:
        layout, T: of each.
        pages: their bytes, uint8 `[chunks, whole pages of one chunk]`.
    """

    layout: KVLayout
    T: int
    pages: np.ndarray

    @classmethod
    def of(cls, nbytes: int) -> Chunks:
        """As many chunks of about this size as a pass takes."""
        layout = KVLayout(30 if nbytes > 64 << 10 else 2, G=3, D=64, dtype="float32")
        T = round(nbytes / layout.bytes_per_token)
        size = padded(T * layout.bytes_per_token)
        pages = aligned(PASS_BYTES // size * size).reshape(-1, size)
        pages[...] = np.random.default_rng(nbytes).integers(0, 256, pages.shape, np.uint8)
        return cls(layout, T, pages)

    @property
    def nbytes(self) -> int:
        """Of one chunk."""
        return self.T * self.layout.bytes_per_token

    def sections(self, page: np.ndarray) -> list[Section]:
        """A chunk as a tier takes and gives it, uint8 `[bytes]`."""
        form = full_attention(self.layout, self.T)
        return [Section(form, [page[: self.nbytes].reshape(form.shape)])]

    def items(self, seed: int, n: int | None = None) -> list[Item]:
        """The first `n` chunks with records that no other seed gives."""
        rng = np.random.default_rng(seed)
        return [
            (record(rng, self.T, self.nbytes), self.sections(self.pages[i]))
            for i in range(len(self.pages) if n is None else n)
        ]


def record(rng: np.random.Generator, T: int, nbytes: int) -> Record:
    """A record of random tokens in a random context."""
    ids = rng.integers(0, 1 << 16, T)
    tokens = ids.astype("<i8").tobytes()
    key = chunk_key(NAMESPACE, ids)
    return Record(-1, NAMESPACE, key, tokens, 0, rng.bytes(32), rng.bytes(32), "exact", nbytes)


class Raw:
    """A file beside the store, for the least that reading and writing take.

    Args:
        direct: past the page cache.
        allocated: bytes that the file has from the start; else it grows.
    """

    def __init__(self, path: Path, direct: bool, allocated: int = 0) -> None:
        flags = os.O_CREAT | os.O_RDWR | (os.O_DIRECT if direct else 0)
        self.path = path
        self._fd = os.open(path, flags, 0o600)
        self._end = 0
        if allocated:
            os.posix_fallocate(self._fd, 0, allocated)

    def append(self, groups: Sequence[np.ndarray]) -> None:
        """Write groups of chunks, uint8 `[chunks, bytes]`; each lasts before the next begins."""
        for group in groups:
            assert os.pwritev(self._fd, list(group), self._end) == group.nbytes
            os.fdatasync(self._fd)
            self._end += group.nbytes

    def read(self, into: np.ndarray, order: Sequence[int]) -> None:
        """Read chunks to their places in `into`, uint8 `[chunks, bytes]`, one by one."""
        for i in order:
            assert os.preadv(self._fd, [into[i]], i * into.shape[1]) == into.shape[1]


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds(arms: Mapping[str, Arm], n: int) -> dict[str, list[float]]:
    """Seconds of each arm in each of `n` rounds; one round before them is not counted."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for i in range(n + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            took = arms[name]()
            if i:
                found[name].append(took)
    return found


def line(
    kind: str,
    arm: str,
    over: Sequence[str],
    times: Mapping[str, list[float]],
    chunks: Chunks,
    n: int,
    target: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One row, printed: an arm beside the fastest of others, each doing `n` chunks a round."""
    best = min(over, key=lambda name: float(np.median(times[name])))
    ratios = np.array(times[best]) / times[arm]
    ratio = bootstrap([[r] for r in ratios], lambda sample: np.median(np.concatenate(sample)))
    assert ratio is not None
    ours, theirs = (float(np.median(times[name])) for name in (arm, best))
    gib = n * chunks.nbytes / 2**30
    met = "" if target is None else ("ok" if ratio.value >= target else "missed")
    print(
        f"{kind:22} {chunks.nbytes / 1024:6.0f} {ours / n * 1e6:9.1f} {gib / ours:7.2f} "
        f"{gib / theirs:7.2f} {ratio.value:6.2f} [{ratio.low:.2f}, {ratio.high:.2f}] "
        f"{met:6} {best}",
        flush=True,
    )
    return {
        "kind": kind, "chunk_bytes": chunks.nbytes, "L": chunks.layout.L, "T": chunks.T, "n": n,
        "arm": arm, "over": best, "ratio": [ratio.value, ratio.low, ratio.high],
        "target": target, "seconds": dict(times), **more,
    }  # fmt: skip
