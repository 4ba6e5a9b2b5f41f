"""Sections of a layer: round trips, errors, and bytes that are none."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lmc.kernels.dequantize import dequantize
from lmc.kernels.quantize import Quantised, quantize
from lmc.model.layout import KVLayout
from lmc.store.compress import CODECS, bound, check_codec, decode, encode, error

LOSSLESS = ["none", "zstd", "shuffle_zstd"]
QUANTISED = ["int8", "int4", "fp8"]
POISON = 0xA5
# Rounding to this type errs by at most this share of a number, or by half its smallest one.
ROUNDING = {"float32": (2**-24, 0.0), "float16": (2**-11, 2**-25), "bfloat16": (2**-8, 0.0)}

layouts = st.builds(
    KVLayout,
    L=st.integers(1, 3),
    G=st.integers(1, 3),
    D=st.integers(1, 8).map(lambda n: 2 * n),
    dtype=st.sampled_from(sorted(ROUNDING)),
)
lengths = st.integers(1, 40)


def row(layout: KVLayout) -> int:
    return layout.bytes_per_token // (2 * layout.L)


def tensor(layer: np.ndarray, layout: KVLayout) -> torch.Tensor:
    """Rows as a chunk `[1, 2, T, G, D]`."""
    flat = torch.from_numpy(layer.copy()).view(getattr(torch, layout.dtype))
    return flat.view(1, 2, -1, layout.G, layout.D)


def finite(T: int, layout: KVLayout, seed: int, spread: float = 1.0) -> np.ndarray:
    """A layer `[2, T, R]` whose channels differ in size by up to `10 ** spread`."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.rand(layout.G, layout.D, generator=random) * 2 - 1
    x = torch.randn(2, T, layout.G, layout.D, generator=random) * 10 ** (spread * sizes)
    rows = x.to(getattr(torch, layout.dtype)).reshape(2, T, -1).view(torch.uint8)
    return rows.numpy()


def noise(S: int, T: int, layout: KVLayout, seed: int) -> np.ndarray:
    """Any bytes, so NaNs of every payload, infinities and denormals among them."""
    return np.random.default_rng(seed).integers(0, 256, (S, T, row(layout)), dtype=np.uint8)


