"""Rows of requests as the attention layers see them: where they stand, and in which pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lmc.blend.evidence import Need, Outline
from lmc.kernels.paged import PagedKV


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one request, among those of others.

    Attributes:
        positions: `[M]`, ascending, int64, at least one.
        at: where they are among all.
        reach: positions that the last one sees: its own and all before.
        table: int32 `[pages]`, the request's pages up to `reach` and perhaps beyond.
    """

    positions: np.ndarray
    at: slice
    reach: int
    table: torch.Tensor


@dataclass(frozen=True, eq=False)
class Place:
    """Pages of one layer: as the backend has them, and as K and V."""

    cache: torch.Tensor
    pages: PagedKV


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one or several requests, one behind the other, as every layer needs them.

    Attributes:
        parts: by request.
        where: `[M]`, the positions of all, int64, on the device.
        page_slots: `[M]`, where each row lies in the pages, flat (vLLM's slot mapping).
        tables: int32 `[requests, pages]`; behind what a request has its null block.
        how: what the way of attending made of them.
        scratch: the pages that they attend in, if these are not the layer's own.
        kept: `[M]`, where each row lies in the layer's own pages then, or -1.
    """

    parts: tuple[Part, ...]
    where: torch.Tensor
    page_slots: torch.Tensor
    tables: torch.Tensor
    how: Any
    scratch: Place | None = None
    kept: torch.Tensor | None = None


@dataclass
class Measure:
    """What is asked of one layer about a request's rows, and what it answers.

    Attributes:
        needs: what is asked. outline: of whom; needed with an importance.
        scores: by need, fp32: of a deviation `[M]`, of an importance `[T]`.
    """

    needs: Sequence[Need] = ()
    outline: Outline | None = None
    scores: dict[Need, torch.Tensor] = field(default_factory=dict)


@dataclass
class Current:
    """What the attention layers work on: set before each of them is called."""

    rows: Rows | None = None
    measures: Sequence[Measure] = ()  # by request
