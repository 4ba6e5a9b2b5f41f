"""Quality against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lmc.results.quality import compare, kl_divergence


def test_kl_by_hand() -> None:
    full = np.log([[0.5, 0.5], [0.9, 0.1]])
    arm = np.log([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert kl_divergence(full, arm) == pytest.approx([expected, 0.0])


def test_kl_of_impossible_tokens() -> None:
    with np.errstate(divide="ignore"):
        full, arm = np.log([1.0, 0.0]), np.log([0.5, 0.5])
    assert kl_divergence(full, arm) == pytest.approx(np.log(2))
    assert kl_divergence(arm, full) == np.inf


def test_kl_is_summed_in_float64() -> None:
    logits = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    log_probs = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    assert kl_divergence(log_probs, log_probs + 1e-9) < 1e-8
    assert kl_divergence(log_probs, log_probs) == 0.0


def test_compare_by_hand() -> None:
    reference = np.log([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    forced = np.log([[0.3, 0.6, 0.1], [0.2, 0.7, 0.1]])
    quality = compare([0, 1], reference, forced, [1, 1])
    kl = 0.6 * np.log(2) + 0.3 * np.log(0.5)
    assert quality.logprob_error == pytest.approx(np.log(2))
    assert quality.kl_last == pytest.approx(kl)
    assert quality.kl_mean == pytest.approx(kl / 2)
    assert quality.top1_agreement == 0.5
    assert quality.delta_nll == pytest.approx(np.log(2) / 2)
    assert quality.greedy_agreement == 0.5
