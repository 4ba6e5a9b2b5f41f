"""The stored form of KV: one chunk buffer `[L, 2, T, G, D]`, whatever pages the engine uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class KVLayout:
    """Shape and element type of the KV of one token, of one rank.

    Attributes:
        L: layers; G: kv heads on this rank; D: head dim.
        dtype: one of float32, float16, bfloat16.

    Raises:
        ValueError: a dtype whose KV cannot be stored.
    """

    L: int
    G: int
    D: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in _BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not supported: one of {sorted(_BYTES)}")

    @property
    def bytes_per_token(self) -> int:
        """2 · L · G · D · b bytes."""
        return 2 * self.L * self.G * self.D * _BYTES[self.dtype]

    def shape(self, T: int) -> tuple[int, int, int, int, int]:
        """Shape `[L, 2, T, G, D]` of a chunk buffer of T tokens; axis 1 is K, then V."""
        return (self.L, 2, T, self.G, self.D)


@dataclass(frozen=True)
class PrefillCost:
    """FLOPs of one row through all layers: `linear + attention · keys`.

    Attributes:
        linear: FLOPs of the projections and the MLP, per row.
        attention: FLOPs of QK and PV, per row and key attended to.
    """

    linear: float
    attention: float

    def fraction(self, computed: Sequence[tuple[int, int, float]], T: int) -> float:
        """Share of the FLOPs of a full prefill of T tokens that runs of rows cost.

        computed: `(start, end, share)`: rows `[start, end)`, of whose layers a share is computed.
        """
        total = self.flops(0, T)
        return sum(share * self.flops(start, end) for start, end, share in computed) / total

    def flops(self, start: int, end: int) -> float:
        """FLOPs of rows `[start, end)`, each of which attends to itself and all before it."""
        # A row at position p attends to p + 1 keys; the sum over rows is closed form.
        keys = (end * (end + 1) - start * (start + 1)) / 2
        return self.linear * (end - start) + self.attention * keys
