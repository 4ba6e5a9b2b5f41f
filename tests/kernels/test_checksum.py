"""The checksum against its definition in plain integers, and which damage shows.

The last test holds the Triton kernel to the definition too, in a process that interprets it.
"""

import os
import subprocess
import sys
import warnings
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmc.kernels.checksum import checksum
from lmc.kernels.spec import interpreted

properties = settings(max_examples=60, deadline=None, derandomize=True)
TILE = 8 * 2048
DTYPES = (
    torch.uint8, torch.bool, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
)  # fmt: skip


@cache
def tile_by_hand(words: tuple[int, ...]) -> int:
    total = 0
    for i, word in enumerate(words):
        x = (word + 0x9E3779B97F4A7C15 * (i + 1)) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        total += x ^ x >> 31
    return total % 2**64


def by_hand(data: bytes) -> int:
    """The digest as the module's docstring defines it."""
    size, tail = divmod(len(data), 8)
    words = [int.from_bytes(data[8 * i : 8 * i + 8], "little") for i in range(size)]
    words.append(int.from_bytes(data[8 * size :], "little") + (tail << 56))
    sums = [tile_by_hand(tuple(words[i : i + 2048])) for i in range(0, len(words), 2048)]
    return by_hand(b"".join(x.to_bytes(8, "little") for x in sums)) if sums[1:] else sums[0]


def digest(x: Tensor) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # sums and products are meant to wrap, silently
        found = checksum(x)
    assert (found.shape, found.dtype, found.device) == (torch.Size(), torch.int64, x.device)
    return int(found) % 2**64


def some_bytes(n: int) -> Tensor:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).to(torch.uint8)


@pytest.mark.parametrize(
    "n",
    [0, 1, 7, 8, 9, TILE - 9, TILE - 8, TILE - 1, TILE, TILE + 8, 3 * TILE + 5, 17 * TILE],
)
def test_digest_is_the_one_defined(n):
    x = some_bytes(n)
    assert digest(x) == by_hand(bytes(x.tolist()))


def test_the_tree_grows_a_third_level():
    x = torch.zeros(2048 * TILE + 11, dtype=torch.uint8)
    x[5], x[-1] = 1, 2
    assert digest(x) == by_hand(x.numpy().tobytes())


def test_digests_on_disk_stay_valid():
    """Digests may outlive the code that took them: these must never change."""
    assert digest(torch.empty(0)) == 0xE220A8397B1DCDAF  # SplitMix64's first output of seed 0
    assert digest(torch.arange(1000, dtype=torch.int32)) == 0x8EE71E1208F0BAC7
    assert digest(torch.arange(10_007, dtype=torch.int16)) == 0x26267F8923ED60BB


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_bytes_count_whatever_their_dtype_and_shape(dtype):
    x = some_bytes(2 * 3 * 64) if dtype != torch.bool else some_bytes(2 * 3 * 64) % 2
    seen = x.view(dtype)
    assert digest(seen) == digest(seen.reshape(2, 3, -1)) == digest(x)
    assert digest(seen[0]) == digest(x[: dtype.itemsize])  # a scalar, of no axes


@pytest.mark.parametrize("start", [1, 2, 3, 8, 9])
def test_buffers_may_start_anywhere(start):
    x = some_bytes(5000)
    assert digest(x[start:]) == digest(x[start:].clone())


damaged = st.integers(1, 2 * TILE + 100)


@properties
@given(n=damaged, at=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_shows(n, at, bit):
    x = some_bytes(n)
    before = digest(x)
    x[at % n] ^= 1 << bit
    assert digest(x) != before


@properties
@given(n=damaged, places=st.sets(st.integers(0, 2 * TILE), min_size=2, max_size=9))
@example(n=64, places={7, 15})
def test_flipped_sign_bits_do_not_cancel(n, places):
    """The top bit is the weakest of a product: a poor mix lets an even number of flips vanish."""
    x = some_bytes(n)
    before = digest(x)
    where = list({p % n for p in places})
    x[where] ^= 0x80
    assert digest(x) != before


@properties
@given(n=st.integers(2, 4200), i=st.integers(0), j=st.integers(0))
@example(n=4100, i=0, j=2048)
def test_swapped_words_show(n, i, j):
    x = some_bytes(8 * n).view(torch.int64)
    i, j = i % n, j % n
    swapped = x.clone()
    swapped[i], swapped[j] = x[j], x[i]
    assert (digest(swapped) == digest(x)) == (x[i] == x[j]).item()


def test_swapped_tiles_show():
    x = some_bytes(3 * TILE)
    swapped = torch.cat((x[TILE : 2 * TILE], x[:TILE], x[2 * TILE :]))
    assert digest(swapped) != digest(x)


@properties
@given(n=st.integers(0, 2 * TILE), more=st.integers(1, 40), zero=st.booleans())
@example(n=TILE - 8, more=8, zero=True)
def test_length_counts(n, more, zero):
    """Truncation and padding, of zeros too, change the digest."""
    x = torch.zeros(n + more, dtype=torch.uint8) if zero else some_bytes(n + more)
    padded = torch.cat((x, torch.zeros(more, dtype=torch.uint8)))
    assert len({digest(x[:n]), digest(x), digest(padded)}) == 3


def test_what_is_not_contiguous_is_refused():
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"contiguous, got float32 \[6, 4\].* strides \(1, 6\)"):
        checksum(x.mT)


@pytest.mark.skipif(interpreted(), reason="this process is interpreting already")
@pytest.mark.heavy
@pytest.mark.alone
def test_the_kernel_computes_the_same():
    # What damage shows follows from the definition, so only that is asked of the kernel.
    same = "digest_is or stay_valid or whatever or anywhere"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", same, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode or "29 passed" not in run.stdout:
        pytest.fail(f"TRITON_INTERPRET=1 pytest:\n{run.stdout}{run.stderr}", pytrace=False)
