"""Single instructions against Python's whole numbers, or against what the PTX ISA says of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ptx import arithmetic, moving, tensor_cores  # noqa: F401  they register what they know
from tests.ptx.lanes import launch
from tests.ptx.memory import GlobalMemory, Region
from tests.ptx.program import FaultError, UnsupportedError, parse

properties = settings(max_examples=60, deadline=None, derandomize=True)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)

TEMPLATE = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry one(
	.param .u64 .ptr .global .align 1 one_param_0,
	.param .u64 .ptr .global .align 1 one_param_1
)
.reqntid 32
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [one_param_0];
	ld.param.b64 	%rd2, [one_param_1];
	ld.global.b64 	%rd3, [%rd1];
	ld.global.b64 	%rd4, [%rd1+8];
	ld.global.b64 	%rd5, [%rd1+16];
	cvt.u32.u64 	%r3, %rd3;
	cvt.u32.u64 	%r4, %rd4;
	cvt.u32.u64 	%r5, %rd5;
	{body}
	mov.u32 	%r8, %tid.x;
	setp.eq.s32 	%p8, %r8, 0;
	@%p8 st.global.b64 	[%rd2], %rd6;
	ret;
}}
"""


def result(body: str, *given: int) -> int:
    """%rd6 after `body`, in which %rd3.. (and %r3.., their lower halves) hold what is given."""
    memory = np.zeros(4, np.uint64)
    memory[: len(given)] = [g & (2**64 - 1) for g in given]
    start = memory.ctypes.data
    program = parse(TEMPLATE.format(body=body))
    reachable = GlobalMemory([Region(start, start + 32)], program.granule["global"])
    launch(program, (1, 1, 1), [start, start + 24], reachable, 0)
    return int(memory[3])


def result32(body: str, *given: int) -> int:
    return result(f"{body}\n\tcvt.u64.u32 %rd6, %r6;", *given)


def signed(x: int, width: int) -> int:
    x &= (1 << width) - 1
    return x - (1 << width) if x >> (width - 1) else x


@properties
@given(a=u64, b=u64)
def test_upper_halves_of_products(a, b):
    assert result("mul.hi.u64 %rd6, %rd3, %rd4;", a, b) == a * b >> 64
    expected = signed(a, 64) * signed(b, 64) >> 64
    assert result("mul.hi.s64 %rd6, %rd3, %rd4;", a, b) == expected & 2**64 - 1


