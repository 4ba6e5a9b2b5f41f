"""Quantised chunks: against the definition in float64, and through scatter into pages.

In an ordinary run launchers work on the torch references; the last test runs this file once more
on the Triton kernels, in a process that interprets them.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmc.kernels.aot import compile_variant
from lmc.kernels.cases import Case, make_chunk, make_paged, make_slots
from lmc.kernels.dequantize import SPEC as DEQUANTIZE
from lmc.kernels.dequantize import dequantize, scatter_quantised
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedKV, PagedLatents
from lmc.kernels.quantize import FORMATS, SPEC, Quantised, QuantisedCase, quantize
from lmc.kernels.scatter import scatter
from lmc.kernels.spec import interpreted, verify

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMITS = {"int8": 127, "int4": 7, "fp8": 448}
properties = settings(max_examples=25, deadline=None, derandomize=True)
# Rounding a number to this type errs by at most this share of it.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def angles(delta: int, R: int) -> tuple[Tensor, Tensor]:
    angle = delta * 1e5 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    return angle.cos().float(), angle.sin().float()


def chunk_of(T: int, G: int, D: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    """Values whose channels differ in size by up to 10 ** spread, as those of K do."""
    chunk = make_chunk(Case(T=T, G=G, D=D), torch.float32, "cpu")
    sizes = torch.rand(G, D, generator=torch.Generator().manual_seed(D)) * 2 - 1
    return (chunk * 10 ** (spread * sizes)).to(dtype)


def half_steps(chunk: Tensor, format: str) -> Tensor:
    """By how much each value may be off: half the distance of what codes can express there."""
    x = chunk.double().abs()
    largest = torch.stack(
        torch.broadcast_tensors(
            x[:, 0].amax(1, keepdim=True), x[:, 1].amax(-1, keepdim=True)
        ), 1,
    )  # fmt: skip
    scale = largest / LIMITS[format]
    if format == "fp8":  # e4m3: 4 significant bits down to 2**-6, then 2**-9 apart
        exponent = torch.frexp(x / scale.clamp(min=1e-300)).exponent - 1
        scale = scale * 2.0 ** (exponent.clamp(min=-6) - 3)
    return scale / 2


@properties
@given(
    T=st.integers(1, 33), G=st.integers(1, 3), D=st.sampled_from([2, 64, 80, 96, 256]),
    dtype=st.sampled_from(DTYPES), format=st.sampled_from(sorted(FORMATS)),
    spread=st.sampled_from([0.0, 1.0, 2.0]),
)  # fmt: skip
def test_every_value_comes_back_within_half_a_step(T, G, D, dtype, format, spread):
    chunk = chunk_of(T, G, D, dtype, spread)
    q = quantize(chunk, format)
    assert (q.format, q.shape, q.dtype) == (format, chunk.shape, dtype)
    back = dequantize(q)
    assert (back.shape, back.dtype) == (chunk.shape, dtype)
    # Triton 3.9's interpreter truncates fp32 to bf16 where a GPU rounds: twice the error.
    rounding = ROUNDING[dtype] * (2 if interpreted() and dtype == torch.bfloat16 else 1)
    # fp16 below 2**-14 has no more than 2**-24 steps left.
    absolute = 2.0**-25 if dtype == torch.float16 else 0.0
    half = half_steps(chunk, format) * (1 + 2**-14)
    bound = half + rounding * (chunk.double().abs() + half) + absolute
    assert ((back.double() - chunk.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_scales_and_codes_are_those_of_the_definition(format, dtype):
    chunk = chunk_of(37, 2, 80, dtype)
    q = quantize(chunk, format)
    k_scale = chunk[:, 0].float().abs().amax(1) / LIMITS[format]
    v_scale = chunk[:, 1].float().abs().amax(-1) / LIMITS[format]
    assert torch.equal(q.k_scale, k_scale)
    assert torch.equal(q.v_scale, v_scale)
    numbers = q.codes.double()
    if format == "int4":  # dim 2i in the low nibble, 2i + 1 in the high one, both plus 8
        numbers = torch.empty(chunk.shape, dtype=torch.float64)
        numbers[..., ::2] = q.codes.int() % 16 - 8
        numbers[..., 1::2] = q.codes.int() // 16 - 8
    for side, scale in ((0, k_scale[:, None]), (1, v_scale[..., None])):
        exact = chunk[:, side].double() / scale.double()
        near = exact.float().to(torch.float8_e4m3fn) if format == "fp8" else exact.round()
        differ = near.double() != numbers[:, side]
        # Only ties may be tipped, and in half precision many values are ties.
        assert differ.float().mean() < 0.02
        assert (numbers[:, side].abs() <= LIMITS[format]).all()


@pytest.mark.parametrize("format", FORMATS)
def test_extremes(format):
    """Channels and rows of zeros, of one value, of the largest of fp16 and of next to nothing."""
    chunk = chunk_of(9, 2, 64, torch.float32)
    chunk[0, 0, :, 0, 3] = 0
    chunk[0, 0, :, 0, 4] = -65504
    chunk[0, 0, :, 0, 5] = 1e-38
    chunk[0, 0, :, 0, 6] = 3e38
    chunk[0, 1, 5, 1] = 0
    chunk[0, 1, 6, 1] = 1e-38
    back = dequantize(quantize(chunk, format))
    assert back.isfinite().all()
    assert torch.equal(back[0, 0, :, 0, 3], torch.zeros(9))
    assert torch.equal(back[0, 1, 5, 1], torch.zeros(64))
    for d in (4, 6):
        torch.testing.assert_close(back[0, 0, :, 0, d], chunk[0, 0, :, 0, d], rtol=1e-6, atol=0)
    assert (back[0, 0, :, 0, 5] - 1e-38).abs().max() <= 1e-30 / LIMITS[format]
    assert (back[0, 1, 6, 1] - 1e-38).abs().max() <= 1e-30 / LIMITS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_codes_are_written_where_out_says_and_from_any_strides(format):
    chunk = chunk_of(12, 2, 64, torch.float32)
    strided = chunk.transpose(2, 3).contiguous().transpose(2, 3)
    spread = torch.stack((chunk, chunk), -1)[..., 0]
    want = quantize(chunk, format)
    out = dataclasses.replace(want, codes=torch.zeros_like(want.codes))
    assert quantize(strided, format, out) is out
    for x in (out, quantize(spread, format)):
        assert torch.equal(x.codes.view(torch.uint8), want.codes.view(torch.uint8))
        assert torch.equal(x.k_scale, want.k_scale)


def pages_of(paged: PagedKV) -> list[Tensor]:
    return [x.clone() for x in (*paged.k, *paged.v)]


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("format", FORMATS)
def test_three_ragged_chunks_fill_their_rows_and_no_others(format, interleaved):
    """Each as if decoded first and then scattered, tails and skipped rows included."""
    case = Case(T=52, G=2, D=80, P=8, layout="hnd", slots="shuffled")
    fused, apart = (make_paged(case, torch.float32, "cpu", poisoned=True) for _ in range(2))
    slots = make_slots(case, "cpu")
    slots[::7] = -1
    for start, end, tail, delta, R in ((0, 1, 0, 900, 80), (1, 34, 5, -77, 32), (34, 52, 3, 4, 48)):
        q = quantize(chunk_of(end - start, 2, 80, torch.float32), format)
        # Only the rows from `tail` on, as of a chunk that straddles what is computed already.
        q = Quantised(q.codes[:, :, tail:], q.k_scale, q.v_scale[:, tail:], q.dtype)
        turn = {**dict(zip(("cos", "sin"), angles(delta, R), strict=True))}
        rows = slots[start + tail : end]
        scatter_quantised(q, fused, rows, **turn, interleaved=interleaved)
        scatter(dequantize(q), apart, rows, **turn, interleaved=interleaved)
    for x, y in zip(pages_of(fused), pages_of(apart), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=4e-6, equal_nan=True)
        assert x.isnan().any()


@pytest.mark.parametrize("format", FORMATS)
def test_a_moved_key_is_the_key_of_its_new_position(format):
    """Rotation turns the error of a pair, which is half a step of either at most, with the pair."""
    T, G, D, start, delta = 19, 2, 64, 3000, -1234
    raw = chunk_of(T, G, D, torch.float32)

    def at(position: int) -> Tensor:
        pairs = raw[:, 0].double().unflatten(-1, (2, D // 2))
        turn = (position + torch.arange(T))[:, None] * 1e5 ** (-torch.arange(0, D, 2).double() / D)
        unit = torch.polar(torch.ones_like(turn), turn)[:, None]
        turned = torch.complex(*pairs.unbind(-2)) * unit
        return torch.cat((turned.real, turned.imag), -1)

    chunk = raw.clone()
    chunk[:, 0] = at(start)
    paged = make_paged(Case(T=T, G=G, D=D), torch.float32, "cpu", poisoned=True)
    slots = make_slots(Case(T=T, G=G, D=D), "cpu")
    scatter_quantised(quantize(chunk, format), paged, slots, *angles(delta, D))
    error = (gather(paged, slots)[:, 0].double() - at(start + delta)).abs()
    half = half_steps(chunk, format)[:, 0]
    assert (error <= (half[..., : D // 2] + half[..., D // 2 :]).repeat(1, 1, 1, 2) + 1e-5).all()


def wrong(q: Quantised, **changed: Tensor) -> Quantised:
    out = dataclasses.replace(q)
    for name, value in changed.items():
        getattr(out, name).copy_(value)
    return out


@pytest.mark.parametrize(
    ("format", "spoil", "message"),
    [
        ("int8", lambda q: wrong(q, codes=q.codes - (q.codes == 1).to(torch.int8)), "steps off"),
        ("int8", lambda q: wrong(q, k_scale=q.k_scale * (1 + 2**-20)), "not equal"),
        ("int4", lambda q: wrong(q, codes=q.codes << 4 | q.codes >> 4), "steps off"),
        ("fp8", lambda q: wrong(q, codes=(q.codes.float() * 1.1).to(q.codes.dtype)), "steps off"),
        ("fp8", lambda q: wrong(q, codes=torch.full_like(q.codes, torch.nan)), "a row missed"),
        ("int8", lambda q: wrong(q, codes=torch.full_like(q.codes, -128)), "steps off"),
    ],
)  # fmt: skip
def test_verify_sees_wrong_codes_scales_and_nibbles(format, spoil, message):
    def launch(chunk: Tensor, format: str, out: Quantised) -> Quantised:
        return spoil(quantize(chunk, format, out))

    case = QuantisedCase(T=20, G=1, D=64, format=format)
    verify(SPEC, case, torch.float32, "cpu")
    with pytest.raises(AssertionError, match=message):
        verify(dataclasses.replace(SPEC, launch=launch), case, torch.float32, "cpu")


CHUNK = torch.ones(2, 2, 3, 2, 64)
Q8, Q4 = quantize(CHUNK, "int8"), quantize(CHUNK, "int4")
SLOTS = torch.tensor([1, -1, 4])
COS = torch.ones(32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: quantize(CHUNK, "int2"), r"format must be one of .*fp8.*, got 'int2'"),
        (lambda p: quantize(CHUNK[:, :1], "int8"), r"chunk must be .*got float32 \[2, 1, 3,"),
        (lambda p: quantize(CHUNK[0], "int8"), r"chunk must be .*got float32 \[2, 3, 2, 64\]"),
        (lambda p: quantize(CHUNK.int(), "int8"), "chunk must be floating .*got int32"),
        (lambda p: quantize(CHUNK[..., :63], "int4"), r"D even for int4, got .*63\]"),
        (lambda p: quantize(CHUNK[..., :0], "int8"), r"D > 0"),
        (lambda p: quantize(CHUNK, "int8", Q4), "out must be contiguous int8 .*got int4"),
        (lambda p: quantize(CHUNK[:, :, :2], "int8", Q8), r"out must .*got int8 of .*\[2, 2, 3,"),
        (lambda p: quantize(CHUNK.half(), "int8", Q8), r"out must be .*float16.*got int8 of .*32"),
        (lambda p: dequantize(Q8, CHUNK[:, :, :2]), r"out must be \[2, 2, 3, 2, 64\] .*got"),
        (lambda p: Quantised(CHUNK, CHUNK, CHUNK, CHUNK.dtype), r"codes must be .*got float32"),
        (lambda p: Quantised(Q8.codes, Q4.v_scale, Q8.v_scale, CHUNK.dtype),
         r"k_scale must be float32 \[2, 2, 64\] on cpu, got float32 \[2, 3, 2\]"),
        (lambda p: Quantised(Q8.codes, Q8.k_scale, Q8.v_scale.half(), CHUNK.dtype),
         r"v_scale must be float32 \[2, 3, 2\] on cpu, got float16"),
        (lambda p: scatter_quantised(Q8, p, SLOTS[:2]), r"q must .*\[2, 2, 2, 2, 64\], got \[2, 2"),
        (lambda p: scatter_quantised(Q8, p, SLOTS.int()), r"int64 \[T\], got int32"),
        (lambda p: scatter_quantised(Q8, p, SLOTS + 4096), r"slots must lie in"),
        (lambda p: scatter_quantised(Q8, p, SLOTS, COS), "cos and sin go together"),
        (lambda p: scatter_quantised(Q8, p, SLOTS, COS.repeat(2), COS), r"R <= D=64"),
        (lambda p: scatter_quantised(Q4, p, SLOTS, COS[:31], COS[:31]), "for int4, got R=62"),
        (lambda p: scatter_quantised(Q8, PagedLatents([x[:, :, 0] for x in p.k]), SLOTS),
         r"q must be of a chunk \[2, 1, 3, 1, 64\], got \[2, 2, 3"),
    ],
)  # fmt: skip
def test_bad_input_raises_before_anything_is_written(call, message):
    paged = make_paged(Case(T=40, G=2, D=64), torch.float32, "cpu", poisoned=False)
    before = pages_of(paged)
    with pytest.raises(ValueError, match=message):
        call(paged)
    assert all(map(torch.equal, before, pages_of(paged)))
    assert (CHUNK == 1).all()


@pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET replaces the compiler")
def test_what_is_called_unsupported_does_not_compile():
    for spec in (SPEC, DEQUANTIZE):
        for variant, targets in spec.unsupported.items():
            for target in targets:
                with pytest.raises(Exception, match="fp8e4nv not supported"):
                    compile_variant(spec, variant, torch.float16, target)


@pytest.mark.skipif(interpreted(), reason="this process is interpreting already")
@pytest.mark.heavy
@pytest.mark.alone
def test_the_kernels_do_the_same():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode or ", 2 skipped" not in run.stdout:
        pytest.fail(f"TRITON_INTERPRET=1 pytest:\n{run.stdout}{run.stderr}", pytrace=False)
