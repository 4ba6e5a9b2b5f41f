"""The stored form of KV: one chunk buffer `[L, 2, T, G, D]`, whatever pages the engine uses.

Latents of MLA, which are key and value at once, are `[L, 1, T, 1, D]`.
"""

from __future__ import annotations

from dataclasses import dataclass

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def bytes_of(dtype: str) -> int:
    """b, the bytes of an element; KeyError for a dtype whose KV cannot be stored."""
    return _BYTES[dtype]


@dataclass(frozen=True)
class KVLayout:
    """Shape and element type of the KV of one token, of one rank.

    Attributes:
        L: layers; G: kv heads on this rank; D: head dim.
        dtype: one of float32, float16, bfloat16.
        sides: 2, K and V; 1 where they are the same memory: latents, of which a token has one head.

    Raises:
        ValueError: a dtype whose KV cannot be stored.
    """

    L: int
    G: int
    D: int
    dtype: str
    sides: int = 2

    def __post_init__(self) -> None:
        if self.dtype not in _BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not supported: one of {sorted(_BYTES)}")

    @property
    def bytes_per_token(self) -> int:
        """2 · L · G · D · b bytes; half of it of latents."""
        return self.sides * self.L * self.G * self.D * _BYTES[self.dtype]

    def shape(self, T: int) -> tuple[int, int, int, int, int]:
        """Shape `[L, 2, T, G, D]` of a chunk buffer of T tokens; axis 1 is K, then V."""
        return (self.L, self.sides, T, self.G, self.D)