@properties
@given(a=u32, b=u32)
def test_integers(a, b):
    x, y = signed(a, 32), signed(b, 32)
    assert result("mul.wide.s32 %rd6, %r3, %r4;", a, b) == x * y & 2**64 - 1
    assert result("mul.wide.u32 %rd6, %r3, %r4;", a, b) == a * b
    quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) if y else -1
    assert result32("div.s32 %r6, %r3, %r4;", a, b) == quotient & 2**32 - 1
    assert (
        result32("rem.s32 %r6, %r3, %r4;", a, b or 3)
        == (x - (abs(x) // abs(y or 3) * (1 if (x < 0) == ((y or 3) < 0) else -1)) * (y or 3))
        & 2**32 - 1
    )
    assert result32("shr.s32 %r6, %r3, %r4;", a, b) == (x >> min(b, 31)) & 2**32 - 1
    assert result32("shl.b32 %r6, %r3, %r4;", a, b) == (a << b & 2**32 - 1 if b < 32 else 0)
    assert result32("popc.b32 %r6, %r3;", a) == a.bit_count()
    assert result32("clz.b32 %r6, %r3;", a) == 32 - a.bit_length()
    assert result32("brev.b32 %r6, %r3;", a) == int(f"{a:032b}"[::-1], 2)


@properties
@given(a=u32, position=st.integers(0, 40), length=st.integers(0, 40))
def test_bit_fields(a, position, length):
    body = "bfe.u32 %r6, %r3, %r4, %r5;"
    assert result32(body, a, position, length) == a >> position & (1 << length) - 1


@properties
@given(a=u32, b=u32, pick=st.integers(0, 0xFFFF))
def test_bytes_are_permuted(a, b, pick):
    data = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    expected = 0
    for i in range(4):
        n = pick >> 4 * i & 15
        byte = data[n & 7]
        expected |= (255 * (byte >> 7) if n & 8 else byte) << 8 * i
    assert result32("prmt.b32 %r6, %r3, %r4, %r5;", a, b, pick) == expected


@properties
@given(a=u32, b=u32, c=u32, table=st.integers(0, 255))
def test_logic_by_a_table(a, b, c, table):
    expected = 0
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | c >> bit & 1
        expected |= (table >> index & 1) << bit
    assert result32(f"lop3.b32 %r6, %r3, %r4, %r5, {table};", a, b, c) == expected


@pytest.mark.parametrize(
    ("x", "into", "expected"),
    [
        (2.9, "rzi.s32", 2), (-2.9, "rzi.s32", -2), (2.5, "rni.s32", 2), (3.5, "rni.s32", 4),
        (-2.1, "rmi.s32", -3), (2.1, "rpi.s32", 3), (3e9, "rzi.s32", 2**31 - 1),
        (-3e9, "rzi.s32", -(2**31)), (float("nan"), "rzi.s32", 0), (-1.0, "rzi.u32", 0),
        (5e9, "rzi.u32", 2**32 - 1),
    ],
)  # fmt: skip
def test_floats_become_integers_and_saturate(x, into, expected):
    raw = int(np.float32(x).view(np.uint32))
    assert result32(f"cvt.{into}.f32 %r6, %r3;", raw) == expected & 2**32 - 1


@pytest.mark.parametrize(
    ("name", "truth"), [("lt", 0), ("ne", 0), ("neu", 1), ("geu", 1), ("nan", 1)]
)
def test_comparisons_with_nan(name, truth):
    nan = int(np.float32("nan").view(np.uint32))
    body = f"setp.{name}.f32 %p1, %r3, %r4; selp.b32 %r6, 1, 0, %p1;"
    assert result32(body, nan, 0) == truth


@pytest.mark.parametrize("x", [1.0, 1.00390625, 1.01171875, 3.4e38, 1e-40])
def test_bfloat16_is_rounded_to_nearest_even(x):
    import torch

    raw = int(np.float32(x).view(np.uint32))
    body = "cvt.rn.bf16x2.f32 %r6, %r3, %r3;"
    expected = int(torch.tensor(x).bfloat16().view(torch.int16)) & 0xFFFF
    assert result32(body, raw) == expected << 16 | expected


def test_scopes_have_names_of_their_own_and_loops_end():
    body = """
	mov.b32 %r6, 0;
	{
	.reg .pred 	more;
again:
	add.s32 %r6, %r6, 1;
	setp.lt.s32 more, %r6, %r3;
	@more bra again;
	}
	{
	.reg .pred 	more;
again:
	add.s32 %r6, %r6, 10;
	setp.lt.s32 more, %r6, 50;
	@more bra again;
	}
	"""
    assert result32(body, 7) == 57


def test_threads_that_part_meet_again():
    body = """
	mov.u32 %r7, %tid.x;
	and.b32 %r7, %r7, 1;
	setp.eq.s32 %p1, %r7, 0;
	mov.b32 %r6, 5;
	@%p1 bra $L__skip;
	mov.b32 %r6, 7;
$L__skip:
	redux.sync.add.s32 %r6, %r6, -1;
	"""
    assert result32(body) == 16 * 5 + 16 * 7


def test_a_part_of_a_warp_may_not_shuffle():
    body = """
	mov.u32 %r7, %tid.x;
	setp.lt.s32 %p1, %r7, 16;
	mov.b32 %r6, 5;
	@%p1 shfl.sync.bfly.b32 %r6, %r6, 1, 31, -1;
	"""
    with pytest.raises(FaultError, match="part of a warp"):
        result32(body)


def test_what_is_not_known_is_refused():
    with pytest.raises(UnsupportedError, match=r"frob\.b32"):
        result32("frob.b32 %r6, %r3;")
