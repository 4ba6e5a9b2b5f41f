"""The executor on kernels that are not lmc's: what is right passes, each planted fault is seen."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from lmc.kernels.spec import interpreted
from tests.ptx.device import Device
from tests.ptx.mutants import mutants
from tests.ptx.program import FaultError

pytestmark = [
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1 replaces the compiler"),
    pytest.mark.heavy,
]
ARCHES = ("sm_80", "sm_89", "sm_90")


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < (n if MASKED else n + BLOCK)
    tl.store(out + o, tl.load(x + o, mask=m) + tl.load(y + o, mask=m), mask=m)


@triton.jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b = tl.load(x + tl.program_id(0) * n + o, mask=o < n, other=-float("inf"))
    e = tl.exp(b - tl.max(b, 0))
    tl.store(out + tl.program_id(0) * n + o, e / tl.sum(e, 0), mask=o < n)


@triton.jit
def product_kernel(
    a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        m_a = (o_m < M)[:, None] & (k + o_k < K)[None, :]
        m_b = (k + o_k < K)[:, None] & (o_n < N)[None, :]
        b_a = tl.load(a + o_m[:, None] * K + (k + o_k)[None, :], mask=m_a, other=0.0)
        b_b = tl.load(b + (k + o_k)[:, None] * N + o_n[None, :], mask=m_b, other=0.0)
        acc = tl.dot(b_a, b_b, acc)
    m_c = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(c + o_m[:, None] * N + o_n[None, :], acc.to(c.dtype.element_ty), mask=m_c)


@triton.jit
def everybody_kernel(x, out, SAME: tl.constexpr):
    i = tl.program_id(0)
    tl.store(out + (0 if SAME else i), tl.load(x + i))


@triton.jit
def neighbour_kernel(x):
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + i + 1))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def product(M: int = 70, N: int = 64, K: int = 200) -> None:
    """Raises unless two matrices of bfloat16 are multiplied as PyTorch does."""
    a, b = random(M, K, dtype=torch.bfloat16), random(K, N, dtype=torch.bfloat16)
    c = torch.full((M, N), torch.nan)
    product_kernel[(-(-M // 64), -(-N // 64))](
        a, b, c, M, N, K, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_stages=3
    )
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHES)
def test_what_is_right_passes(arch):
    x, y, out = random(1000), random(1000, 1)[:, 0], torch.empty(1000)
    with Device(arch) as device:
        add_kernel[(8,)](x, y, out, 1000, BLOCK=128, MASKED=True)
        rows, soft = random(5, 777), torch.empty(5, 777)
        softmax_kernel[(5,)](rows, soft, 777, BLOCK=1024)
        product()
    assert torch.equal(out, x + y)
    torch.testing.assert_close(soft, rows.softmax(1), rtol=1e-5, atol=1e-7)
    assert device.totals.launches == 3
    assert device.totals.ctas == 8 + 5 + 2
    assert device.totals.bytes_written == 4 * (1000 + 5 * 777 + 70 * 64)


def test_accesses_outside_of_a_tensor_are_seen():
    storage = torch.zeros(2000)
    x = storage[:1000]  # what lies behind is memory of this process, and none of the launch's
    with (
        Device("sm_90"),
        pytest.raises(FaultError, match=r"out of bounds.*ld.global.*test_executor.py"),
    ):
        add_kernel[(8,)](x, x.clone(), torch.empty(1000), 1000, BLOCK=128, MASKED=False)


def test_two_ctas_at_one_place_are_seen():
    x = random(64)
    with Device("sm_90"):
        everybody_kernel[(64,)](x, torch.empty(64), SAME=False)
        with pytest.raises(FaultError, match="race"):
            everybody_kernel[(64,)](x, torch.empty(64), SAME=True)
        with pytest.raises(FaultError, match="race"):
            neighbour_kernel[(63,)](x.clone())


def test_reads_of_what_nobody_wrote_are_seen():
    with Device("sm_90"):
        x = torch.empty(1000)
        with pytest.raises(FaultError, match="uninitialised"):
            add_kernel[(8,)](x, x, torch.empty(1000), 1000, BLOCK=128, MASKED=True)
        x.fill_(1)
        add_kernel[(8,)](x, x, torch.empty(1000), 1000, BLOCK=128, MASKED=True)


# What Triton writes and the kernel could do without: of sm_80's loop, which waits and has a barrier
# at its end, the ones at its beginning, and each of two equal waits that follow one another.
NEEDLESS = {("sm_80", "barrier"): 1, ("sm_80", "wait"): 3}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", ["barrier", "wait", "fence", "mask", "address"])
def test_every_planted_fault_is_seen(arch, kind):
    """Of a matrix product: dropped barriers, waits, fences and masks, and shifted addresses.

    K is a multiple of the block: a mask over k would hide what is multiplied by another one's 0.
    """
    texts: list[str] = []
    with Device(arch, rewrite=lambda text: texts.append(text) or text) as device:
        product(K=192)
    planted, missed = 0, []
    for what, line, text in mutants(texts[0], kind):
        counts = device.totals.held_back if kind == "mask" else device.totals.lines
        if not counts[line]:
            continue  # in this product it holds nobody back, or is not come to
        planted += 1
        try:
            with Device(arch, rewrite=lambda _, text=text: text):
                product(K=192)
        except (FaultError, AssertionError):
            continue
        missed.append(f"{line}: {what}")
    assert planted or (arch, kind) == ("sm_80", "fence")
    assert len(missed) == NEEDLESS.get((arch, kind), 0), missed
