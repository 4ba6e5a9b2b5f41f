"""Attention as APE weighs it, against a loop over single pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lmc.blend.ape import Ape
from lmc.blend.evidence import Outline


def _slow(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, row: int, moved: set[int], ape: Ape, scale: float
) -> np.ndarray:
    """One head of one row `[D]`: two softmaxes, and the weight of each."""
    groups: dict[bool, list[int]] = {True: [], False: []}
    for t in range(row + 1):
        groups[t in moved].append(t)
    parts, weights = [], []
    for inside, members in groups.items():
        if not members:
            continue
        temperature = ape.temperature if inside else 1.0
        logits = [float(q @ k[t]) * scale / temperature for t in members]
        lse = math.log(sum(math.exp(x) for x in logits))
        parts.append(sum(math.exp(x - lse) * v[t] for x, t in zip(logits, members, strict=True)))
        weights.append(math.exp(lse * (ape.scale * ape.temperature if inside else 1.0)))
    return sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)


@pytest.mark.parametrize(("temperature", "scale"), [(0.9, 0.9), (1.0, 0.5), (0.3, 1.0), (1.0, 1.0)])
def test_ape_against_a_slow_loop(temperature: float, scale: float) -> None:
    H, G, D, keys = 4, 2, 8, 12
    rows = np.array([1, 5, 9, 11])  # the first sees no moved token
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, t, D, generator=generator)
               for n, t in ((H, len(rows)), (G, keys), (G, keys)))  # fmt: skip
    outline = Outline(L=1, T=keys, end=9, moved=((2, 4), (6, 9)), new=7)
    mask = torch.arange(keys)[None] <= torch.from_numpy(rows)[:, None]
    ape, attention_scale = Ape(temperature, scale), D**-0.5
    got = ape.attend(outline.candidates, q, k, v, mask, attention_scale)
    assert got.shape == (1, H, len(rows), D)
    moved = {2, 3, 6, 7, 8}
    for head in range(H):
        for i, row in enumerate(rows):
            one: tuple[Any, ...] = (q[0, head, i], k[0, head // 2], v[0, head // 2])
            expected = _slow(*(x.double().numpy() for x in one), row, moved, ape, attention_scale)
            np.testing.assert_allclose(got[0, head, i], expected, atol=1e-5)


@pytest.mark.parametrize("field", ["temperature", "scale"])
def test_ape_refuses_what_divides_by_nothing(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be above 0, got 0"):
        Ape(**{field: 0})
