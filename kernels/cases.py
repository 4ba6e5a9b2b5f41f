"""The inputs on which kernels are tested and timed: layouts and slot maps engines really use."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lmc.kernels.paged import PagedKV

Layout = Literal["nhd", "hnd", "joint", "packed", "cpu"]
Slots = Literal["runs", "shuffled", "holes", "none"]


@dataclass(frozen=True)
class Case:
    """One shape. R: rotated dims (None: all of D); layout, slots: see make_paged, make_slots."""

    T: int
    G: int
    D: int
    L: int = 2
    P: int = 16
    R: int | None = None
    interleaved: bool = False
    rotate: bool = True
    layout: Layout = "nhd"
    slots: Slots = "runs"

    @property
    def N(self) -> int:  # noqa: N802
        # make_slots starts at row 5; two pages more are there to stay untouched.
        return -(-(self.T + 5) // self.P) + 2

    def __str__(self) -> str:
        pairing = "interleaved" if self.interleaved else "neox"
        rotation = f"{pairing}{self.R or self.D}" if self.rotate else "copy"
        return f"T{self.T}-G{self.G}-D{self.D}-P{self.P}-{rotation}-{self.layout}-{self.slots}"


def _generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(case.T * 1009 + case.G * 31 + case.D)


def poison(shape: torch.Size, dtype: torch.dtype, device: str) -> Tensor:
    """NaN everywhere, so that what nobody wrote is told from what somebody wrote."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def make_chunk(case: Case, dtype: torch.dtype, device: str) -> Tensor:
    """A chunk [L, 2, T, G, D] of normal values."""
    shape = (case.L, 2, case.T, case.G, case.D)
    return torch.randn(shape, generator=_generator(case)).to(device, dtype)


def make_paged(case: Case, dtype: torch.dtype, device: str, *, poisoned: bool) -> PagedKV:
    """Pages of normal values, or poisoned.

    nhd, hnd: K and V apart, [N, P, G, D] or [N, G, P, D] in memory; joint: both in one tensor
    [N, 2, P, G, D]; packed: in one [N, P, G, 2D], K before V, as vLLM's GPU backends; cpu: vLLM's
    CPU backend, [N, G, P, 2D] where the first half of every (page, head) holds K as [D, P] and the
    second V as [P, D].
    """
    N, P, G, D = case.N, case.P, case.G, case.D
    random = _generator(case)
    k, v = [], []
    for _ in range(case.L):
        kv = torch.randn((N, G, P, 2 * D), generator=random).to(device, dtype)
        if poisoned:
            kv.fill_(torch.nan)
        halves = kv.view(N, G, 2, P * D)
        match case.layout:
            case "nhd":
                pair = kv.view(2, N, P, G, D).unbind()
            case "hnd":
                pair = kv.view(2, N, G, P, D).transpose(2, 3).unbind()
            case "joint":
                pair = kv.view(N, 2, P, G, D).unbind(1)
            case "packed":
                pair = kv.view(N, P, G, 2 * D).split(D, dim=-1)
            case "cpu":
                pair = (
                    halves[:, :, 0].view(N, G, D, P).permute(0, 3, 1, 2),
                    halves[:, :, 1].view(N, G, P, D).permute(0, 2, 1, 3),
                )
        k.append(pair[0])
        v.append(pair[1])
    return PagedKV(tuple(k), tuple(v))


def make_slots(case: Case, device: str) -> Tensor:
    """int64 [T]: whole pages in any order from an unaligned start (runs), the same with every
    fifth row left out (holes), every row anywhere (shuffled), or no row at all (none)."""
    random = _generator(case)
    row = torch.arange(case.T) + 5
    page = torch.randperm(case.N, generator=random)
    slots = page[row // case.P] * case.P + row % case.P
    match case.slots:
        case "shuffled":
            slots = torch.randperm(case.N * case.P, generator=random)[: case.T]
        case "holes":
            slots[::5] = -1
        case "none":
            slots[:] = -1
    return slots.to(device)


def make_rotation(case: Case, device: str) -> dict[str, Any]:
    """Keyword arguments for a rotation by 123 positions, of fp64 angles as callers have them."""
    if not case.rotate:
        return {}
    R = case.R or case.D
    angle = 123 * 1e4 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    cos, sin = angle.cos().float().to(device), angle.sin().float().to(device)
    return {"cos": cos, "sin": sin, "interleaved": case.interleaved}
