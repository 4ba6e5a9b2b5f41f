"""Bytes of chunk buffers `[L, S, T, R]`, whole or in parts along T."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmc.store.sections import Rows


def copy_rows(source: Sequence[Rows], target: Sequence[Rows]) -> None:
    """Copy a chunk in parts to one in other parts; both uint8 `[L, S, t, R]` along T.

    Raises:
        ValueError: they are not of one shape when joined.
    """
    got, want = _joined_shape(source), _joined_shape(target)
    if got is None or got != want:
        raise ValueError(f"got rows {_shapes(source)} for rows {_shapes(target)}")
    at = 0  # of the source part's rows, what is copied
    parts = iter(source)
    part = next(parts)
    for out in target:
        done = 0
        while done < out.shape[2]:
            if at == part.shape[2]:
                part, at = next(parts), 0
            n = min(part.shape[2] - at, out.shape[2] - done)
            np.copyto(out[:, :, done : done + n], part[:, :, at : at + n])
            done, at = done + n, at + n


def _joined_shape(parts: Sequence[Rows]) -> tuple[int, int, int, int] | None:
    """[L, S, T, R] of the whole; None where the parts do not fit together."""
    others = {(part.shape[0], part.shape[1], part.shape[3]) for part in parts if part.ndim == 4}
    if len(others) != 1 or any(part.ndim != 4 for part in parts):
        return None
    L, S, R = others.pop()
    return (L, S, sum(part.shape[2] for part in parts), R)


def _shapes(parts: Sequence[Rows]) -> list[tuple[int, ...]]:
    return [part.shape for part in parts]
