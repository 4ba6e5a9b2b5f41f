"""Strategies that need more than a paged engine offers, and how they plug in.

The Hugging Face connector calls a `Dense` strategy at three places: when the request is planned,
when the chunks lie in their pages, and when a row attends. One that changes none of them is no
dense strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from lmc.blend.plan import Plan
from lmc.blend.strategy import Strategy
from lmc.store.lookup import Found
from lmc.store.record import Record

if TYPE_CHECKING:
    import torch

# Attention of query [1, H, M, D] to keys and values [1, G, T, D] under mask [M, T], with a scale.
Attention = Callable[
    ["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor", float], "torch.Tensor"
]


@dataclass(frozen=True)
class Attended:
    """Where the tokens of a chunk looked when its KV was computed: mean over heads and layers.

    Attributes:
        tokens: `[T]`, what each token of the chunk paid all the chunks before it.
        intra: what all of them paid each other and themselves.
        before: ChunkKeys of the chunks in front, in order; none for a chunk computed alone or
            behind the system prompt.
        inter: what all tokens paid each of those.
        lengths: tokens of each of those.
    """

    tokens: np.ndarray
    intra: float
    before: tuple[bytes, ...] = ()
    inter: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()


def alone(T: int) -> Attended:
    """A chunk of T tokens that had no other chunk in front of it."""
    return Attended(np.zeros(T, np.float32), float(T))


class Chunks(Protocol):
    """The chunks of one request's model, as far as a dense strategy looks into them."""

    def before(self, position: int) -> Sequence[bytes]:
        """ChunkKeys of the request's chunks that end at or before a position, in order."""
        ...

    def variants(self, found: Found) -> Sequence[Record]:
        """All records that may serve what was found; of equals the plan's own comes first."""
        ...

    def attended(self, record: Record) -> Attended:
        """Where the tokens of a record looked when its KV was computed."""
        ...


class Pages(Protocol):
    """K and V of one request, row t in page slot t."""

    @property
    def layers(self) -> Sequence[Any]:
        """Of each layer, its `lmc.kernels.paged.PagedKV`."""
        ...

    def rows(self, start: int, end: int) -> torch.Tensor:
        """A view `[L, 2, T, G, D]` of rows `[start, end)`."""
        ...


@dataclass(frozen=True)
class Dense(Strategy):
    """A strategy for models that keep the KV of a request in one piece.

    Class attributes:
        needs_truth: whether `loaded` is given full prefill's K and V, which is counted as the
            prefill that it costs.
    """

    dense: ClassVar[bool] = True
    needs_truth: ClassVar[bool] = False

    def replan(self, plan: Plan, chunks: Chunks) -> Plan:
        """The plan with other variants, or other rows, than the index alone would give."""
        return plan

    def loaded(self, plan: Plan, pages: Pages, truth: Pages | None) -> None:
        """Change K and V of a request whose chunks have just been put into its pages."""

    def attention(self, plan: Plan) -> Attention | None:
        """What the request's later rows attend by; None: as usual."""
        return None
