"""The disk tier as a config names it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmc.model.layout import KVLayout
from lmc.sizes import parse_bytes
from lmc.store.compress import check_name
from lmc.store.disk.tier import Disk
from lmc.store.sections import Heads


@dataclass(frozen=True)
class DiskConfig:
    """Chunks in a folder that outlives the engine and may be shared by several.

    Attributes:
        path: the folder, made when missing; `~` is the user's home.
        capacity: bytes of its files, as a number or such as `100GiB`.
        write: `through` when a chunk is stored, `back` when host memory lets it go.
        compression: none, zstd, shuffle_zstd (lossless), int8, int4 or fp8.
        policy: which chunk goes when the folder is full, one of `lmc.policies.POLICIES`.
    """

    path: str
    capacity: int | str
    write: Literal["through", "back"] = "through"
    compression: str = "none"
    policy: dict[str, Any] | str = "lru"

    def __post_init__(self) -> None:
        try:
            parse_bytes(self.capacity)
        except ValueError as e:
            raise ValueError(f"capacity: {e}") from e
        check_name(self.compression)

    def open(
        self,
        layout: KVLayout,
        *,
        heads: Heads | None = None,
        exact_variants: int = 2,
        label: str = "",
    ) -> Disk:
        """The tier; raises as `Disk` does."""
        return Disk(
            Path(self.path).expanduser(),
            parse_bytes(self.capacity),
            layout=layout,
            heads=heads,
            compression=self.compression,
            policy=self.policy,
            exact_variants=exact_variants,
            label=label,
        )
