"""Quantise a chunk: int8, int4 (two codes a byte) or fp8 e4m3, symmetric, in one launch.

Shapes: chunk [L, 2, T, G, D] -> codes of that shape (int4: [L, 2, T, G, D/2], dim 2i in the low
         nibble, 2i + 1 in the high one, both plus 8), fp32 k_scale [L, G, D], v_scale [L, T, G].
Formula: code = round(x / scale), scale = max |x| / limit: of K over T, of V over D; limits are 127,
         7 and 448.
Bytes:   reads 2*L*T*G*D*b, writes as many codes and both scales; of a chunk of more than 512 rows
         K is read twice, since its scale is known only at its end.
Source:  KIVI, arXiv 2402.02750: outliers of K stay in their channels, those of V in their rows.
         In fp16 scales would save 2% of an int8 chunk of 64 rows, 4% of an int4 one, and lose
         precision where a step is below 6e-5.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc.kernels.cases import Case, make_chunk
from lmc.kernels.paged import DTYPES, describe
from lmc.kernels.spec import OPTIONS, QUANTISED, KernelSpec, interpreted, use_kernel

# By name: the type of the codes, which tells the format, and the largest code.
FORMATS = {
    "int8": (torch.int8, 127),
    "int4": (torch.uint8, 7),
    "fp8": (torch.float8_e4m3fn, 448),
}
# A channel of zeros has a scale too, small and far from what fp32 would round to zero.
TINY = tl.constexpr(1e-30)
# Of K these many stay in registers until their scale is known; of more, it is read twice.
ROWS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Quantised:
    """A chunk as codes and scales, shaped as the head of this file says; dtype: the chunk's."""

    codes: Tensor
    k_scale: Tensor
    v_scale: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        codes, known = self.codes, [dtype for dtype, _ in FORMATS.values()]
        if codes.ndim != 5 or codes.shape[1] != 2 or codes.dtype not in known:
            raise ValueError(f"codes must be [L, 2, T, G, D] of {known}, got {describe(codes)}")
        L, _, T, G, D = self.shape
        for name, shape in (("k_scale", (L, G, D)), ("v_scale", (L, T, G))):
            x = getattr(self, name)
            if (x.shape, x.dtype, x.device) != (shape, torch.float32, codes.device):
                raise ValueError(
                    f"{name} must be float32 {list(shape)} on {codes.device}, got {describe(x)}"
                )

    def steps_off(self, chunk: Tensor) -> Tensor:
        """How far every value of `chunk` is from what its code stands for, in steps, float64."""
        scales = torch.broadcast_tensors(self.k_scale[:, None], self.v_scale[..., None])
        wanted = chunk.double() / torch.stack(scales, 1)
        off = (numbers(self.codes, torch.float64) - wanted).abs()
        if self.format == "fp8":
            # Numbers of four bits, the last of which is worth 2**-9 or more.
            off /= torch.exp2(torch.floor(torch.log2(wanted.abs())).clamp(min=-6) - 3)
        return off

    @property
    def format(self) -> str:
        return next(name for name, (dtype, _) in FORMATS.items() if dtype == self.codes.dtype)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[L, 2, T, G, D] of the chunk."""
        L, sides, T, G, D = self.codes.shape
        return L, sides, T, G, 2 * D if self.format == "int4" else D


def numbers(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that codes stand for, before the scale."""
    if codes.dtype == torch.uint8:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        return codes.to(dtype).sub_(8)
    return codes.to(dtype)


def quantize_reference(chunk: Tensor, format: str, out: Quantised | None = None) -> Quantised:
    out = _empty(chunk, format) if out is None else out
    limit = FORMATS[format][1]
    # A layer at a time stays in the processor's cache between the passes over it.
    for layer in range(chunk.shape[0]):
        for side, scale, axis in ((0, out.k_scale[layer], 0), (1, out.v_scale[layer], -1)):
            x, codes = chunk[layer, side].float(), out.codes[layer, side]
            if not x.numel():
                scale.fill_(TINY.value / limit)
                continue
            # Two passes that are vectorised: aminmax would take ten times as long.
            largest = torch.maximum(-x.amin(axis), x.amax(axis)).clamp_(min=TINY.value)
            torch.div(largest, limit, out=scale)
            # No clamp: a rounded x / max |x| exceeds 1 by less than half a code.
            x = x * (torch.full_like(largest, limit) / largest).unsqueeze(axis)
            if format == "int4":
                nibbles = x.round_().add_(8).to(torch.uint8)
                torch.add(nibbles[..., ::2], nibbles[..., 1::2], alpha=16, out=codes)
            else:
                codes.copy_(x.round_() if format == "int8" else x)
    return out


