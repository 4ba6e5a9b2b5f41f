"""Numbers as registers hold them, and as numpy computes with them.

A register of every thread is one array of unsigned integers, or of truth values. `read` turns it
into what an instruction's type says, `bits` back: halves are computed with in float32, and packed
types (f16x2, bf16x2, s16x2, f32x2) have a second axis.
"""

from __future__ import annotations

import re

import numpy as np
import torch

from tests.ptx.program import UnsupportedError

Array = np.ndarray
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "s16x2": "s16", "u16x2": "u16", "f32x2": "f32"}
# A register that nobody wrote: NaN as a float, no address as an integer.
UNWRITTEN = {
    "pred": np.bool_(False),
    "b8": np.uint8(0x7F),
    "b16": np.uint16(0x7FD3),
    "b32": np.uint32(0x7FC0DEAD),
    "b64": np.uint64(0x7FF7DEADBEEF1234),
}


def width_of(kind: str) -> int:
    """Bits of a type: 32 of b32, s32, u32, f32, f16x2."""
    if kind in PACKED:
        return 2 * width_of(PACKED[kind])
    found = re.fullmatch(r"(?:bf|[busf])(8|16|32|64)", kind)
    if found is None:
        raise UnsupportedError(f"type {kind}")
    return int(found[1])


def holder(kind: str) -> str:
    """How a register of a declared type is held: pred, b8, b16, b32 or b64."""
    return kind if kind == "pred" else f"b{width_of(kind)}"


def read(raw: Array, kind: str) -> Array:
    """The value of a register's bits, which are cut or widened by zeros to the type's width."""
    if kind == "pred":
        return raw
    if kind in PACKED:
        part = width_of(PACKED[kind])
        whole = np.ascontiguousarray(resized(raw, 2 * part))
        return read(whole[..., None].view(UNSIGNED[part]), PACKED[kind])
    raw = resized(raw, width_of(kind))
    if kind == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    return raw.view(_numpy(kind))


def bits(value: Array, kind: str) -> Array:
    """A value of a type as unsigned integers of its width; halves are rounded to nearest even."""
    if kind == "pred":
        return np.asarray(value, bool)
    if kind in PACKED:
        part = np.ascontiguousarray(bits(value, PACKED[kind]))
        return part.view(UNSIGNED[2 * width_of(PACKED[kind])])[..., 0]
    if kind == "bf16":
        return to_bf16(value)
    if kind == "f16":
        return np.asarray(value, np.float32).astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(value, dtype=_numpy(kind)).view(UNSIGNED[width_of(kind)])


def resized(raw: Array, width: int) -> Array:
    """Unsigned integers of another width."""
    return raw if raw.dtype.itemsize * 8 == width else raw.astype(UNSIGNED[width])


def _numpy(kind: str) -> type:
    if kind[0] in "bu":
        return UNSIGNED[width_of(kind)]
    if kind[0] == "s":
        return SIGNED[width_of(kind)]
    return {16: np.float16, 32: np.float32, 64: np.float64}[width_of(kind)]


def immediate(text: str, kind: str) -> Array:
    """A constant: 0f3F800000, 0d..., -1, 0x10, 7U."""
    if text[:2] in ("0f", "0F"):
        return read(np.array(int(text[2:], 16), np.uint32), "f32" if kind == "f32" else "b32")
    if text[:2] in ("0d", "0D"):
        return read(np.array(int(text[2:], 16), np.uint64), "f64" if kind == "f64" else "b64")
    if kind == "pred":
        return np.array(int(text, 0) != 0)
    number = int(text.rstrip("U"), 0) & ((1 << width_of(kind)) - 1)
    return read(np.array(number, UNSIGNED[width_of(kind)]), kind)


def to_bf16(value: Array, *, toward_zero: bool = False) -> Array:
    """float32 as the bits of bfloat16, to nearest even; a NaN as the one that hardware writes."""
    value = np.ascontiguousarray(value, dtype=np.float32)
    raw = value.view(np.uint32)
    half = (
        np.uint32(0) if toward_zero else np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))
    )
    rounded = ((raw + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def to_f16(value: Array, *, toward_zero: bool = False) -> Array:
    """float32 as the bits of float16."""
    value = np.asarray(value, np.float32)
    half = value.astype(np.float16)
    if toward_zero:
        over = np.abs(half.astype(np.float32)) > np.abs(value)
        half = np.where(over, np.nextafter(half, np.float16(0)), half)
    return half.view(np.uint16)


FLOAT8 = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}


def from_fp8(raw: Array, kind: str) -> Array:
    """uint8 codes of e4m3 or e5m2 as float32."""
    dtype, _ = FLOAT8[kind]
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    return every[raw]


def to_fp8(value: Array, kind: str) -> Array:
    """float32 as uint8 codes, what is too large as the largest (satfinite)."""
    dtype, largest = FLOAT8[kind]
    clipped = torch.from_numpy(np.clip(np.ascontiguousarray(value, np.float32), -largest, largest))
    return clipped.to(dtype).view(torch.uint8).numpy()


def flushed(value: Array) -> Array:
    """float32 with subnormal numbers as zeros of their sign (.ftz)."""
    tiny = np.abs(value) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), value), value) if tiny.any() else value


def approximate(exact: Array) -> Array:
    """float64 as a float32 that is one unit in the last place off, or right, or one off the other
    way, by its own bits: what `.approx` and `.full` may give. Numbers of float32 stay."""
    rounded = np.asarray(exact, np.float64).astype(np.float32)
    raw = rounded.view(np.int32)
    spread = (raw.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(30)
    step = np.array([-1, 0, 0, 1], np.int32)[spread]
    away = np.isfinite(rounded) & (np.abs(rounded) > 1e-37) & (rounded.astype(np.float64) != exact)
    return np.where(away, (raw + step).view(np.float32), rounded)