def guarded(S: int, T: int, layout: KVLayout) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[S, T, R]` inside poison, strided along S and T, and all that is around them."""
    whole = np.full((S + 2, T + 3, row(layout) + 5), POISON, np.uint8)
    return whole[1:-1, 1:-2, 2:-3], whole


def untouched(out: np.ndarray, whole: np.ndarray) -> bool:
    """Whether all around `out` is still poison."""
    rest = whole.copy()
    rest[1:-1, 1:-2, 2:-3] = POISON
    return bool((rest == POISON).all())


def decoded(codec: str, section: bytes, T: int, layout: KVLayout, S: int = 2) -> np.ndarray:
    out, whole = guarded(S, T, layout)
    decode(codec, memoryview(section), out, layout)
    assert untouched(out, whole)
    return out


@pytest.mark.parametrize("codec", LOSSLESS)
@given(layout=layouts, T=lengths, S=st.integers(1, 2), seed=st.integers(0, 2**32), data=st.data())
def test_lossless_codecs_give_back_every_bit(
    codec: str, layout: KVLayout, T: int, S: int, seed: int, data: st.DataObject
) -> None:
    layer = noise(S, T, layout, seed)
    kind = data.draw(st.sampled_from(["noise", "zeros", "values"]))
    if kind == "zeros":
        layer[...] = 0
    elif kind == "values":
        layer = finite(T, layout, seed)[:S]
    section = encode(codec, layer, layout)
    assert len(section) <= bound(codec, T, layout)
    assert np.array_equal(decoded(codec, section, T, layout, S), layer)
    assert error(codec, layer, section, layout) == 0.0


@pytest.mark.parametrize("codec", LOSSLESS)
@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("float32", [0x7F800001, 0xFFC12345, 0x7F800000, 0x00000001, 0x807FFFFF, 0x80000000]),
        ("float16", [0x7C01, 0xFE55, 0x7C00, 0x0001, 0x83FF, 0x8000]),
        ("bfloat16", [0x7F81, 0xFFC5, 0x7F80, 0x0001, 0x807F, 0x8000]),
    ],
)
def test_nan_payloads_and_denormals_stay(codec: str, dtype: str, words: list[int]) -> None:
    """A signalling and a quiet NaN, infinity, both ends of the denormals, and minus zero."""
    layout = KVLayout(L=1, G=1, D=6, dtype=dtype)
    kind = np.uint32 if dtype == "float32" else np.uint16
    layer = np.tile(np.array(words, kind), (2, 3, 1)).view(np.uint8)
    assert np.array_equal(decoded(codec, encode(codec, layer, layout), 3, layout), layer)


@pytest.mark.parametrize("codec", CODECS)
def test_a_layer_may_lie_anywhere(codec: str) -> None:
    layout = KVLayout(L=2, G=2, D=8, dtype="float32")
    layer = finite(7, layout, 0)
    strided, _ = guarded(2, 7, layout)
    strided[...] = layer
    assert encode(codec, strided, layout) == encode(codec, layer, layout)


@pytest.mark.parametrize("codec", QUANTISED)
@given(layout=layouts, T=lengths, seed=st.integers(0, 2**32), spread=st.sampled_from([0.0, 1.0]))
def test_quantised_sections_are_the_kernels(
    codec: str, layout: KVLayout, T: int, seed: int, spread: float
) -> None:
    """The same values as the kernel's, each within half a step, and the same error."""
    layer = finite(T, layout, seed, spread)
    section = encode(codec, layer, layout)
    assert len(section) == bound(codec, T, layout)
    out = decoded(codec, section, T, layout)
    chunk = tensor(layer, layout)
    q = quantize(chunk, codec)
    want, got = dequantize(q), tensor(out, layout)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))

    x, y = chunk.double(), got.double()
    scale = torch.stack(
        torch.broadcast_tensors(q.k_scale[:, None], q.v_scale[..., None]), 1
    ).double()
    if codec == "fp8":  # e4m3: 4 significant bits down to 2**-6, then 2**-9 apart
        exponent = torch.frexp(x / scale).exponent - 1
        scale = scale * 2.0 ** (exponent.clamp(min=-6) - 3)
    half = scale / 2 * (1 + 2**-14)  # a step and a value are themselves rounded, to fp32
    share, least = ROUNDING[layout.dtype]
    assert ((x - y).abs() <= half + share * (x.abs() + half) + least).all()

    relative = float((x - want.double()).norm() / x.norm())
    assert error(codec, layer, section, layout) == pytest.approx(relative, rel=1e-12)


@pytest.mark.parametrize("codec", QUANTISED)
def test_a_section_is_codes_then_scales_of_k_then_of_v(codec: str) -> None:
    layout = KVLayout(L=4, G=3, D=10, dtype="bfloat16")
    layer = finite(7, layout, 1)
    q: Quantised = quantize(tensor(layer, layout), codec)
    want = b"".join(
        x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for x in (q.codes, q.k_scale, q.v_scale)
    )
    assert encode(codec, layer, layout) == want


@pytest.mark.parametrize("codec", QUANTISED)
def test_a_layer_of_zeros_has_no_error(codec: str) -> None:
    layout = KVLayout(L=1, G=1, D=2, dtype="float16")
    layer = np.zeros((2, 1, 4), np.uint8)
    section = encode(codec, layer, layout)
    assert not decoded(codec, section, 1, layout).any()
    assert error(codec, layer, section, layout) == 0.0


@pytest.mark.parametrize("codec", QUANTISED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", sorted(ROUNDING))
def test_what_is_not_finite_is_not_quantised(codec: str, value: float, dtype: str) -> None:
    layout = KVLayout(L=1, G=2, D=4, dtype=dtype)
    clean = torch.ones(2, 5, 8)
    for side, t, d in np.ndindex(2, 5, 8):
        x = clean.clone()
        x[side, t, d] = value
        layer = x.to(getattr(torch, dtype)).view(torch.uint8).numpy()
        with pytest.raises(ValueError, match=f"not finite.*{codec}"):
            encode(codec, layer, layout)


@pytest.mark.parametrize("codec", QUANTISED)
@pytest.mark.parametrize("dtype", sorted(ROUNDING))
def test_the_largest_values_come_back_finite_or_not_at_all(codec: str, dtype: str) -> None:
    """127 steps of the largest fp32 / 127 are infinite."""
    layout = KVLayout(L=1, G=1, D=2, dtype=dtype)
    kind = getattr(torch, dtype)
    layer = torch.full((2, 3, 2), torch.finfo(kind).max, dtype=kind).view(torch.uint8).numpy()
    if (codec, dtype) == ("int8", "float32"):
        with pytest.raises(ValueError, match="not finite, or nearly so"):
            encode(codec, layer, layout)
        return
    section = encode(codec, layer, layout)
    assert error(codec, layer, section, layout) < 1e-2


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.data(), layout=layouts, T=lengths, seed=st.integers(0, 2**32))
def test_bytes_that_are_no_section_are_refused_or_decoded_inside_out(
    codec: str, data: st.DataObject, layout: KVLayout, T: int, seed: int
) -> None:
    """Garbage, and true sections with bytes flipped, cut off or added."""
    section = bytearray(encode(codec, finite(T, layout, seed), layout))
    change = data.draw(st.sampled_from(["garbage", "right length", "flip", "cut", "add"]))
    if change == "garbage":
        section = bytearray(data.draw(st.binary(max_size=bound(codec, T, layout) + 8)))
    elif change == "right length":
        section = bytearray(np.random.default_rng(seed).bytes(len(section)))
    elif change == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            # The head of a zstd frame is where sizes are.
            last = data.draw(st.sampled_from([min(16, len(section)) - 1, len(section) - 1]))
            section[data.draw(st.integers(0, last))] ^= data.draw(st.integers(1, 255))
    elif change == "cut":
        del section[data.draw(st.integers(0, len(section) - 1)) :]
    else:
        section += data.draw(st.binary(min_size=1, max_size=64))
    out, whole = guarded(2, T, layout)
    try:
        decode(codec, memoryview(section), out, layout)
    except ValueError:
        assert (whole == POISON).all()
    else:
        assert change not in ("cut", "add")
        assert untouched(out, whole)


def frame(declared: int | None, blocks: int, window_log: int = 17) -> bytes:
    """A zstd frame (RFC 8878, 3.1.1) of `blocks` blocks that each stand for 128 KiB of zeros.

    declared: the content size that it states, in 8 bytes, or none.
    """
    head = b"\x28\xb5\x2f\xfd" + bytes([0 if declared is None else 0xC0, (window_log - 10) << 3])
    size = b"" if declared is None else declared.to_bytes(8, "little")
    # Last_Block, then Block_Type 1 (a byte repeated), then the size.
    run = [
        ((1 << 17) << 3 | 1 << 1 | (i == blocks - 1)).to_bytes(3, "little") for i in range(blocks)
    ]
    return head + size + b"".join(x + b"\0" for x in run)


BLOCK = 1 << 17
PLAIN = KVLayout(L=1, G=1, D=64, dtype="float32")  # 512 tokens are two blocks


def test_the_frames_of_these_tests_are_zstd() -> None:
    out = np.ones((2, 512, 256), np.uint8)
    decode("zstd", memoryview(frame(2 * BLOCK, 2)), out, PLAIN)
    assert not out.any()
    assert zstandard.ZstdDecompressor().decompress(frame(None, 2), 2 * BLOCK) == bytes(2 * BLOCK)


def with_little_memory(action: Callable[[], None]) -> None:
    """Run it with 64 MiB of address space to take."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the limit of a process's memory is set as on Linux")
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), before[1]))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


BOMBS = {
    "declares 1 GiB": frame(1 << 30, 256),
    "holds 1 GiB": frame(1 << 30, 1 << 13)[:4096],
    "declares nothing": frame(None, 2),
    "declares nothing, holds more": frame(None, 200),
    "declares what is wanted, holds more": frame(2 * BLOCK, 200),
    "declares what is wanted, holds less": frame(2 * BLOCK, 1),
    "declares what is wanted, window of 2 GiB": frame(2 * BLOCK, 200, window_log=31),
    "declares all there is": frame((1 << 64) - 3, 2),
    "two frames": 2 * frame(BLOCK, 1),
    "a frame and another": 2 * frame(2 * BLOCK, 2),
    "a frame to skip": b"\x50\x2a\x4d\x18" + (1 << 30).to_bytes(4, "little"),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("codec", ["zstd", "shuffle_zstd"])
def test_no_more_is_decompressed_than_was_asked_for(codec: str, bomb: bytes) -> None:
    out = np.full((2, 512, 256), POISON, np.uint8)
    assert len(bomb) <= bound(codec, 512, PLAIN)

    def refused() -> None:
        with pytest.raises(ValueError, match="zstd"):
            decode(codec, memoryview(bomb), out, PLAIN)

    with_little_memory(refused)
    assert (out == POISON).all()


def test_a_section_longer_than_any_is_not_looked_at() -> None:
    """zstd itself takes a frame of as many empty blocks as one likes."""
    whole = frame(2 * BLOCK, 2)
    empty = bytes(3) * (bound("zstd", 512, PLAIN) // 3)
    long = whole[:14] + empty + whole[14:]
    assert zstandard.ZstdDecompressor().decompress(long) == bytes(2 * BLOCK)
    with pytest.raises(ValueError, match="too many"):
        decode("zstd", memoryview(long), np.empty((2, 512, 256), np.uint8), PLAIN)


def test_the_limit_of_memory_would_stop_a_bomb() -> None:
    def explodes() -> None:
        with pytest.raises(MemoryError):
            zstandard.ZstdDecompressor().decompress(BOMBS["declares 1 GiB"])

    with_little_memory(explodes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_codec("gzip", PLAIN), "got 'gzip', valid: none, zstd, .*fp8"),
        (lambda: check_codec("int4", KVLayout(1, 1, 3, "float32")), "even head dim, got D=3"),
        (lambda: encode("gzip", np.zeros((2, 1, 256), np.uint8), PLAIN), "got 'gzip', valid"),
        (lambda: encode("zstd", np.zeros((2, 1, 255), np.uint8), PLAIN), r"\[S, T, 256\], got"),
        (lambda: encode("zstd", np.zeros((2, 256), np.uint8), PLAIN), r"got uint8 \[2, 256\]"),
        (lambda: encode("none", np.zeros((2, 1, 256), "f4"), PLAIN), "got float32"),
        (lambda: encode("int8", np.zeros((1, 2, 256), np.uint8), PLAIN), r"\[2, T, 256\], got"),
        (
            lambda: decode("fp8", memoryview(b""), np.zeros((1, 2, 256), np.uint8), PLAIN),
            r"fp8 is of uint8 \[2, T, 256\], got uint8 \[1, 2, 256\]",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_planes_are_compressed_apart() -> None:
    """Exponents that are nearly alike shrink although the bits below them are noise."""
    layout = KVLayout(L=1, G=2, D=64, dtype="bfloat16")
    layer = finite(64, layout, 0, spread=0.0)
    planes = np.ascontiguousarray(layer.reshape(-1, 2).T)
    apart = sum(len(zstandard.ZstdCompressor(level=1).compress(plane.data)) for plane in planes)
    together = len(zstandard.ZstdCompressor(level=1).compress(planes.data))
    assert len(encode("shuffle_zstd", layer, layout)) <= apart + 16 < together


def test_importing_it_brings_no_torch() -> None:
    code = (
        "import lmc.store.compress, sys; "
        "assert not {'torch', 'triton'} & sys.modules.keys(), sorted(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
