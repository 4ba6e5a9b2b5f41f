"""Layers of a chunk in fewer bytes: without loss, or as codes of the project's own kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import zstandard

from lmc.layout import KVLayout

if TYPE_CHECKING:
    import torch

    from lmc.kernels.quantize import Quantised

# The order is that of the codes in files: append only.
CODECS = ("none", "zstd", "shuffle_zstd", "int8", "int4", "fp8")
LEVEL = 1  # of zstd: the only one that keeps up with a disk


def check_codec(codec: str, layout: KVLayout) -> None:
    """Raise ValueError for an unknown codec, or one that cannot take chunks of this layout."""
    if codec not in CODECS:
        raise ValueError(f"compression: got {codec!r}, valid: {', '.join(CODECS)}")
    if codec == "int4" and layout.D % 2:
        raise ValueError(f"compression int4 needs an even head dim, got D={layout.D}")


def bound(codec: str, T: int, layout: KVLayout) -> int:
    """Most bytes of a section of T tokens, S = 2: what a reader allows before it allocates."""
    raw = _raw(T, layout)
    if codec in ("none", "zstd", "shuffle_zstd"):
        # zstd's own bound for what does not shrink, in round numbers.
        return raw if codec == "none" else raw + raw // 128 + 1024
    return sum(_code_sizes(codec, T, layout))


def encode(codec: str, layer: np.ndarray, layout: KVLayout) -> bytes:
    """The section of one layer, uint8 `[S, T, R]`.

    Raises:
        ValueError: values that are not finite, for a codec that quantises.
    """
    layer = np.ascontiguousarray(layer)
    if codec == "none":
        return layer.tobytes()
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=LEVEL).compress(layer.data)
    if codec == "shuffle_zstd":
        planes = np.ascontiguousarray(layer.reshape(-1, _element(layout)).T)
        return zstandard.ZstdCompressor(level=LEVEL).compress(planes.data)
    from lmc.kernels.quantize import quantize

    chunk = _chunk(layer, layout)
    if not bool(chunk.isfinite().all()):
        raise ValueError(f"got values that are not finite, which {codec} cannot stand for")
    q = quantize(chunk, codec)
    return b"".join(_bytes(x) for x in (q.codes, q.k_scale, q.v_scale))


def decode(codec: str, section: memoryview, out: np.ndarray, layout: KVLayout) -> None:
    """Write a section into `out`, uint8 `[S, T, R]`, which may be strided but in its last axis.

    Raises:
        ValueError: bytes that are no section of this codec and shape.
    """
    if len(section) > bound(codec, out.shape[1], layout):
        raise ValueError(f"got a section of {len(section)} bytes, too many for {out.shape}")
    if codec == "none":
        if len(section) != out.size:
            raise ValueError(f"got a section of {len(section)} bytes, want {out.size}")
        out[...] = np.frombuffer(section, np.uint8).reshape(out.shape)
    elif codec in ("zstd", "shuffle_zstd"):
        data = np.frombuffer(_decompressed(section, out.size), np.uint8)
        if codec == "shuffle_zstd":
            data = np.ascontiguousarray(data.reshape(_element(layout), -1).T)
        out[...] = data.reshape(out.shape)
    else:
        from lmc.kernels.dequantize import dequantize

        chunk = dequantize(_quantised(codec, section, out.shape[1], layout))
        out[...] = _rows(chunk).reshape(out.shape)


def error(codec: str, layer: np.ndarray, section: bytes, layout: KVLayout) -> float:
    """Relative RMS error of a section, `||decoded - layer|| / ||layer||`."""
    if codec in ("none", "zstd", "shuffle_zstd"):
        return 0.0
    decoded = np.empty(layer.shape, np.uint8)
    decode(codec, memoryview(section), decoded, layout)
    a, b = (_chunk(np.ascontiguousarray(x), layout).double() for x in (layer, decoded))
    norm = float(a.norm())
    return float((a - b).norm()) / norm if norm else 0.0


def _element(layout: KVLayout) -> int:
    return layout.bytes_per_token // (2 * layout.L * layout.G * layout.D)


def _raw(T: int, layout: KVLayout) -> int:
    return layout.bytes_per_token // layout.L * T


def _code_sizes(codec: str, T: int, layout: KVLayout) -> tuple[int, int, int]:
    """Bytes of codes, K's scales and V's."""
    values = 2 * T * layout.G * layout.D
    codes = values // 2 if codec == "int4" else values
    return codes, 4 * layout.G * layout.D, 4 * T * layout.G


def _decompressed(section: memoryview, size: int) -> bytes:
    try:
        # A frame says how much it holds: it is believed only where that is what is wanted.
        if zstandard.frame_content_size(section) != size:
            raise ValueError(f"got a zstd frame that does not hold {size} bytes")
        data = zstandard.ZstdDecompressor().decompress(section, max_output_size=size)
    except zstandard.ZstdError as e:
        raise ValueError(f"got what zstd cannot read: {e}") from e
    if len(data) != size:
        raise ValueError(f"got {len(data)} bytes out of zstd, want {size}")
    return data


def _chunk(layer: np.ndarray, layout: KVLayout) -> torch.Tensor:
    """A layer as a chunk `[1, 2, T, G, D]` of its own type; no copy."""
    import torch

    flat = torch.from_numpy(layer.reshape(-1)).view(getattr(torch, layout.dtype))
    return flat.view(1, 2, -1, layout.G, layout.D)


def _rows(chunk: torch.Tensor) -> np.ndarray:
    import torch

    return chunk.contiguous().view(-1).view(torch.uint8).numpy()


def _bytes(x: torch.Tensor) -> bytes:
    import torch

    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _quantised(codec: str, section: memoryview, T: int, layout: KVLayout) -> Quantised:
    import torch

    from lmc.kernels.quantize import FORMATS, Quantised

    sizes = _code_sizes(codec, T, layout)
    if len(section) != sum(sizes):
        raise ValueError(f"got a section of {len(section)} bytes, want {sum(sizes)} as {codec}")
    data = torch.from_numpy(np.frombuffer(section, np.uint8).copy())
    codes, k_scale, v_scale = data.split(list(sizes))
    G, D = layout.G, layout.D
    W = D // 2 if codec == "int4" else D
    return Quantised(
        codes.view(FORMATS[codec][0]).view(1, 2, T, G, W),
        k_scale.view(torch.float32).view(1, G, D),
        v_scale.view(torch.float32).view(1, T, G),
        getattr(torch, layout.dtype),
    )
