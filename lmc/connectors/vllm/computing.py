"""What of a claim is computed, and whether every rank can begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from lmc.blend.evidence import positions, without
from lmc.connectors.vllm.loading import on_any_rank
from lmc.connectors.vllm.messages import ChunkLoad, Claim

T = TypeVar("T")


class NotReadyError(Exception):
    """Rows cannot be computed on some rank, so they are on none: each of them raises it."""


def on_every_rank(make: Callable[[], T]) -> T:
    """What `make` makes, once it has on every tensor-parallel rank.

    Behind this a rank that fails alone leaves the others waiting within a layer, so that all that
    can fail on one of them belongs into `make`.

    Raises:
        NotReadyError: it failed on some rank; on all.
    """
    made, cause = None, None
    try:
        made = make()
    except Exception as error:
        cause = error
    _, failed = on_any_rank([], cause is not None)
    if failed:
        raise NotReadyError("rows cannot be computed on some rank") from cause
    assert made is not None
    return made


def with_lost(claim: Claim, lost: list[ChunkLoad]) -> tuple[Claim, np.ndarray]:
    """The claim that computes rows of lost chunks too, and those `[M]` that it did not before."""
    rows, strategy, outline = claim.rows, claim.strategy, claim.outline
    if lost:
        rows = np.union1d(rows, positions([(load.start, load.end) for load in lost]))
    anew = np.setdiff1d(rows, claim.rows)
    if lost and outline is not None:
        # As Plan.recomputing has it on the scheduler's side.
        moved, new = without(outline.moved, anew), outline.new + len(anew)
        outline = replace(outline, moved=moved, new=new)
    if outline is not None and not outline.moved:
        strategy = outline = None
    return replace(claim, rows=rows, strategy=strategy, outline=outline), anew


def at_most(claim: Claim, block_size: int) -> np.ndarray:
    """All rows `[M]` that a claim may compute: also what its strategy chooses, and what asks."""
    if claim.strategy is None:
        return claim.rows
    reach = min(len(claim.tokens), len(claim.blocks[0]) * block_size)
    return np.arange(claim.start, reach, dtype=np.int64)
