"""What a blending strategy is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

Run = tuple[int, int]  # token positions [start, end)


def positions(runs: Sequence[Run]) -> np.ndarray:
    """The positions of ascending runs, int64."""
    if not runs:
        return np.empty(0, np.int64)
    return np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in runs])


def runs_of(rows: np.ndarray) -> list[Run]:
    """The maximal runs of ascending positions `[M]`; the inverse of `positions`."""
    if len(rows) == 0:
        return []
    breaks = np.flatnonzero(np.diff(rows) != 1)
    starts = rows[np.concatenate([[0], breaks + 1])]
    ends = rows[np.concatenate([breaks, [len(rows) - 1]])] + 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


@dataclass(frozen=True)
class Strategy:
    """Answers which rows of the moved runs are recomputed from layer 0 on.

    Cache misses, the suffix after the last reused token and the last token are computed
    whatever it says. Fields of a subclass are its config keys; `name` is its registry name.

    Class attributes:
        moves: false when chunks are used in their exact context only.
        control: true when it runs even though it saves nothing, because it exists to check
            the machinery against full prefill.
    """

    moves: ClassVar[bool] = True
    control: ClassVar[bool] = False

    @property
    def rotate(self) -> bool:
        """Whether keys are rotated to their new position; false is an ablation."""
        return True

    def rows(self, moved: Sequence[Run]) -> np.ndarray:
        """Rows to recompute.

        Args:
            moved: ascending runs `[start, end)` of moved tokens; chunks that followed each
                other when they were stored, and do again, are one run.

        Returns:
            Ascending positions, int64, each inside one of the runs.
        """
        raise NotImplementedError
