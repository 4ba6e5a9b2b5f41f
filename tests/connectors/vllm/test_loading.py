"""Chunks put in place layer by layer, in pages of an engine that is not there."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lmc.connectors.vllm.loading import LayeredLoad, LostError, Placement
from lmc.connectors.vllm.messages import ChunkLoad
from lmc.kernels.paged import PagedKV
from lmc.store import Record
from lmc.store.chunks import Arrival

L, T, P, G, D = 4, 6, 4, 1, 8


def pages() -> PagedKV:
    """Three pages a layer, poisoned."""
    made = [tuple(torch.full((3, P, G, D), torch.nan) for _ in range(L)) for _ in range(2)]
    return PagedKV(k=made[0], v=made[1])


def arriving(slot: int) -> tuple[Arrival, Placement, torch.Tensor]:
    """A chunk in two parts, and where it goes: slots 2 to 7, its first token not wanted."""
    chunk = torch.randn(L, 2, T, G, D)
    arrival = Arrival(Record(slot, b"", b"k", bytes(8 * T), 0, b"", b"", "exact", 0))
    arrival.parts = [chunk[:, :, :4].contiguous(), chunk[:, :, 4:].contiguous()]
    slots = torch.tensor([-1, 3, 4, 5, 6, 7])
    load = ChunkLoad(slot, 1, T, 0, T, 0)
    return arrival, Placement(load, slots, None, None, False), chunk


def test_a_layer_is_in_place_once_it_is_asked_for_and_no_other_is_touched() -> None:
    arrival, placement, chunk = arriving(1)
    paged = pages()
    load = LayeredLoad([(arrival, placement)], paged, time.monotonic() + 10)
    threading.Timer(0.05, arrival.advance, [2]).start()
    load.until(0)
    flat = [torch.stack([paged.k[i], paged.v[i]]).flatten(1, 2) for i in range(L)]
    for i in range(2):  # both had come by then
        assert torch.equal(flat[i][:, 3:8], chunk[i, :, 1:])
        assert flat[i][:, :3].isnan().all() and flat[i][:, 8:].isnan().all()
    assert all(layer.isnan().all() for layer in flat[2:])
    arrival.advance(L)
    arrival.end(True)
    load.all()
    for i in range(L):
        both = torch.stack([paged.k[i], paged.v[i]]).flatten(1, 2)
        assert torch.equal(both[:, 3:8], chunk[i, :, 1:])


@pytest.mark.parametrize("how", ["fails", "late"])
def test_one_that_does_not_come_is_named(how: str) -> None:
    whole, broken = arriving(1), arriving(2)
    whole[0].advance(L)
    broken[0].advance(1)
    if how == "fails":
        broken[0].end(False)
    pairs = [(arrival, placement) for arrival, placement, _ in (whole, broken)]
    load = LayeredLoad(pairs, pages(), time.monotonic() + 0.1)
    load.until(0)
    with pytest.raises(LostError, match="slot 2") as lost:
        load.until(1)
    assert lost.value.load.slot == 2
