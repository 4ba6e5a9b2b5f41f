"""What a worker's checks at start tell apart: keys that turn otherwise, and rounding."""

from __future__ import annotations

import math

import pytest
import torch

# Qwen 2.5 Coder 0.5B in float32, layer by layer: what vLLM's own keys differ by, 100 positions on.
QWEN = [
    4.6e-07, 5.3e-07, 1.7e-06, 6.3e-05, 2.0e-04, 5.4e-04, 4.8e-04, 9.9e-04, 3.2e-05, 7.8e-04,
    7.5e-04, 7.8e-04, 9.0e-04, 1.3e-03, 1.9e-03, 1.5e-03, 2.2e-03, 1.6e-03, 1.8e-03, 1.1e-03,
    1.6e-03, 2.0e-03, 2.4e-03, 1.4e-03,
]  # fmt: skip
SMOLLM2 = [1.5e-06] * 30


@pytest.mark.parametrize("errors", [QWEN, SMOLLM2])
def test_rounding_is_no_other_rotation(errors: list[float]) -> None:
    from lmc.connectors.vllm.checks import unlike

    assert unlike(errors, torch.float32) is None


@pytest.mark.parametrize("errors", [QWEN, SMOLLM2])
@pytest.mark.parametrize("wrong", [0.3, 0.051, math.nan, math.inf])
@pytest.mark.parametrize("layer", [0, 3, 17])
def test_a_layer_that_turns_otherwise_is_found_out(
    errors: list[float], wrong: float, layer: int
) -> None:
    from lmc.connectors.vllm.checks import unlike

    found = unlike([*errors[:layer], wrong, *errors[layer + 1 :]], torch.float32)
    assert found is not None and found[0] == layer


def test_what_comes_out_of_nothing_is_no_rounding() -> None:
    from lmc.connectors.vllm.checks import unlike

    assert unlike([1e-6, 1e-6, 2e-3, 2e-3], torch.float32) == (
        2,
        2e-3,
        pytest.approx(1.38e-3, 0.01),
    )