def _empty(chunk: Tensor, format: str) -> Quantised:
    L, _, T, G, D = chunk.shape
    kind, _ = FORMATS[format]
    W = D // 2 if format == "int4" else D
    return Quantised(
        torch.empty((L, 2, T, G, W), dtype=kind, device=chunk.device),
        torch.empty((L, G, D), device=chunk.device),
        torch.empty((L, T, G), device=chunk.device),
        chunk.dtype,
    )


@triton.jit
def _integer(b_x):
    """The nearest integer, ties to even, of |b_x| < 2**22: 1.5 * 2**23 leaves no bit below 1."""
    return (b_x + 12582912.0) - 12582912.0


@triton.jit
def _e4m3(b_x):
    """The nearest number of e4m3, so that the conversion that follows is exact.

    Needed where no hardware rounds: Triton 3.9's interpreter loses the carry of a rounding, so that
    127.7 becomes 64, and AMD's conversion is not of this format.
    """
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_bits = (b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) & -0x100000
    b_normal = b_bits.to(tl.float32, bitcast=True)
    # Below 2**-6 numbers are 2**-9 apart: 1.5 * 2**14 leaves no bit below that.
    b_tiny = (b_x + 24576.0) - 24576.0
    return tl.where(tl.abs(b_x) < 0.015625, b_tiny, b_normal)


