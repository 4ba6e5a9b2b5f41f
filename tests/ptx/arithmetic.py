"""Instructions that compute a register from registers, one thread for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tests.ptx.lanes import Execute, Lanes, decodes, source
from tests.ptx.program import Instruction, UnsupportedError
from tests.ptx.values import (
    FLOAT8,
    PACKED,
    SIGNED,
    UNSIGNED,
    Array,
    approximate,
    bits,
    flushed,
    from_fp8,
    read,
    to_bf16,
    to_f16,
    to_fp8,
    width_of,
)

Compute = Callable[..., Array]
TWO = np.float64


def _is_float(kind: str) -> bool:
    return kind.startswith(("f", "bf"))


def _elementwise(x: Instruction, kinds: list[str], into: str, compute: Compute) -> Execute:
    """operands[0] = compute(the others, read as kinds), in the type `into`."""
    if len(x.operands) != len(kinds) + 1:
        raise UnsupportedError(f"{len(x.operands)} operands of {x.text}")
    sources = [source(o, k) for o, k in zip(x.operands[1:], kinds, strict=True)]
    ftz = "ftz" in x.parts

    def execute(lanes: Lanes, mask: Array) -> None:
        values = [read_source(lanes) for read_source in sources]
        if ftz:
            values = [flushed(v) if v.dtype == np.float32 else v for v in values]
        result = compute(*values)
        if ftz and result.dtype == np.float32:
            result = flushed(result)
        if into not in PACKED:
            result = np.broadcast_to(result, (lanes.N,))
        lanes.write(x.operands[0], result, into, mask)

    return execute


def _maximum(kind: str, parts: tuple[str, ...], least: bool) -> Compute:
    if not _is_float(kind) or "NaN" in parts:
        pick = np.minimum if least else np.maximum
    else:
        pick = np.fmin if least else np.fmax
    if "relu" in parts:
        return lambda a, b: np.maximum(pick(a, b), pick(a, b).dtype.type(0))
    return pick


def _divided(a: Array, b: Array) -> Array:
    """Integers, toward zero; by zero all bits are set, as hardware has it."""
    a, b = np.broadcast_arrays(a, b)
    zero, safe = b == 0, np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(zero, ~a.dtype.type(0), quotient)


def _high(a: Array, b: Array) -> Array:
    """The upper half of the product of two integers."""
    a, b = np.broadcast_arrays(a, b)
    width = a.dtype.itemsize * 8
    if width < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(width)).astype(a.dtype)
    u, v, low = a.view(np.uint64), b.view(np.uint64), np.uint64(0xFFFFFFFF)
    s = np.uint64(32)
    middle = (u >> s) * (v & low) + (((u & low) * (v & low)) >> s)
    other = (u & low) * (v >> s) + (middle & low)
    high = (u >> s) * (v >> s) + (middle >> s) + (other >> s)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, v, np.uint64(0)) - np.where(b < 0, u, np.uint64(0))
    return high.view(a.dtype)


def _wide(a: Array) -> Array:
    return a.astype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")


SIMPLE: dict[str, Compute] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "sqrt": np.sqrt,
}  # fmt: skip


@decodes(*SIMPLE, "min", "max")
def _arithmetic(x: Instruction) -> Execute:
    op, kind = x.parts[0], x.parts[-1]
    if op in ("min", "max"):
        pick = _maximum(kind, x.parts, op == "min")
        three = len(x.operands) == 4  # of sm_100
        best = (lambda a, b, c: pick(pick(a, b), c)) if three else pick
        return _elementwise(x, [kind] * (len(x.operands) - 1), kind, best)
    if op == "mul" and "wide" in x.parts:
        wide = f"{kind[0]}{2 * width_of(kind)}"
        return _elementwise(x, [kind, kind], wide, lambda a, b: _wide(a) * _wide(b))
    if op == "mul" and "hi" in x.parts:
        return _elementwise(x, [kind, kind], kind, _high)
    if op == "sqrt" and "approx" in x.parts:
        return _elementwise(x, [kind], kind, lambda a: approximate(np.sqrt(a.astype(TWO))))
    if kind in ("f16", "bf16") and x.parts[-2] == "f32":  # sub.rn.f32.f16: a half and a float
        return _elementwise(x, [kind, "f32"], "f32", SIMPLE[op])
    return _elementwise(x, [kind] * (len(x.operands) - 1), kind, SIMPLE[op])


@decodes("div", "rem")
def _division(x: Instruction) -> Execute:
    kind = x.parts[-1]
    if not _is_float(kind):
        rest = lambda a, b: a - _divided(a, b) * b  # noqa: E731
        return _elementwise(x, [kind, kind], kind, _divided if x.parts[0] == "div" else rest)
    if {"full", "approx"} & set(x.parts):
        return _elementwise(x, [kind, kind], kind, lambda a, b: approximate(a.astype(TWO) / b))
    return _elementwise(x, [kind, kind], kind, np.divide)


APPROXIMATE: dict[str, Compute] = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "rsqrt": lambda a: 1 / np.sqrt(a),
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@decodes(*APPROXIMATE)
def _special_function(x: Instruction) -> Execute:
    compute = APPROXIMATE[x.parts[0]]
    kind = x.parts[-1]
    if "approx" in x.parts:
        return _elementwise(x, [kind], kind, lambda a: approximate(compute(a.astype(TWO))))
    return _elementwise(x, [kind], kind, lambda a: compute(a.astype(TWO)).astype(np.float32))


@decodes("fma", "mad")
def _multiply_add(x: Instruction) -> Execute:
    kind = x.parts[-1]
    if _is_float(kind):
        # The product is exact in float64, and the sum is rounded twice: to float64, then here.
        return _elementwise(
            x, [kind] * 3, kind, lambda a, b, c: (a.astype(TWO) * b + c).astype(np.float32)
        )
    if "wide" in x.parts:
        wide = f"{kind[0]}{2 * width_of(kind)}"
        kinds = [kind, kind, wide]
        return _elementwise(x, kinds, wide, lambda a, b, c: _wide(a) * _wide(b) + c)
    if "hi" in x.parts:
        return _elementwise(x, [kind] * 3, kind, lambda a, b, c: _high(a, b) + c)
    return _elementwise(x, [kind] * 3, kind, lambda a, b, c: a * b + c)


@decodes("shl", "shr")
def _shift(x: Instruction) -> Execute:
    kind = x.parts[-1]
    width = width_of(kind)
    left = x.parts[0] == "shl"

    def compute(a: Array, n: Array) -> Array:
        short = np.minimum(n, width - 1).astype(a.dtype)
        shifted = a << short if left else a >> short
        gone = a.dtype.type(0) if left or kind[0] != "s" else a >> a.dtype.type(width - 1)
        return np.where(n >= width, gone, shifted).astype(a.dtype)

    return _elementwise(x, [kind, "u32"], kind, compute)


@decodes("shf")
def _funnel_shift(x: Instruction) -> Execute:
    """shf.{l,r}.{wrap,clamp}.b32 d, a, b, c: of the 64 bits b:a."""

    def compute(a: Array, b: Array, c: Array) -> Array:
        n = (c & np.uint32(31) if "wrap" in x.parts else np.minimum(c, 32)).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        moved = both >> n if "r" in x.parts else both >> (np.uint64(32) - n)
        return moved.astype(np.uint32)

    return _elementwise(x, ["b32"] * 3, "b32", compute)


@decodes("bfe")
def _field(x: Instruction) -> Execute:
    kind = x.parts[-1]
    width = width_of(kind)

    def compute(a: Array, position: Array, length: Array) -> Array:
        position, length = np.minimum(position & 255, width), np.minimum(length & 255, width)
        length = np.minimum(length, width - position)
        raised = a << np.minimum(width - position - length, width - 1).astype(a.dtype)
        field = raised >> np.minimum(width - length, width - 1).astype(a.dtype)
        return np.where(length == 0, a.dtype.type(0), field)

    return _elementwise(x, [kind, "u32", "u32"], kind, compute)


@decodes("prmt")
def _permute(x: Instruction) -> Execute:
    if x.parts[-1] != "b32":
        raise UnsupportedError(f"mode of {x.text}")

    def compute(a: Array, b: Array, c: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros(np.broadcast_shapes(both.shape, c.shape), np.uint32)
        for i in range(4):
            pick = (c >> np.uint32(4 * i)) & np.uint32(15)
            byte = both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))
            byte = (byte & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | np.where(pick & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return result

    return _elementwise(x, ["b32"] * 3, "b32", compute)


@decodes("lop3")
def _logic(x: Instruction) -> Execute:
    table = int(x.operands[4], 0)

    def compute(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
        for i in range(8):
            if table >> i & 1:
                terms = [v if i >> s & 1 else ~v for v, s in ((a, 2), (b, 1), (c, 0))]
                result = result | (terms[0] & terms[1] & terms[2])
        return result

    return _elementwise(replace(x, operands=x.operands[:4]), ["b32"] * 3, "b32", compute)


@decodes("popc", "clz", "brev")
def _count(x: Instruction) -> Execute:
    kind = x.parts[-1]
    width = width_of(kind)

    def compute(a: Array) -> Array:
        ones = np.unpackbits(
            np.ascontiguousarray(a)[..., None].view(np.uint8), axis=-1, bitorder="little"
        )
        if x.parts[0] == "popc":
            return ones.sum(-1, dtype=np.uint32)
        if x.parts[0] == "clz":
            return np.where(a == 0, width, ones[..., ::-1].argmax(-1)).astype(np.uint32)
        return np.packbits(ones[..., ::-1], axis=-1, bitorder="little").view(a.dtype)[..., 0]

    return _elementwise(x, [kind], kind if x.parts[0] == "brev" else "u32", compute)


COMPARISONS: dict[str, Compute] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


@decodes("setp")
def _compare(x: Instruction) -> Execute:
    """setp.lt{.and}.s32 p{|q}, a, b{, c}"""
    kind, name = x.parts[-1], x.parts[1]
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    combined = next((combine[part] for part in x.parts[2:-1] if part in combine), None)
    a, b = source(x.operands[1], kind), source(x.operands[2], kind)
    c = source(x.operands[3], "pred") if combined else None
    targets = [t.strip() for t in x.operands[0].split("|")]

    def truth(u: Array, v: Array) -> Array:
        either = np.isnan(u) | np.isnan(v) if _is_float(kind) else np.False_
        if name == "num":
            return ~either
        if name == "nan":
            return either
        if _is_float(kind) and name.endswith("u"):
            return COMPARISONS[name[:-1]](u, v) | either
        return COMPARISONS[name](u, v) & ~either

    def execute(lanes: Lanes, mask: Array) -> None:
        u, v = a(lanes), b(lanes)
        if "ftz" in x.parts:
            u, v = flushed(u), flushed(v)
        result = np.broadcast_to(truth(u, v), (lanes.N,))
        for target, value in zip(targets, (result, ~result), strict=False):
            value = combined(value, c(lanes)) if combined else value
            lanes.write(target, value, "pred", mask)

    return execute


@decodes("selp")
def _select(x: Instruction) -> Execute:
    kind = "b" + str(width_of(x.parts[-1]))
    return _elementwise(x, [kind, kind, "pred"], kind, lambda a, b, p: np.where(p, a, b))


ROUNDED = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@decodes("cvt")
def _convert(x: Instruction) -> Execute:
    """cvt{.rounding}{.ftz}{.sat}.into.from d, a{, b}"""
    into, kind = x.parts[-2:]
    rounding = next((p for p in x.parts[1:-2] if p in ROUNDED or p in ("rn", "rz", "rna")), None)
    zero = rounding == "rz"
    if into[:4] in FLOAT8 and kind == "f32":
        code = into[:4]
        return _elementwise(
            x, ["f32", "f32"], "b16",
            lambda a, b: to_fp8(a, code).astype(np.uint16) << np.uint16(8) | to_fp8(b, code),
        )  # fmt: skip
    if kind[:4] in FLOAT8 and into == "f16x2":

        def halves(a: Array) -> Array:
            pair = np.ascontiguousarray(a)[..., None].view(np.uint8)
            return from_fp8(pair, kind[:4])

        return _elementwise(x, ["b16"], into, halves)
    if into in ("f16x2", "bf16x2"):
        half = to_bf16 if into == "bf16x2" else to_f16

        def packed(a: Array, b: Array) -> Array:
            high, low = (half(v, toward_zero=zero).astype(np.uint32) for v in (a, b))
            return high << np.uint32(16) | low

        return _elementwise(x, ["f32", "f32"], "b32", packed)
    if into in ("f16", "bf16"):
        half = to_bf16 if into == "bf16" else to_f16
        return _elementwise(
            x, [kind], "b16", lambda a: half(a.astype(np.float32), toward_zero=zero)
        )
    if into == "tf32":
        return _elementwise(x, [kind], "b32", lambda a: bits(_to_tf32(a), "f32"))
    if not _is_float(into):
        return _elementwise(x, [kind], into, lambda a: _to_integer(a, into, rounding, x.parts))

    def to_float(a: Array) -> Array:
        a = ROUNDED[rounding](a) if rounding in ROUNDED else a
        a = np.clip(np.nan_to_num(a), 0, 1) if "sat" in x.parts else a
        return a.astype(np.float64 if into == "f64" else np.float32)

    return _elementwise(x, [kind], into, to_float)


def _to_integer(a: Array, into: str, rounding: str | None, parts: tuple[str, ...]) -> Array:
    dtype = (SIGNED if into[0] == "s" else UNSIGNED)[width_of(into)]
    limits = np.iinfo(dtype)
    if a.dtype.kind == "f":
        whole = ROUNDED[rounding or "rzi"](np.nan_to_num(a.astype(TWO), posinf=1e30, neginf=-1e30))
        inside = np.clip(whole, limits.min, limits.max)
        top = whole >= float(limits.max)
        return np.where(top, dtype(limits.max), np.where(top, 0, inside).astype(dtype))
    if "sat" in parts:
        given = np.iinfo(a.dtype)
        low, high = max(limits.min, given.min), min(limits.max, given.max)
        return np.clip(a, a.dtype.type(low), a.dtype.type(high)).astype(dtype)
    return a.astype(dtype)


def _to_tf32(a: Array) -> Array:
    """To nearest, ties away: 10 bits of mantissa are kept."""
    raw = np.ascontiguousarray(a, dtype=np.float32).view(np.uint32)
    return read((raw + np.uint32(0x1000)) & np.uint32(0xFFFFE000), "f32")
