"""Chunks into the pages of a request: at once, or layer by layer while they still arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group

from lmc.connectors.vllm.layouts import page_slots_of
from lmc.connectors.vllm.messages import ChunkLoad
from lmc.kernels.paged import PagedKV
from lmc.kernels.scatter import scatter
from lmc.model.rope import Rope
from lmc.store.chunks import Arrival


class LostError(Exception):
    """A chunk did not arrive."""

    def __init__(self, load: ChunkLoad) -> None:
        super().__init__(f"the chunk of slot {load.slot} did not arrive")
        self.load = load


@dataclass(frozen=True, eq=False)
class Placement:
    """Where one chunk goes, and by how much its keys turn.

    Attributes:
        page_slots: of the chunk's rows, int64 [T]; -1 for those that are not wanted.
        cos, sin: of the rotation, or None.
    """

    load: ChunkLoad
    page_slots: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    interleaved: bool

    @property
    def tokens(self) -> int:
        """How many of its tokens are wanted."""
        return self.load.end - self.load.start

    def put(self, parts: Sequence[torch.Tensor], pages: PagedKV) -> None:
        """Rows `[L, 2, t, G, D]`, in parts along T, into pages of as many layers."""
        first = 0
        for part in parts:
            slots = self.page_slots[first : first + part.shape[2]]
            first += part.shape[2]
            scatter(part, pages, slots, self.cos, self.sin, interleaved=self.interleaved)


def placed(
    load: ChunkLoad, blocks: list[int], block_size: int, device: torch.device, rope: object
) -> Placement:
    """Where the tokens of `load` go in a request that owns `blocks`."""
    page_slots = torch.full((load.T,), -1, dtype=torch.int64, device=device)
    first = load.start - load.at
    wanted = np.arange(load.start, load.end, dtype=np.int64)
    page_slots[first : first + len(wanted)] = page_slots_of(wanted, blocks, block_size, device)
    cos = sin = None
    if load.delta:
        assert isinstance(rope, Rope)
        cos, sin = (torch.from_numpy(a).to(page_slots.device) for a in rope.angles(load.delta))
    return Placement(load, page_slots, cos, sin, isinstance(rope, Rope) and rope.interleaved)


class LayeredLoad:
    """Chunks on their way, each layer of which is put in place when it is first needed.

    Args:
        arriving: what comes, and where it goes.
        pages: of all layers.
        deadline: `time.monotonic()` at which what has not arrived is lost.
    """

    def __init__(
        self,
        arriving: Sequence[tuple[Arrival, Placement]],
        pages: PagedKV,
        deadline: float,
    ) -> None:
        self._arriving = arriving
        self._pages = pages
        self._deadline = deadline
        self._done = 0

    def until(self, layer: int) -> None:
        """Return when layers 0 to `layer` are in place; LostError if one will not come."""
        while self._done <= layer:
            for arrival, placement in self._arriving:
                if not arrival.wait(self._done + 1, self._deadline):
                    raise LostError(placement.load)
            # All that has come meanwhile at once: a launch a layer is dearer than one for many.
            end = min(arrival.layers for arrival, _ in self._arriving)
            some = slice(self._done, end)
            pages = PagedKV(k=self._pages.k[some], v=self._pages.v[some])
            for arrival, placement in self._arriving:
                assert arrival.parts is not None
                placement.put([part[some] for part in arrival.parts], pages)
            self._done = end

    def all(self) -> None:
        """Return when everything is in place."""
        self.until(self._pages.L - 1)


def on_any_rank(slots: list[int], failed: bool) -> tuple[set[int], bool]:
    """Slots that any tensor-parallel rank named, and whether any failed: all compute the same."""
    group = get_tp_group()
    if group.world_size == 1:
        return set(slots), failed
    said: list[tuple[list[int], bool]] = [([], False)] * group.world_size
    torch.distributed.all_gather_object(said, (slots, failed), group=group.cpu_group)
    return {slot for named, _ in said for slot in named}, any(f for _, f in said)
