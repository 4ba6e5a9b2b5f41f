"""Several forwards through the layers together: each does what it does alone."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmc.blend.forward import Step, Stepped, in_lock_step, in_slices


def forward(
    layers: list[int], M: int, fails_at: int | None = None
) -> Generator[Step, Stepped, Any]:
    """Goes through these layers, each of which adds its number to the state; gives that."""
    rows, state = np.arange(M, dtype=np.int64), (torch.zeros(M, 2),)
    for index in layers:
        if index == fails_at:
            raise ArithmeticError(f"at layer {index}")
        state, _ = yield Step(index, rows, state)
    return state[0]


class Layers:
    """Layers that add their number; of each call, the layer and how many rows of whom."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.calls: list[tuple[int, dict[int, int]]] = []

    def __call__(self, steps: dict[int, Step]) -> list[Stepped]:
        return in_slices(steps, self.max_rows, self._call)

    def _call(self, steps: list[tuple[int, Step]]) -> list[Stepped]:
        assert len({step.index for _, step in steps}) == 1
        self.calls.append((steps[0][1].index, {i: len(step.rows) for i, step in steps}))
        return [((step.state[0] + step.index,), []) for _, step in steps]


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 9)),  # layers of a probe, and rows
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 30),
)
def test_each_forward_does_what_it_does_alone(
    forwards: list[tuple[int, int]], max_rows: int
) -> None:
    paths = [([*range(probe), *range(6)], M) for probe, M in forwards]
    layers = Layers(max_rows)
    together = in_lock_step([forward(*path) for path in paths], layers)  # type: ignore[misc]
    for got, (path, M) in zip(together, paths, strict=True):
        assert torch.equal(got, torch.full((M, 2), float(sum(path))))  # type: ignore[arg-type]
    assert all(sum(call.values()) <= max_rows for _, call in layers.calls)
    # Whatever probes, all go through the last layer at once.
    last = [call for index, call in layers.calls if index == 5]
    assert len(last) == -(-sum(M for _, M in forwards) // max_rows)


def test_one_that_fails_leaves_the_others() -> None:
    forwards = [forward([0, 1, 2], 3), forward([0, 1, 2], 4, fails_at=1), forward([0, 1], 2)]
    layers = Layers(100)
    first, second, third = in_lock_step(forwards, layers)  # type: ignore[arg-type]
    assert isinstance(second, ArithmeticError)
    assert [sorted(call) for _, call in layers.calls] == [[0, 1, 2], [0, 2], [0]]
    assert torch.equal(first, torch.full((3, 2), 3.0))  # type: ignore[arg-type]
    assert torch.equal(third, torch.full((2, 2), 1.0))  # type: ignore[arg-type]


def test_a_layer_that_fails_ends_them_all() -> None:
    def fails(steps: dict[int, Step]) -> list[Stepped]:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        in_lock_step([forward([0], 1), forward([0], 2)], fails)  # type: ignore[list-item]
