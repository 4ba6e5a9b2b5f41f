"""Layers of a chunk in fewer bytes: without loss, or as codes of the project's own kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import zstandard

from lmc.model.layout import KVLayout, bytes_of

if TYPE_CHECKING:
    import torch

    from lmc.kernels.quantize import Quantised

# The order is that of the codes in files: append only.
CODECS = ("none", "zstd", "shuffle_zstd", "int8", "int4", "fp8")
LOSSY = ("int8", "int4", "fp8")
LEVEL = 1  # of zstd: the only one that keeps up with a disk


def check_name(codec: str) -> None:
    """Raise ValueError for an unknown codec."""
    if codec not in CODECS:
        raise ValueError(f"compression: got {codec!r}, valid: {', '.join(CODECS)}")


def check_codec(codec: str, layout: KVLayout) -> None:
    """Raise ValueError for an unknown codec, or one that cannot take chunks of this layout."""
    check_name(codec)
    if codec == "int4" and layout.D % 2:
        raise ValueError(f"compression int4 needs an even head dim, got D={layout.D}")


def bound(codec: str, T: int, layout: KVLayout) -> int:
    """Most bytes of a section of T tokens, S = 2: what a reader allows before it allocates."""
    if codec in LOSSY:
        return sum(_code_sizes(codec, T, layout))
    raw = 2 * T * _row(layout)
    # zstd's own bound for what does not shrink, in round numbers.
    return raw if codec == "none" else raw + raw // 128 + 1024


def encode(codec: str, layer: np.ndarray, layout: KVLayout) -> bytes:
    """The section of one layer, uint8 `[S, T, R]`; S = 2, and any number where no value is lost.

    Of a codec that quantises it is the codes `[2, T, G, D]` (int4: two a byte), then the scales of
    K, fp32 `[G, D]`, and of V, fp32 `[T, G]`.

    Raises:
        ValueError: another shape; for a codec that quantises, values that are not finite or so
            near the end of fp32 that they would not be when they come back.
    """
    _check_shape(codec, layer, layout)
    layer = np.ascontiguousarray(layer)
    if codec == "none":
        return layer.tobytes()
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=LEVEL).compress(layer.data)
    if codec == "shuffle_zstd":
        return _frame(np.ascontiguousarray(layer.reshape(-1, _element(layout)).T))
    from lmc.kernels.quantize import FORMATS, quantize_reference

    q = quantize_reference(_chunk(layer, layout), codec)
    # Looking at every value would take longer than all of this; what is not finite shows in the
    # scale of its channel or row, as does what would overflow when it comes back. The reference,
    # since Triton's maximum, interpreted or not, may pass over a NaN.
    largest = FORMATS[codec][1]
    if not all(bool((scale * largest).isfinite().all()) for scale in (q.k_scale, q.v_scale)):
        raise ValueError(f"got values that are not finite, or nearly so: {codec} has no such codes")
    return b"".join(_uint8(x).data for x in (q.codes, q.k_scale, q.v_scale))


def decode(codec: str, section: memoryview, out: np.ndarray, layout: KVLayout) -> None:
    """Write a section into `out`, uint8 `[S, T, R]`, which may be strided but in its last axis.

    Raises:
        ValueError: bytes that are no section of this codec and shape; `out` is as it was.
    """
    _check_shape(codec, out, layout)
    T = out.shape[1]
    if codec in ("zstd", "shuffle_zstd"):
        if len(section) > bound(codec, T, layout):
            raise ValueError(f"got a section of {len(section)} bytes, too many for {out.shape}")
        data = np.frombuffer(_decompressed(section, out.size), np.uint8)
        if codec == "shuffle_zstd":
            planes = data.reshape(_element(layout), -1)
            data = np.empty(planes.T.shape, np.uint8)
            # Plane by plane: numpy's own transpose takes four times as long here.
            for i, plane in enumerate(planes):
                data[:, i] = plane
        out[...] = data.reshape(out.shape)
        return
    want = out.size if codec == "none" else bound(codec, T, layout)
    if len(section) != want:
        raise ValueError(f"got a section of {len(section)} bytes, want {want} as {codec}")
    if codec == "none":
        out[...] = np.frombuffer(section, np.uint8).reshape(out.shape)
    else:
        from lmc.kernels.dequantize import dequantize_reference

        chunk = dequantize_reference(_quantised(codec, section, T, layout))
        out[...] = _uint8(chunk).reshape(out.shape)


def error(codec: str, layer: np.ndarray, section: bytes, layout: KVLayout) -> float:
    """Relative RMS error of a section, `||decoded - layer|| / ||layer||`."""
    if codec not in LOSSY:
        return 0.0
    decoded = np.empty(layer.shape, np.uint8)
    decode(codec, memoryview(section), decoded, layout)
    a, b = (_chunk(np.ascontiguousarray(x), layout).double() for x in (layer, decoded))
    norm = float(a.norm())
    return float((a - b).norm()) / norm if norm else 0.0


def _element(layout: KVLayout) -> int:
    return bytes_of(layout.dtype)


def _row(layout: KVLayout) -> int:
    """R, the bytes of K or of V of a token in one layer."""
    return layout.G * layout.D * _element(layout)


def _check_shape(codec: str, rows: np.ndarray, layout: KVLayout) -> None:
    check_codec(codec, layout)
    R = _row(layout)
    known = rows.dtype == np.uint8 and rows.ndim == 3 and rows.shape[2] == R
    if not known or (codec in LOSSY and rows.shape[0] != 2):
        S = 2 if codec in LOSSY else "S"
        raise ValueError(f"{codec} is of uint8 [{S}, T, {R}], got {rows.dtype} {list(rows.shape)}")


def _code_sizes(codec: str, T: int, layout: KVLayout) -> tuple[int, int, int]:
    """Bytes of codes, K's scales and V's."""
    values = 2 * T * layout.G * layout.D
    codes = values // 2 if codec == "int4" else values
    return codes, 4 * layout.G * layout.D, 4 * T * layout.G


def _frame(planes: np.ndarray) -> bytes:
    """One zstd frame of uint8 `[b, elements]`."""
    frame = zstandard.ZstdCompressor(level=LEVEL).compressobj(size=planes.size)
    parts = []
    for plane in planes:
        # A block has one table of symbols: one that held exponents and noise would not shrink.
        parts += [frame.compress(plane.data), frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*parts, frame.flush()])


def _decompressed(section: memoryview, size: int) -> bytes:
    try:
        # A frame says how much it holds: it is believed only where that is what is wanted.
        if zstandard.frame_content_size(section) != size:
            raise ValueError(f"got a zstd frame that does not hold {size} bytes")
        return zstandard.ZstdDecompressor().decompress(section, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise ValueError(f"got what zstd cannot read: {e}") from e


def _chunk(layer: np.ndarray, layout: KVLayout) -> torch.Tensor:
    """A layer as a chunk `[1, 2, T, G, D]` of its own type; no copy."""
    import torch

    flat = torch.from_numpy(layer.reshape(-1)).view(getattr(torch, layout.dtype))
    return flat.view(1, 2, -1, layout.G, layout.D)


def _uint8(x: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor, uint8 `[bytes]`; no copy."""
    import torch

    return x.view(-1).view(torch.uint8).numpy()


def _quantised(codec: str, section: memoryview, T: int, layout: KVLayout) -> Quantised:
    """Codes and scales of a section of the right length."""
    import torch

    from lmc.kernels.quantize import FORMATS, Quantised

    G, D = layout.G, layout.D
    W = D // 2 if codec == "int4" else D
    # Copies: a section may be read-only, and its scales lie at any offset.
    first, second, third = _code_sizes(codec, T, layout)
    codes = np.frombuffer(section, np.uint8, first).copy()
    k_scale = np.frombuffer(section, "<f4", second // 4, first).copy()
    v_scale = np.frombuffer(section, "<f4", third // 4, first + second).copy()
    return Quantised(
        torch.from_numpy(codes).view(FORMATS[codec][0]).view(1, 2, T, G, W),
        torch.from_numpy(k_scale).view(1, G, D),
        torch.from_numpy(v_scale).view(1, T, G),
        getattr(torch, layout.dtype),
    )
