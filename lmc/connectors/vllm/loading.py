"""Chunks into the pages of a request: at once, or layer by layer while they still arrive."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group

from lmc.connectors.vllm.groups import Groups
from lmc.connectors.vllm.layouts import flat_slots
from lmc.connectors.vllm.messages import ChunkLoad
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedKV
from lmc.kernels.scatter import scatter
from lmc.kernels.scatter_runs import scatter_runs
from lmc.model.rope import Rotations
from lmc.store.chunks import Arrival, Chunks
from lmc.store.extents import Run
from lmc.store.memory import HostMemory


class LostError(Exception):
    """A chunk did not arrive."""

    def __init__(self, load: ChunkLoad) -> None:
        super().__init__(f"the chunk of slot {load.slot} did not arrive")
        self.load = load


@dataclass(frozen=True, eq=False)
class Target:
    """Where a claim's chunks go.

    Attributes:
        blocks: the request's block ids, int64, in order, by KV cache group.
        pages: of all layers.
        rope: how keys turn; where they cannot, why.
        groups: which layers are of which group; None: there is one.
    """

    blocks: Sequence[np.ndarray]
    pages: PagedKV
    rope: Rotations | str
    groups: Groups | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """Which chunks of a claim are there.

    Attributes:
        held: in host memory, and in which runs of it.
        arriving: on their way, to be put in place layer by layer.
        missing: neither.
    """

    held: list[tuple[ChunkLoad, list[Run]]]
    arriving: list[tuple[ChunkLoad, Arrival]]
    missing: list[ChunkLoad]


def find(chunks: Chunks, loads: Sequence[ChunkLoad], layered: bool, deadline: float) -> Found:
    """Look for the chunks of a claim; wait for those on their way, unless they come by layers."""
    found = Found([], [], [])
    # First these: what is on its way now may be held a moment later, and never the other way.
    arrivals = [chunks.arrival(load.slot) for load in loads]
    if not layered:
        for arrival in arrivals:
            if arrival is not None:
                arrival.wait(None, deadline)
    held = chunks.memory.runs([load.slot for load in loads])
    for load, arrival, runs in zip(loads, arrivals, held, strict=True):
        if runs is not None and _tokens(runs) == load.T:
            found.held.append((load, runs))
        elif arrival is not None and layered:
            found.arriving.append((load, arrival))
        else:
            found.missing.append(load)
    return found


@dataclass(frozen=True, eq=False)
class _Part:
    """Layers that share block tables, in runs; slots and runs as `scatter_runs` has them."""

    layers: list[tuple[int, int]]
    slots: torch.Tensor
    runs: torch.Tensor
    rows: int


class Placement:
    """Where rows of chunks lie in host memory and where they go: found once, for all layers.

    All of it is arrays over runs and rows, and goes to the device in one piece: a claim may be
    thousands of chunks. Rows for which the request has no page in a layer are left where they are.

    Args:
        held: chunks, and the runs of each.
        memory: that they lie in.

    Attributes:
        parts: by KV cache group. buffer, pages, cos, sin, by_layer, interleaved: as `scatter_runs`
            takes them.
    """

    def __init__(
        self, held: Sequence[tuple[ChunkLoad, list[Run]]], memory: HostMemory, target: Target
    ) -> None:
        self.buffer, self.pages = memory.flat, target.pages
        self._counts, L = memory.counts, memory.layout.L
        self._row_bytes = memory.layout.bytes_per_token // L
        self.parts: list[_Part] = []
        fields = [(load.start, load.end, load.at, load.delta) for load, _ in held]
        of_chunks = np.array(fields, np.int64).T
        deltas = np.unique(of_chunks[3])
        for group, blocks in enumerate(target.blocks):
            # A window leaves blocks behind, in front of those that it has.
            first = int(np.argmax(blocks > 0)) * target.pages.P
            runs, rows = _laid_out(of_chunks, deltas, held, memory.layout.sides * L, first)
            slots = flat_slots(rows, blocks, target.pages.P)
            index = torch.from_numpy(np.concatenate([runs.ravel(), slots]))
            index = index.to(target.pages.device)
            layers = target.groups.runs(group) if target.groups else [(0, L)]
            there = index[: runs.size].view(runs.shape)
            n = int((slots >= 0).sum())
            self.parts.append(_Part(layers, index[runs.size :], there, n))
        self.cos = self.sin = self.by_layer = None
        self.interleaved = isinstance(target.rope, Rotations) and target.rope.interleaved
        if deltas.any():
            assert isinstance(target.rope, Rotations)
            angles = torch.from_numpy(np.stack(target.rope.angles(deltas)))
            self.cos, self.sin = angles.to(target.pages.device).flatten(1, 2)  # by rotation, delta
            if any(target.rope.of):
                of = np.array(target.rope.of, np.int64)
                before = np.where(of < 0, -1, of * len(deltas))
                self.by_layer = torch.from_numpy(before).to(target.pages.device)

    def put(self, layers: tuple[int, int] | None = None) -> int:
        """Rows of these layers, or of all, into the pages; bytes of them. The time is counted."""
        started = time.perf_counter()
        nbytes = self.launch(layers)
        self._counts["load_us"] += round(1e6 * (time.perf_counter() - started))
        return nbytes

    def launch(self, layers: tuple[int, int] | None = None) -> int:
        """As `put`, without counting time."""
        low, high = layers or (0, self.pages.L)
        rows = 0
        for part in self.parts:
            for first, behind in part.layers:
                some = max(low, first), min(high, behind)
                if some[0] < some[1] and part.rows:
                    self._launch(part, some)
                    rows += part.rows * (some[1] - some[0])
        return rows * self._row_bytes

    def _launch(self, part: _Part, layers: tuple[int, int]) -> None:
        scatter_runs(
            self.buffer,
            self.pages,
            part.slots,
            part.runs,
            self.cos,
            self.sin,
            by_layer=self.by_layer,
            interleaved=self.interleaved,
            layers=layers,
        )


def _laid_out(
    of_chunks: np.ndarray,
    deltas: np.ndarray,
    held: Sequence[tuple[ChunkLoad, list[Run]]],
    arrays: int,
    first_row: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs `[n, 5]` as `scatter_runs` takes them, and rows `[M]` of the request.

    Of a chunk only what is wanted of it, from `first_row` of the request on.

    Args:
        of_chunks: start, end, at and delta of each. deltas: those that there are, ascending.
        arrays: rows of the buffer that a token has: K and V of each layer.
    """
    start, end, at, delta = of_chunks
    turn = np.searchsorted(deltas, delta)
    turn[delta == 0] = -1
    counts = np.array([len(runs) for _, runs in held])
    of = np.repeat(np.arange(len(held)), counts)  # the chunk of each run
    first, behind = np.array([run for _, runs in held for run in runs], np.int64).T
    T = behind - first
    before = np.cumsum(T) - T
    # The request's position of a run's first token: behind its chunk's other runs.
    place = at[of] + before - before[np.cumsum(counts) - counts][of]
    low = np.maximum(place, np.maximum(start, first_row)[of])
    n = np.maximum(np.minimum(place + T, end[of]) - low, 0)
    done = np.cumsum(n) - n
    rows = np.repeat(low - done, n) + np.arange(n.sum())
    base = arrays * first + low - place
    return np.stack([done, n, base, T, turn[of]], axis=1)[n > 0], rows


