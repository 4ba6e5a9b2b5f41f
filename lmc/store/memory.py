"""Host memory: the bytes of chunks by slot, on one worker."""

from __future__ import annotations

import threading

import torch

from lmc.layout import KVLayout


class HostMemory:
    """Chunk buffers `[L, 2, T, G, D]` in host memory, pinned when there is a GPU.

    Which chunks are held, and how many bytes of them, is the Index's decision; `capacity` is
    checked here only so that a fault there cannot eat the machine's memory.

    Args:
        layout: shape of one token.
        capacity: bytes.
    """

    def __init__(self, layout: KVLayout, capacity: int) -> None:
        self.layout = layout
        self.capacity = capacity
        self.size = 0
        self._dtype = getattr(torch, layout.dtype)
        self._buffers: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def allocate(self, T: int) -> torch.Tensor:
        """An uninitialised buffer of T tokens, not yet counted."""
        pinned = torch.cuda.is_available()
        return torch.empty(self.layout.shape(T), dtype=self._dtype, pin_memory=pinned)

    def put(self, slot: int, chunk: torch.Tensor) -> bool:
        """Keep `chunk` under `slot`; False when it does not fit."""
        with self._lock:
            if self.size + chunk.nbytes > self.capacity:
                return False
            self._buffers[slot] = chunk
            self.size += chunk.nbytes
            return True

    def get(self, slot: int) -> torch.Tensor | None:
        """The chunk under `slot`, or None when it is not held."""
        with self._lock:
            return self._buffers.get(slot)

    def evict(self, slot: int) -> None:
        """Let go of `slot`; one that is not held is no error."""
        with self._lock:
            chunk = self._buffers.pop(slot, None)
            if chunk is not None:
                self.size -= chunk.nbytes
