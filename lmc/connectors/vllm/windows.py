"""Rows in the midst of a claim, in layers for which vLLM keeps the last window of it alone.

vLLM's own forward needs no more, and so gives layers with windows no pages for what lies further
back in a claim. Rows that are recomputed there attend in pages of lmc's own, one layer at a time:
before a layer's rows are computed, all that they see is put there out of host memory. Of the rows
themselves those that vLLM has pages for are written into these too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lmc.connectors.vllm.groups import Groups
from lmc.connectors.vllm.layouts import blank_pages, page_slots_of, views_of
from lmc.connectors.vllm.loading import Placement, Target
from lmc.connectors.vllm.messages import ChunkLoad, Claim
from lmc.connectors.vllm.rows import Place
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedKV
from lmc.kernels.scatter import scatter
from lmc.store.extents import Run
from lmc.store.memory import HostMemory


def scratch_pages(groups: Groups, nbytes: int, max_model_len: int) -> int:
    """How many pages of one layer there are for windows, in `nbytes`: no more than a prompt has.

    Raises:
        ValueError: too few for one row and what it sees.
    """
    P, longest = groups.block_size, groups.longest
    page_bytes = int(groups.specs[0].page_size_bytes)
    pages, least = nbytes // page_bytes, -(-longest // P) + 3
    if pages < least:
        raise ValueError(
            f"window_bytes is {nbytes}, too little for a row and its window of {longest:,} tokens; "
            f"allowed: at least {least * page_bytes}"
        )
    return int(min(pages, max(least, -(-max_model_len // P))))


class Scratch:
    """Pages of one layer, beside vLLM's. Claims that are served together each take some.

    Args:
        layer: any attention layer, for their layout.
        pages: how many.
    """

    def __init__(self, layer: torch.nn.Module, groups: Groups, pages: int) -> None:
        cache = blank_pages(layer, pages + 1)  # the first one stands for none
        k, v = views_of(layer, cache)
        self.groups, self.pages = groups, pages
        self.place = Place(cache, PagedKV((k,), (v,)))
        L = len(groups.of)
        self.as_layers = PagedKV((k,) * L, (v,) * L)
        self._taken = 0

    def clear(self) -> None:
        """Nobody needs what is in them any more."""
        self._taken = 0

    def most(self, claim: Claim) -> int:
        """How many pages rows of a claim see at most, its suffix included."""
        P = self.groups.block_size
        return -(-len(claim.tokens) // P) - max(0, claim.start - self.groups.longest) // P

    def segments(self, claim: Claim) -> list[np.ndarray]:
        """All rows of a claim in parts, each of which fits with what it sees; mostly it is one."""
        n = self.pages - -(-self.groups.longest // self.groups.block_size) - 1
        n *= self.groups.block_size
        rows = np.arange(claim.start, claim.end, dtype=np.int64)
        return [rows[i : i + n] for i in range(0, len(rows), n)]

    def take(self, n: int) -> np.ndarray:
        """Ids of n pages; RuntimeError where so many are not left."""
        if self._taken + n > self.pages:
            raise RuntimeError(
                f"rows see {n} pages of a layer with a window, {self.pages - self._taken} of "
                f"{self.pages} are left (window_bytes)"
            )
        self._taken += n
        return np.arange(self._taken - n, self._taken, dtype=np.int64) + 1


class Windows:
    """What rows of one claim see in layers with windows.

    Args:
        target: of the claim: vLLM's pages.
        held: chunks of it that are in `memory`.
        rows: `[M]` that may be computed, at least one.
        front: what computed the rows in front of these, where it is not vLLM.
        followed: whether this is in front of others.

    Attributes:
        blocks: the scratch pages of the request, by block of it; 0 where its rows see nothing.
        nbytes: loaded so far.
    """

    def __init__(
        self,
        scratch: Scratch,
        target: Target,
        claim: Claim,
        held: Sequence[tuple[ChunkLoad, list[Run]]],
        memory: HostMemory,
        rows: np.ndarray,
        front: Windows | None = None,
        followed: bool = False,
    ) -> None:
        groups, P = scratch.groups, scratch.groups.block_size
        seen = np.zeros(-(-max(int(rows[-1]) + 1, claim.end) // P) + 1, np.int64)
        np.add.at(seen, np.maximum(rows - groups.longest + 1, 0) // P, 1)
        np.add.at(seen, rows // P + 1, -1)
        self.blocks = (np.cumsum(seen) > 0).astype(np.int64)[:-1]
        self.blocks[self.blocks > 0] = scratch.take(int(self.blocks.sum()))
        self.scratch, self.nbytes = scratch, 0
        self._own = target.pages
        self._filled = -1
        self._last = np.arange(max(0, int(rows[-1]) + 2 - groups.longest), int(rows[-1]) + 1)
        self._kept: dict[int, torch.Tensor] = {}  # by layer, the last rows
        self._known, self._followed = front, followed
        of_claim = Target([self.blocks], scratch.as_layers, target.rope)
        self._placement = Placement(held, memory, of_claim) if held else None
        self._front = [self._before(claim, group) for group in range(len(groups.specs))]

    def fill(self, layer: int) -> None:
        """Put there what rows see in a layer, if it has a window, once until another one is asked.

        What is computed of it is written over what is put here.
        """
        group = self.scratch.groups.of[layer]
        if layer == self._filled or not self.scratch.groups.window(group):
            return
        self.keep()
        self._filled = layer
        if self._known is not None:
            slots = self._slots(self._known._last)
            scatter(self._known._kept[layer], self.scratch.place.pages, slots)
        if self._placement is not None:
            self.nbytes += self._placement.put((layer, layer + 1))
        if self._known is None and (front := self._front[group]) is not None:
            own = self._own.some(layer, layer + 1)
            scatter(gather(own, front[0]), self.scratch.place.pages, front[1])

    def keep(self) -> None:
        """The rows of the layer that is here are computed; the last are kept for who follows."""
        if self._followed and self._filled >= 0:
            pages, slots = self.scratch.place.pages, self._slots(self._last)
            self._kept[self._filled] = gather(pages, slots)

    def _slots(self, rows: np.ndarray) -> torch.Tensor:
        P, device = self.scratch.groups.block_size, self._own.device
        return page_slots_of(rows, self.blocks, P, device)

    def _before(self, claim: Claim, group: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where the last rows in front of the claim lie in vLLM's pages, and where they go."""
        P, device = self.scratch.groups.block_size, self._own.device
        blocks = claim.front[group] if claim.front else []
        if not blocks:
            return None
        table = np.zeros(claim.start // P, np.int64)
        table[len(table) - len(blocks) :] = blocks
        rows = np.arange(claim.start - len(blocks) * P, claim.start)
        rows = rows[self.blocks[rows // P] > 0]
        return page_slots_of(rows, table, P, device), self._slots(rows)