def _tokens(runs: list[Run]) -> int:
    return sum(end - start for start, end in runs)


class LayeredLoad:
    """Chunks on their way, each layer of which is put in place when it is first needed.

    Args:
        arriving: what comes.
        memory: where it comes to.
        target: where it goes.
        deadline: `time.monotonic()` at which what has not arrived is lost.
    """

    def __init__(
        self,
        arriving: Sequence[tuple[ChunkLoad, Arrival]],
        memory: HostMemory,
        target: Target,
        deadline: float,
    ) -> None:
        self._arriving = arriving
        self._memory = memory
        self._target = target
        self._deadline = deadline
        self._placement: Placement | None = None
        self._done = 0
        self.nbytes = 0  # put in place so far

    def until(self, layer: int) -> None:
        """Return when layers 0 to `layer` are in place; LostError if one will not come."""
        while self._done <= layer:
            for load, arrival in self._arriving:
                there = arrival.layers > self._done
                if not there and not arrival.wait(self._done + 1, self._deadline):
                    raise LostError(load)
            if self._placement is None:
                self._placement = self._placed()
            # All that has come meanwhile at once: a launch a layer is dearer than one for many.
            end = min(arrival.layers for _, arrival in self._arriving)
            self.nbytes += self._placement.put((self._done, end))
            self._done = end

    def all(self) -> None:
        """Return when everything is in place."""
        self.until(self._target.pages.L - 1)

    def _placed(self) -> Placement:
        """Where all of it goes: known once a layer of each has come, since each has room then."""
        slots = [load.slot for load, _ in self._arriving]
        held = []
        for (load, _), runs in zip(
            self._arriving, self._memory.runs(slots, unpublished=True), strict=True
        ):
            if runs is None or _tokens(runs) != load.T:
                raise LostError(load)
            held.append((load, runs))
        return Placement(held, self._memory, self._target)


def warm_up(target: Target, memory: HostMemory) -> None:
    """Launch what loads and saves launch, over one block of `target`, which stays as it is.

    Kernels are compiled when they are first launched: better at start than within a request.
    """
    pages, P = target.pages, target.pages.P
    slots = flat_slots(np.arange(P), target.blocks[0], P)
    page = torch.from_numpy(slots).to(pages.device)
    out = torch.empty(pages.shape(P), dtype=pages.dtype, device=pages.device)
    scatter(gather(pages, page, out), pages, page)
    if memory.capacity >= P * memory.layout.bytes_per_token:
        for delta in (0, 1) if isinstance(target.rope, Rotations) else (0,):
            placement = Placement([(ChunkLoad(0, 0, P, 0, P, delta), [(0, P)])], memory, target)
            for part in placement.parts:
                part.slots.fill_(-1)  # no row of it is wanted
            placement.launch()


def on_any_rank(slots: list[int], failed: bool) -> tuple[set[int], bool]:
    """Slots that any tensor-parallel rank named, and whether any failed: all compute the same."""
    group = get_tp_group()
    if group.world_size == 1:
        return set(slots), failed
    said: list[tuple[list[int], bool]] = [([], False)] * group.world_size
    torch.distributed.all_gather_object(said, (slots, failed), group=group.cpu_group)
    return {slot for named, _ in said for slot in named}, any(f for _, f in said)
