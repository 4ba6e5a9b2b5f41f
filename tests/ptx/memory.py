"""Global and shared memory in which every access is checked.

An access is somebody's: of a warp of a CTA, between two of its barriers. As a number, an *agent*,
that is `cta << 32 | epoch << 6 | warp`, where the epoch counts the barriers that the CTA is past.
Between two agents of one CTA a barrier is order; between two CTAs of a launch nothing is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tests.ptx.program import FaultError
from tests.ptx.values import UNSIGNED

Array = np.ndarray
NOBODY = -1
SEVERAL = 63  # in place of the warp: more than one of the CTA since its last barrier
EVERYBODY = 1 << 62  # several CTAs
FIRST = 4096  # no address below


class Ledger:
    """Who wrote and who read each granule last."""

    def __init__(self, size: int) -> None:
        self.writer = np.full(size, NOBODY, np.int64)
        self.reader = np.full(size, NOBODY, np.int64)

    def read(self, at: Array, agent: Array) -> None:
        """Raises FaultError where another one wrote `at` [n, k] and nothing orders the two."""
        agent = np.broadcast_to(agent[:, None], at.shape)
        if (raced := unordered(self.writer[at], agent)).any():
            raise FaultError(f"race: reads what {_name(self.writer[at][raced][0])} wrote")
        before = self.reader[at]
        self.reader[at] = np.where(before == NOBODY, agent, _merged(before, agent))
        # Of several that read one granule in this very instruction the array kept one.
        after = self.reader[at]
        if (lost := _merged(after, agent) != after).any():
            self.reader[at[lost]] = _merged(after, agent)[lost]
            after = self.reader[at]
            if (lost := _merged(after, agent) != after).any():
                self.reader[at[lost]] = EVERYBODY

    def write(self, at: Array, agent: Array, same: Array) -> None:
        """Raises FaultError where another one read `at`, or wrote it, and nothing orders the two.

        same [n, k]: what is written was there already. Warps of a CTA may write one value twice:
        Triton has them do so where a layout holds it twice.
        """
        agent = np.broadcast_to(agent[:, None], at.shape)
        before = self.writer[at]
        raced = unordered(before, agent)
        raced &= ~same | ((before ^ agent) >> 32 != 0)
        if raced.any():
            raise FaultError(f"race: overwrites what {_name(before[raced][0])} wrote")
        if (raced := unordered(self.reader[at], agent)).any():
            raise FaultError(f"race: overwrites what {_name(self.reader[at][raced][0])} read")
        self.writer[at] = agent
        if ((self.writer[at] ^ agent) >> 32 != 0).any():
            raise FaultError("race: two CTAs write one place")


def unordered(before: Array, agent: Array) -> Array:
    """Where nothing lies between what `before` did and what `agent` does."""
    other = before != agent
    return (before != NOBODY) & other & (((before ^ agent) >> 32 != 0) | _era(before, agent))


def _era(a: Array, b: Array) -> Array:
    return (a >> 6) == (b >> 6)


def _merged(before: Array, agent: Array) -> Array:
    """Who read last, when `before` did and `agent` does."""
    one = np.where(_era(before, agent) & (before != agent), before | SEVERAL, agent)
    return np.where((before ^ agent) >> 32 != 0, EVERYBODY, one)


def _name(agent: int) -> str:
    if agent >= EVERYBODY:
        return "several CTAs"
    warp = agent & 63
    who = "several warps" if warp == SEVERAL else f"warp {warp}"
    return f"{who} of CTA {agent >> 32} behind barrier {agent >> 6 & (1 << 26) - 1}"


def _alike(a: Array, b: Array) -> bool:
    """Whether bytes are float32 that are equal but for rounding.

    Threads that hold one sum of a tree have added it up in other orders where a product is fused
    into the addition: own product exact, the other's rounded. Triton has each of them store it.
    """
    if a.shape[1] % 4:
        return False
    x, y = (np.ascontiguousarray(v).view(np.float32) for v in (a, b))
    return bool(np.isclose(x, y, rtol=2**-20, atol=0, equal_nan=True).all())


@dataclass(frozen=True)
class Region:
    """Bytes [start, end) that a launch may touch; unwritten: nobody has put anything there yet."""

    start: int
    end: int
    unwritten: bool = False


class GlobalMemory:
    """The regions of a launch, in the memory of this process."""

    def __init__(self, regions: Iterable[Region], granule: int) -> None:
        merged: list[list[int]] = []
        given = sorted(regions, key=lambda x: x.start)
        for region in given:
            if merged and region.start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], region.end)
            else:
                merged.append([region.start, region.end])
        self.granule = granule
        self.starts = np.array([start for start, _ in merged], np.int64)
        self.ends = np.array([end for _, end in merged], np.int64)
        sizes = -(-self.ends // granule) - self.starts // granule
        self._first = np.concatenate(([0], np.cumsum(sizes)))
        self.ledger = Ledger(int(self._first[-1]))
        self.unwritten = np.zeros(len(self.ledger.writer), bool)
        for region in given:
            if region.unwritten and region.end > region.start:
                a, b = self.granules(np.array([[region.start, region.end - 1]]))[0]
                self.unwritten[a : b + 1] = True
        self.bytes_read = self.bytes_written = 0
        whole = (ctypes.c_uint8 * (2**47 - 2 * FIRST)).from_address(FIRST)
        self._by_size = {n: np.frombuffer(whole, UNSIGNED[8 * n]) for n in (1, 2, 4, 8)}

    def granules(self, address: Array) -> Array:
        """Places in the ledger of addresses that lie in a region."""
        i = np.searchsorted(self.starts, address, side="right") - 1
        return self._first[i] + address // self.granule - self.starts[i] // self.granule

    def _at(self, address: Array, size: int) -> Array:
        """Places [n, k] in the ledger of accesses to `size` bytes; raises FaultError outside."""
        if (off := address % size != 0).any():
            raise FaultError(f"misaligned: {size} bytes at {int(address[off][0]):#x}")
        if not len(self.starts):
            raise FaultError("out of bounds: no memory was given")
        i = np.maximum(np.searchsorted(self.starts, address, side="right") - 1, 0)
        outside = (address < self.starts[i]) | (address + size > self.ends[i])
        if outside.any():
            first = int(address[outside][0])
            near = int(i[outside][0])
            raise FaultError(
                f"out of bounds: {size} bytes at {first:#x}, {int(outside.sum())} threads; the "
                f"nearest memory is [{self.starts[near]:#x}, {self.ends[near]:#x})"
            )
        first_granule = self._first[i] + address // self.granule - self.starts[i] // self.granule
        return first_granule[:, None] + np.arange(max(size // self.granule, 1))

    def read(self, address: Array, size: int, agent: Array) -> None:
        """Check a read of `size` bytes at each address [n]."""
        at = self._at(address, size)
        if (empty := self.unwritten[at]).any():
            raise FaultError(
                f"uninitialised: {int(empty.any(1).sum())} threads read what nobody wrote"
            )
        self.ledger.read(at, agent)
        self.bytes_read += size * len(address)

    def fetch(self, address: Array, elements: int, size: int) -> Array:
        """[n, elements] of `size` bytes each at addresses that were checked."""
        index = ((address - FIRST) // size)[:, None] + np.arange(elements)
        return self._by_size[size][index]

    def store(self, address: Array, values: Array, agent: Array) -> None:
        """Write values [n, elements]."""
        size = values.dtype.itemsize
        at = self._at(address, size * values.shape[1])
        index = ((address - FIRST) // size)[:, None] + np.arange(values.shape[1])
        memory = self._by_size[size]
        same = (memory[index] == values).all(1)[:, None]
        self.ledger.write(at, agent, np.broadcast_to(same, at.shape))
        memory[index] = values
        if (memory[index] != values).any():
            raise FaultError("race: two threads write different values to one place at once")
        self.unwritten[at] = False
        self.bytes_written += values.nbytes


class SharedMemory:
    """The shared memory of several CTAs, each of `size` bytes, one after the other."""

    def __init__(self, ctas: int, size: int, granule: int) -> None:
        self.size = size
        self.pitch = -(-max(size, 16) // 1024) * 1024
        self.granule = granule
        self.bytes = np.full(ctas * self.pitch, 0xA5, np.uint8)
        granules = ctas * self.pitch // granule
        self.ledger = Ledger(granules)
        self.arriving = np.zeros(granules, bool)  # of a cp.async that was not waited for
        self.reading = np.zeros(granules, np.int32)  # by matrix products not waited for
        self.unfenced = np.zeros(granules, bool)  # written since the last fence.proxy.async
        self.accessed = 0

    def flat(self, slot: Array, address: Array, size: int) -> Array:
        """Addresses in `bytes` of what CTAs in these slots call `address`; FaultError outside."""
        if (off := address % size != 0).any():
            raise FaultError(f"misaligned: {size} bytes of shared memory at {int(address[off][0])}")
        outside = (address < 0) | (address + size > self.size)
        if outside.any():
            raise FaultError(
                f"out of bounds: {size} bytes of shared memory at {int(address[outside][0])} of "
                f"{self.size}, {int(outside.sum())} threads"
            )
        return slot * self.pitch + address

    def granules(self, flat: Array, size: int) -> Array:
        return (flat // self.granule)[:, None] + np.arange(max(size // self.granule, 1))

    def read(self, flat: Array, size: int, agent: Array) -> None:
        """Check a read of `size` bytes at each of flat [n]."""
        at = self.granules(flat, size)
        self.refuse_arriving(at)
        if (self.ledger.writer[at] == NOBODY).any():
            raise FaultError("uninitialised: reads shared memory that nobody wrote")
        self.ledger.read(at, agent)
        self.accessed += size * len(flat)

    def refuse_arriving(self, at: Array) -> None:
        if self.arriving[at].any():
            raise FaultError("race: touches what a cp.async that was not waited for is to bring")

    def load(self, flat: Array, size: int) -> Array:
        """[n, size] bytes."""
        return self.bytes[flat[:, None] + np.arange(size)]

    def store(self, flat: Array, values: Array, agent: Array) -> None:
        """Write bytes [n, size]."""
        size = values.shape[1]
        at = self.granules(flat, size)
        index = flat[:, None] + np.arange(size)
        same = (self.bytes[index] == values).all(1)[:, None]
        self.write(at, agent, np.broadcast_to(same, at.shape))
        self.bytes[index] = values
        kept = self.bytes[index]
        if (kept != values).any() and not _alike(kept, values):
            raise FaultError("race: two threads write different values to one place at once")
        self.accessed += values.size

    def write(self, at: Array, agent: Array, same: Array) -> None:
        """Check a write of granules at [n, k]."""
        self.refuse_arriving(at)
        if self.reading[at].any():
            raise FaultError("race: overwrites what a product that was not waited for reads")
        self.ledger.write(at, agent, same)
        self.unfenced[at] = True

    def fence(self, agent: Array) -> None:
        """What these agents wrote, or anybody of their CTAs before the last barrier, may be read
        by the asynchronous proxy from here on."""
        for one in np.unique(agent):
            writer = self.ledger.writer
            mine = (writer >> 32 == one >> 32) & ((writer == one) | (writer >> 6 != one >> 6))
            self.unfenced[mine] = False
