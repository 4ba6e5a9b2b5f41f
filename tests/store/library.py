"""A store as a library has it, and what tests save in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmc.model.layout import KVLayout
from lmc.store.store import Store

LAYOUT = KVLayout(L=3, G=2, D=16, dtype="float32")
TOKENS = np.random.default_rng(0).integers(0, 9999, 400)
SPANS = [(0, 100), (100, 250), (250, 400)]


def kv(seed: int, T: int) -> torch.Tensor:
    return torch.randn(LAYOUT.shape(T), generator=torch.Generator().manual_seed(seed))


def store(path: Path | None = None, *, memory_bytes: int = 1 << 20, namespace: bytes = b"model",
          **fields: Any) -> Store:  # fmt: skip
    tiers = [{"name": "disk", "path": str(path), "capacity": "16MiB", **fields}] if path else []
    return Store(LAYOUT, namespace, memory_bytes=memory_bytes, tiers=tiers)
