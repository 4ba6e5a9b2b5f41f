"""A 64-bit checksum of a buffer, taken where the buffer lies: a tree of sums of mixed words.

Shapes: x, contiguous, any shape and dtype, seen as n bytes -> int64 [], the digest's 64 bits.
Formula: words w of 8 bytes, little-endian, then a closing one: the n % 8 bytes left, and n % 8 in
         the top byte. Each TILE words: sum(mix(w[i] + GOLDEN * (i % TILE + 1))) mod 2**64; the
         sums are hashed in the same way until one is left. mix is a bijection: a change within
         one word always shows, any other but for one in 2**64. Against faults, not forgers.
Bytes:   reads n; writes and reads 8 per TILE words.
Source:  mix and GOLDEN are SplitMix64's (Steele, Lea and Flood, OOPSLA 2014).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.paged import describe
from lmc.kernels.spec import EXACT, OPTIONS, KernelSpec, use_kernel

# The tree is part of the digest's meaning: a change of TILE changes every digest. 2048 words are
# eight 16-byte loads a thread.
TILE = tl.constexpr(2048)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


def _tiles(n: int) -> int:
    """Tiles that n bytes and their closing word fill."""
    return n // 8 // TILE.value + 1


def checksum_reference(x: Tensor) -> Tensor:
    data = x.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    keys = np.arange(1, TILE.value + 1, dtype=np.uint64) * np.uint64(GOLDEN.value)
    while True:
        sums = _sums(data, keys)
        if len(sums) == 1:
            return torch.from_numpy(sums.view(np.int64))[0].to(x.device)
        data = sums.view(np.uint8)


def _sums(data: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One level of the tree: the sum of each tile."""
    size, tail = divmod(len(data), 8)
    words = data[: size * 8].view("<u8")
    closing = int.from_bytes(data[size * 8 :].tobytes(), "little") | tail << 56
    full = size // TILE.value
    sums = np.empty(full + 1, np.uint64)
    # A few tiles at a time stay in the processor's cache through the ten passes over them.
    for i in range(0, full, 16):
        some = words[i * TILE.value : min(i + 16, full) * TILE.value].reshape(-1, TILE.value)
        _mix(some + keys).sum(axis=1, out=sums[i : min(i + 16, full)])
    last = np.append(words[full * TILE.value :], np.uint64(closing))
    sums[full] = _mix(last + keys[: len(last)]).sum()
    return sums


def _mix(x: np.ndarray) -> np.ndarray:
    shifted = x >> np.uint64(30)
    x ^= shifted
    x *= np.uint64(MIX_1.value)
    np.right_shift(x, np.uint64(27), out=shifted)
    x ^= shifted
    x *= np.uint64(MIX_2.value)
    np.right_shift(x, np.uint64(31), out=shifted)
    x ^= shifted
    return x


# rest is 1 for some sizes, and a constant 1 has no .to.
@triton.jit(do_not_specialize=["rest"])
def _checksum_kernel(words, tail, out, size, rest):
    i = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, TILE)
    o_word = i * TILE + o
    o_byte = tl.arange(0, 8)
    b_tail = tl.load(tail + o_byte, mask=o_byte < rest, other=0).to(tl.uint64)
    closing = tl.sum(b_tail << (8 * o_byte).to(tl.uint64), 0) | (rest.to(tl.uint64) << 56)
    if (i + 1) * TILE <= size:
        b_word = tl.load(words + o_word)  # a mask would halve the width
    else:
        b_word = tl.load(words + o_word, mask=o_word < size, other=0)
    b = b_word.to(tl.uint64, bitcast=True)
    b = tl.where(o_word == size, closing, b) + (o + 1).to(tl.uint64) * GOLDEN
    b = (b ^ (b >> 30)) * MIX_1
    b = (b ^ (b >> 27)) * MIX_2
    b = tl.where(o_word <= size, b ^ (b >> 31), 0)
    tl.store(out + i, tl.sum(b, 0).to(tl.int64, bitcast=True))


def checksum(x: Tensor) -> Tensor:
    """The digest of x's bytes, on x's device; equal bytes have equal digests, whatever x's shape.

    The stream is not waited for: `int(checksum(x))` does that.
    """
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, got {describe(x)} of strides {x.stride()}")
    data = x.detach().reshape(-1).view(torch.uint8)
    if not use_kernel(data):
        return checksum_reference(x)
    if data.data_ptr() % 16 or data.storage_offset() % 8:
        data = data.clone()
    while True:
        n = data.numel()
        out = torch.empty(_tiles(n), dtype=torch.int64, device=x.device)
        words, tail = data[: n // 8 * 8].view(torch.int64), data[n // 8 * 8 :]
        with torch.cuda.device_of(x):
            _checksum_kernel[(len(out),)](words, tail, out, n // 8, n % 8, **OPTIONS)
        if len(out) == 1:
            return out[0]
        data = out.view(torch.uint8)


@dataclass(frozen=True)
class Buffer:
    """T elements, `start` elements into an allocation."""

    T: int
    start: int = 0

    def __str__(self) -> str:
        return f"T{self.T}-start{self.start}"


def make_inputs(case: Buffer, dtype: torch.dtype, device: str) -> dict[str, Any]:
    random = torch.Generator().manual_seed(case.T)
    x = torch.randn(case.start + case.T, generator=random)
    return {"x": x.to(device, dtype)[case.start :]}


SIGNATURE: dict[str, str | int] = {
    "words": "*i64:16", "tail": "*u8:8", "out": "*i64:16", "size": "i32", "rest": "i32",
}  # fmt: skip

SPEC = KernelSpec(
    name="checksum",
    launch=checksum,
    reference=checksum_reference,
    kernel=_checksum_kernel,
    cases=(
        Buffer(0),
        Buffer(1),
        Buffer(3),
        Buffer(2047),
        Buffer(4 * 2047, start=1),
        Buffer(4 * 2048),
        Buffer(20_001, start=8),
    ),
    bench=Buffer(2 * 32 * 2048 * 8 * 128),
    inputs=make_inputs,
    bytes=lambda c, b: c.T * b + 8,
    check=EXACT,
    aot={"bytes": SIGNATURE},
    moves=False,
    traffic={"bytes": Buffer(20 * 4096)},
    at=lambda T: Buffer(2 * 32 * T * 8 * 128),
)