@triton.jit
def _load(p_x, o_t, o_d, T, c_t, C_D: tl.constexpr, D: tl.constexpr):
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    p = p_x + (o_t * c_t)[:, None] + (o_d * C_D)[None, :]
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(
    p_codes, b_x, o_t, first, T, G, D: tl.constexpr, PACKED: tl.constexpr,
    SOFT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round b_x [BLOCK_T, BLOCK], rows o_t and dims first.., to codes of one head at p_codes."""
    if PACKED:
        b_nibbles = tl.reshape((_integer(b_x) + 8).to(tl.int32), (BLOCK_T, BLOCK // 2, 2))
        b_low, b_high = tl.split(b_nibbles)
        o = first // 2 + tl.arange(0, BLOCK // 2)
        m = (o_t < T)[:, None] & (o < D // 2)[None, :]
        p = p_codes + (o_t * G * (D // 2))[:, None] + o[None, :]
        tl.store(p, (b_low + 16 * b_high).to(tl.uint8), mask=m)
    else:
        o = first + tl.arange(0, BLOCK)
        m = (o_t < T)[:, None] & (o < D)[None, :]
        p = p_codes + (o_t * G * D)[:, None] + o[None, :]
        if not p_codes.dtype.element_ty.is_fp8():
            b_x = _integer(b_x)
        elif SOFT:
            b_x = _e4m3(b_x)
        tl.store(p, b_x.to(p_codes.dtype.element_ty), mask=m)


@triton.jit
def _keys(
    p_k, p_scale, p_codes, first, T, G, c_t,
    C_D: tl.constexpr, D: tl.constexpr, LIMIT: tl.constexpr, PACKED: tl.constexpr,
    SOFT: tl.constexpr, ONCE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Channels first.. of one head, all rows."""
    o_t = tl.arange(0, BLOCK_T).to(tl.int64)
    o_d = first + tl.arange(0, BLOCK_C)
    b_x = _load(p_k, o_t, o_d, T, c_t, C_D, D)
    b_max = tl.max(tl.abs(b_x), axis=0)
    if not ONCE:
        for start in range(BLOCK_T, T, BLOCK_T):
            b_next = _load(p_k, start + o_t, o_d, T, c_t, C_D, D)
            b_max = tl.maximum(b_max, tl.max(tl.abs(b_next), axis=0))
    b_max = tl.maximum(b_max, TINY)
    tl.store(p_scale + o_d, tl.div_rn(b_max, 1.0 * LIMIT), mask=o_d < D)
    b_inverse = tl.div_rn(1.0 * LIMIT, b_max)[None, :]
    if ONCE:
        _store(p_codes, b_x * b_inverse, o_t, first, T, G, D, PACKED, SOFT, BLOCK_T, BLOCK_C)
    else:
        for start in range(0, T, BLOCK_T):
            b_next = _load(p_k, start + o_t, o_d, T, c_t, C_D, D) * b_inverse
            _store(p_codes, b_next, start + o_t, first, T, G, D, PACKED, SOFT, BLOCK_T, BLOCK_C)


@triton.jit
def _values(
    p_v, p_scale, p_codes, first, T, G, c_t,
    C_D: tl.constexpr, D: tl.constexpr, LIMIT: tl.constexpr, PACKED: tl.constexpr,
    SOFT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows first.. of one head, all channels."""
    o_t = first + tl.arange(0, BLOCK_T)
    b_x = _load(p_v, o_t, tl.arange(0, BLOCK_D), T, c_t, C_D, D)
    b_max = tl.maximum(tl.max(tl.abs(b_x), axis=1), TINY)
    tl.store(p_scale + o_t * G, tl.div_rn(b_max, 1.0 * LIMIT), mask=o_t < T)
    b_x = b_x * tl.div_rn(1.0 * LIMIT, b_max)[:, None]
    _store(p_codes, b_x, o_t, 0, T, G, D, PACKED, SOFT, BLOCK_T, BLOCK_D)


@triton.jit
def _quantize_kernel(
    chunk, codes, k_scale, v_scale, T, c_l, c_kv, c_t, c_g,
    C_D: tl.constexpr, D: tl.constexpr, LIMIT: tl.constexpr, PACKED: tl.constexpr,
    SOFT: tl.constexpr, ONCE: tl.constexpr,
    K_T: tl.constexpr, K_C: tl.constexpr, V_T: tl.constexpr, V_C: tl.constexpr,
):  # fmt: skip
    i_g, G = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i_tile = tl.program_id(1).to(tl.int64)
    i_l = tl.program_id(2).to(tl.int64)
    K_TILES: tl.constexpr = (D + K_C - 1) // K_C
    p_k = chunk + i_l * c_l + i_g * c_g
    p_codes = codes + (2 * i_l * T * G + i_g) * (D // 2 if PACKED else D)
    if i_tile < K_TILES:
        p_scale = k_scale + (i_l * G + i_g) * D
        first = i_tile * K_C
        _keys(p_k, p_scale, p_codes, first, T, G, c_t, C_D, D, LIMIT, PACKED, SOFT, ONCE, K_T, K_C)
    else:
        p_scale = v_scale + i_l * T * G + i_g
        first = (i_tile - K_TILES) * V_T
        p_codes += T * G * (D // 2 if PACKED else D)
        p_v = p_k + c_kv
        _values(p_v, p_scale, p_codes, first, T, G, c_t, C_D, D, LIMIT, PACKED, SOFT, V_T, V_C)


def _tiles(T: int, D: int, format: str, soft: bool) -> dict[str, int]:
    """Tiles of 8192 elements: of K all rows, while 16 channels of them fit, of V all channels."""
    rows, V_C = triton.next_power_of_2(max(T, 1)), triton.next_power_of_2(D)
    K_T = min(rows, ROWS_AT_ONCE)
    K_C, V_T = min(8192 // K_T, V_C), min(8192 // V_C, rows)
    return {
        "LIMIT": FORMATS[format][1], "PACKED": int(format == "int4"), "SOFT": int(soft),
        "ONCE": int(T <= K_T), "K_T": K_T, "K_C": K_C, "V_T": V_T, "V_C": V_C,
        "num_warps": 8 if soft else 4,  # rounding takes registers: more threads share a tile
    }  # fmt: skip


def check_device(format: str, device: torch.device) -> None:
    """Raise if kernels on this device cannot work on the format."""
    if format == "fp8" and device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise ValueError(
                f"format fp8 needs compute capability 8.9, got {capability} of {device}; "
                f"int8 and int4 run on any"
            )


def quantize(chunk: Tensor, format: str, out: Quantised | None = None) -> Quantised:
    """Codes and scales of a chunk [L, 2, T, G, D] of finite values; out: where to write them.

    format: int8, int4 (even D) or fp8. The error of a value is at most half a step; a step is the
    scale, or in fp8 the distance of numbers there.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {sorted(FORMATS)}, got {format!r}")
    L, sides, T, G, D = chunk.shape if chunk.ndim == 5 else (0, 0, 0, 0, 0)
    odd = format == "int4" and D % 2
    if chunk.dtype not in DTYPES or sides != 2 or 0 in (L, G, D) or odd:
        raise ValueError(
            f"chunk must be floating [L, 2, T, G, D], L, G, D > 0 and D even for int4, "
            f"got {describe(chunk)}"
        )
    if out is None:
        out = _empty(chunk, format)
    elif (out.format, out.shape, out.codes.device, out.dtype) != (
        format, chunk.shape, chunk.device, chunk.dtype,
    ) or not all(x.is_contiguous() for x in (out.codes, out.k_scale, out.v_scale)):  # fmt: skip
        raise ValueError(
            f"out must be contiguous {format} codes and scales of {describe(chunk)}, "
            f"got {out.format} of {out.dtype} {list(out.shape)} on {out.codes.device}"
        )
    check_device(format, chunk.device)
    if not use_kernel(chunk):
        return quantize_reference(chunk, format, out)
    soft = format == "fp8" and (interpreted() or torch.version.hip is not None)
    tiles = _tiles(T, D, format, soft)
    programs = triton.cdiv(D, tiles["K_C"]) + triton.cdiv(T, tiles["V_T"])
    with torch.cuda.device_of(chunk):
        _quantize_kernel[(G, programs, L)](
            chunk, out.codes, out.k_scale, out.v_scale, T, *chunk.stride()[:4],
            C_D=chunk.stride(4), D=D, **tiles, **OPTIONS,
        )  # fmt: skip
    return out


@dataclass(frozen=True)
class QuantisedCase(Case):
    """A case with a format of codes."""

    format: str = "int8"

    def __str__(self) -> str:
        return f"{self.format}-{super().__str__()}"

    def bytes(self, b: int) -> int:
        """A chunk at b bytes an element, its codes and its scales."""
        n = 2 * self.L * self.T * self.G * self.D
        codes = n // 2 if self.format == "int4" else n
        return n * b + codes + 4 * self.L * self.G * (self.D + self.T)


def make_inputs(case: QuantisedCase, dtype: torch.dtype, device: str) -> dict[str, Any]:
    chunk = make_chunk(case, dtype, device)
    out = _empty(chunk, case.format)
    # No code is -128, and no nibble 0.
    out.codes.fill_({"int8": -128, "int4": 0, "fp8": torch.nan}[case.format])
    out.k_scale.fill_(torch.nan)
    out.v_scale.fill_(torch.nan)
    return {"chunk": chunk, "format": case.format, "out": out}


def _signature(format: str, T: int, *, soft: bool = False) -> dict[str, str | int]:
    D = 128
    codes = {"int8": "*i8:16", "int4": "*u8:16", "fp8": "*fp8e4nv:16"}[format]
    return {
        "chunk": "*b:16", "codes": codes, "k_scale": "*fp32:16", "v_scale": "*fp32:16", "T": "i32",
        "c_l": "i32:16", "c_kv": "i32:16", "c_t": "i32:16", "c_g": "i32:16",
        "C_D": 1, "D": D, **_tiles(T, D, format, soft),
    }  # fmt: skip


def _bytes(case: QuantisedCase, b: int) -> int:
    again = case.L * case.T * case.G * case.D * b if case.T > ROWS_AT_ONCE else 0
    return case.bytes(b) + again


CASES = (
    QuantisedCase(T=1, G=1, D=64),
    QuantisedCase(T=37, G=3, D=80),
    QuantisedCase(T=64, G=2, D=96),
    QuantisedCase(T=40, G=1, D=256),
    QuantisedCase(T=600, G=1, D=128, L=1),
    QuantisedCase(T=0, G=2, D=64),
)
SPEC = KernelSpec(
    name="quantize",
    launch=quantize,
    reference=quantize_reference,
    kernel=_quantize_kernel,
    cases=tuple(replace(case, format=format) for format in FORMATS for case in CASES),
    bench=QuantisedCase(L=32, T=512, G=8, D=128),
    inputs=make_inputs,
    bytes=_bytes,
    check=QUANTISED,
    aot={
        **{format: _signature(format, 512) for format in FORMATS},
        "fp8-soft": _signature("fp8", 512, soft=True),
        "long": _signature("int8", 2048),
    },
    unsupported={"fp8": ("sm_80", "sm_86"), "fp8-soft": ("sm_80", "sm_86")},
    traffic={
        **{format: QuantisedCase(L=1, T=512, G=1, D=128, format=format) for format in FORMATS},
        "fp8-soft": QuantisedCase(L=1, T=512, G=1, D=128, format="fp8"),
        "long": QuantisedCase(L=1, T=1024, G=1, D=128),
    },
    bus=lambda c, b: c.bytes(0),
)
