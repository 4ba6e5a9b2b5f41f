"""Query rows anywhere in several requests: how attention cuts them up, and cases to test it on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lmc.kernels.cases import Layout
from lmc.kernels.paged import describe

Tile = tuple[int, int, int]

# Pairs of a tile, keys of a step, warps. A kv head's keys are read once for all pairs of a tile, so
# more pairs spare L2, until their results fill the registers, which a large D does sooner. A few
# rows, as in decoding, would leave most of them idle; 16 is the least that matrix units take.
TILES: tuple[Tile, ...] = ((16, 32, 4), (64, 32, 8), (128, 32, 8), (16, 16, 8))
# Keys below which a share of a tile's keys is not worth a partial result.
SPLIT_KEYS = 256


def choose_tile(pairs: int, D: int) -> Tile:
    if D > 256:
        return TILES[3]
    if pairs <= 16:
        return TILES[0]
    return TILES[2] if D <= 128 else TILES[1]


@dataclass(frozen=True, eq=False)
class QueryRows:
    """Query rows of several requests and their tiles: made once a selection, for all its layers.

    positions: int64 [M], ascending within each request; cu_rows: where each request's rows begin,
    and M; group: H/G; tiles: int32 [tiles, 3], the request, the first pair and the end of a run of
    pairs, pair = row * group + head of one kv head; keys: of the tile that has most.

    Tiles with most keys come first, so that none starts when all others are done.
    """

    positions: Tensor
    cu_rows: tuple[int, ...]
    group: int
    tile: Tile
    tiles: Tensor
    keys: int


def query_rows(
    positions: Tensor, cu_rows: Sequence[int], H: int, k: Tensor, *, tile: Tile | None = None
) -> QueryRows:
    """Tiles for rows at `positions`, in host memory, of H heads against pages like k [N, P, G, D].

    The rows of request i are cu_rows[i] .. cu_rows[i + 1] - 1.
    """
    cu_rows, (G, D) = tuple(cu_rows), k.shape[2:]
    if positions.ndim != 1 or positions.dtype != torch.int64 or positions.device.type != "cpu":
        raise ValueError(f"positions must be int64 [M] on cpu, got {describe(positions)}")
    if (cu_rows[:1], cu_rows[-1:]) != ((0,), (len(positions),)) or list(cu_rows) != sorted(cu_rows):
        raise ValueError(f"cu_rows must ascend from 0 to M={len(positions)}, got {cu_rows}")
    if H < 1 or H % G:
        raise ValueError(f"H must be a multiple of G={G}, got {H}")
    if tile is not None and tile not in TILES:
        raise ValueError(f"tile must be one of {TILES}, got {tile}")
    group = H // G
    most = max((end - first for first, end in pairwise(cu_rows)), default=0)
    tile = tile or choose_tile(most * group, D)
    tiles, keys = [torch.empty(0, 3, dtype=torch.int64)], [positions[:0]]
    for request, (first, end) in enumerate(pairwise(cu_rows)):
        at = positions[first:end]
        if len(at) and (at[0] < 0 or (at.diff() <= 0).any()):
            raise ValueError(f"positions of request {request} must ascend from 0 on, got {at}")
        begins = torch.arange(first * group, end * group, tile[0])
        ends = (begins + tile[0]).clamp(max=end * group)
        tiles.append(torch.stack((torch.full_like(begins, request), begins, ends), dim=1))
        keys.append(positions[(ends - 1) // group] + 1)
    cost, order = torch.cat(keys).sort(descending=True, stable=True)
    return QueryRows(
        positions=positions.to(k.device, non_blocking=True),
        cu_rows=cu_rows,
        group=group,
        tile=tile,
        tiles=torch.cat(tiles)[order].to(torch.int32).to(k.device, non_blocking=True),
        keys=int(cost[0]) if len(cost) else 0,
    )


def processors(device: torch.device) -> int:
    # The interpreter runs one program at a time.
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1


def choose_splits(programs: int, keys: int, processors: int) -> int:
    """Over keys: as many as give each processor two programs, if they are left enough keys."""
    return max(1, min(2 * processors // programs, keys // SPLIT_KEYS))


@dataclass(frozen=True)
class Prompts:
    """requests: how many tokens each has, and of how many of them, anywhere, rows are asked."""

    requests: tuple[tuple[int, int], ...]
    H: int = 4
    G: int = 2
    D: int = 64
    P: int = 16
    window: int | None = None
    softcap: float | None = None
    D_v: int | None = None  # of values that are dims of the keys, as of latents
    layout: Layout = "nhd"

    def __str__(self) -> str:
        shape = f"H{self.H}-G{self.G}-D{self.D}-P{self.P}-{self.layout}"
        requests = "+".join(f"{rows}of{T}" for T, rows in self.requests)
        limits = "".join(
            f"-{n}{x}" for n in ("window", "softcap", "D_v") if (x := getattr(self, n))
        )
        return f"{requests}-{shape}{limits}"

    @property
    def reach(self) -> int:
        return self.window or max(T for T, _ in self.requests)

    def positions(self) -> list[Tensor]:
        """Those rows of each request, ascending."""
        random = torch.Generator().manual_seed(sum(T for T, _ in self.requests))
        return [torch.randperm(T, generator=random)[:n].sort().values for T, n in self.requests]

    def keys(self) -> list[Tensor]:
        """The keys of each request that some row sees, ascending."""
        found = []
        for (T, _), at in zip(self.requests, self.positions(), strict=True):
            rows = torch.zeros(T + 1, dtype=torch.int64)  # how many see a key, as differences
            rows.index_add_(0, (at - self.reach + 1).clamp(min=0), torch.ones_like(at))
            rows.index_add_(0, at + 1, -torch.ones_like(at))
            found.append((rows.cumsum(0) > 0).nonzero().squeeze(1))
        return found
