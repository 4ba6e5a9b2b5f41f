"""Metrics: what equal inputs give, small cases computed by hand, and invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmc.quality.metrics import (
    attention_error,
    compare,
    compare_answers,
    kl_divergence,
    kv_deviation,
)


def logprobs(seed: int, n: int, V: int, scale: float = 1.0) -> np.ndarray:
    logits = scale * np.random.default_rng(seed).standard_normal((n, V))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_equal_inputs() -> None:
    full = logprobs(0, 7, 40)
    q = compare(full, full.copy(), list(range(7)))
    assert (q.kl_mean, q.kl_last, q.kl_by_position) == (0, 0, [0] * 7)
    assert (q.top1_agreement, q.top5_overlap, q.first_divergence) == (1, 1, 7)
    assert (q.delta_nll, q.logprob_rmse) == (0, 0)


def test_by_hand() -> None:
    full = np.log([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]])
    arm = np.log([[0.25, 0.5, 0.25], [0.7, 0.2, 0.1]])
    q = compare(full, arm, [0, 2])
    kl = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert q.kl_by_position == pytest.approx([kl, 0])
    assert (q.kl_mean, q.kl_last) == pytest.approx((kl / 2, kl))
    assert (q.top1_agreement, q.first_divergence) == (0.5, 0)
    assert q.top5_overlap == 1  # of three ids, all are among the five most likely
    assert q.delta_nll == pytest.approx(np.log(2) / 2)
    # The logits of position 0 differ by log 2 up and down, and their means do not.
    assert q.logprob_rmse == pytest.approx(np.sqrt(2 * np.log(2) ** 2 / 6))


def test_top5_and_first_divergence_by_hand() -> None:
    likely = np.log([0.2, 0.18, 0.16, 0.14, 0.12, 0.1, 0.06, 0.04])
    swapped = likely[[0, 1, 2, 5, 6, 3, 4, 7]]  # places 3 and 4 leave the five most likely
    other_first = likely[[1, 0, 2, 3, 4, 5, 6, 7]]
    q = compare(
        np.stack([likely] * 4), np.stack([likely, swapped, other_first, other_first]), [0] * 4
    )
    assert q.top5_overlap == pytest.approx((1 + 3 / 5 + 1 + 1) / 4)
    assert q.first_divergence == 2
    assert q.top1_agreement == 0.5


def test_centred_logits_do_not_see_the_normaliser() -> None:
    logits = np.array([[3.0, 1.0, 0.0, -1.0]])
    raised = logits + np.array([[0.0, 0.0, 0.0, 2.0]])
    full, arm = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits, raised))
    # Differences 0, 0, 0, 2 about their mean 0.5: squares 0.25 three times and 2.25.
    assert compare(full, arm, [0]).logprob_rmse == pytest.approx(np.sqrt(3.0 / 4))


@given(
    seeds=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    n=st.integers(1, 6),
    V=st.integers(1, 30),
    scale=st.floats(0.01, 20),
)
def test_ranges_and_the_names_shared_with_runs(
    seeds: tuple[int, int], n: int, V: int, scale: float
) -> None:
    full, arm = (logprobs(seed, n, V, scale) for seed in seeds)
    tokens = np.random.default_rng(seeds[0]).integers(0, V, n).tolist()
    q = compare(full, arm, tokens)
    assert min(q.kl_by_position) >= 0 and len(q.kl_by_position) == n
    assert 0 <= q.top1_agreement <= 1 and 0 <= q.top5_overlap <= 1
    assert 0 <= q.first_divergence <= n
    assert (q.first_divergence == n) == (q.top1_agreement == 1)
    run = compare_answers(tokens, full, arm, tokens)
    for name in ("kl_mean", "kl_last", "top1_agreement", "delta_nll"):
        assert getattr(q, name) == pytest.approx(getattr(run, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_read_as_arrays_are(dtype: torch.dtype) -> None:
    full, arm = (torch.from_numpy(logprobs(i, 5, 9)).to(dtype).requires_grad_() for i in (1, 2))
    arrays = [x.detach().double().numpy() for x in (full, arm)]
    assert compare(full, arm, [0] * 5) == compare(*arrays, [0] * 5)


@pytest.mark.parametrize(
    ("full", "arm", "tokens", "words"),
    [
        (logprobs(0, 2, 3), logprobs(0, 2, 4), [0, 0], r"got \[2, 3\] and \[2, 4\]"),
        (logprobs(0, 2, 3)[0], logprobs(0, 2, 3)[0], [0], r"got shape \[3\], want \[n, V\]"),
        (logprobs(0, 2, 3)[:0], logprobs(0, 2, 3)[:0], [], r"got shape \[0, 3\]"),
        (logprobs(0, 2, 3), logprobs(1, 2, 3), [0], r"tokens: got shape \[1\], want \[2\]"),
        (logprobs(0, 2, 3), logprobs(1, 2, 3), [0, 3], "got ids 0 to 3, allowed: 0 to 2"),
        (logprobs(0, 2, 3), np.ones((2, 3)), [0, 0], "arm log-probabilities: got rows"),
        (np.full((2, 3), np.nan), logprobs(0, 2, 3), [0, 0], "full log-probabilities: got rows"),
    ],
)
def test_what_is_no_comparison_is_refused(
    full: np.ndarray, arm: np.ndarray, tokens: list[int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        compare(full, arm, tokens)


def test_attention_error_by_hand() -> None:
    full = np.zeros((4, 2, 2))
    full[:3] = [[3, 0], [0, 4]]  # norm 5
    arm = full.copy()
    arm[1, 0, 1] = 5
    arm[2] = 0
    assert attention_error(full, arm).tolist() == [0, 1, 1, 0]
    arm[3, 0, 0] = 1  # an error where there was nothing
    assert attention_error(torch.from_numpy(full), torch.from_numpy(arm))[3] == np.inf


def test_kv_deviation_by_hand() -> None:
    full = np.zeros((2, 2, 3, 2, 2))
    full[:, :, :, 0, 0] = 5
    arm = full.copy()
    arm[1, 0, 2] += [[3, 0], [0, 4]]  # K of layer 1, token 2, over both heads
    arm[0, 1, 1, 1, 1] = 2  # V of layer 0, token 1
    k, v = kv_deviation(full, arm)
    assert k.tolist() == [[0, 0, 0], [0, 0, 5]]
    assert v.tolist() == [[0, 2, 0], [0, 0, 0]]
    k, v = kv_deviation(torch.from_numpy(full), torch.from_numpy(arm), relative=True)
    assert k.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert v.tolist() == [[0, 0.4, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("metric", "shape", "words"),
    [
        (attention_error, (2, 3), r"want \[L, M, H\*D\]"),
        (attention_error, (2, 0, 3), "none of them 0"),
        (kv_deviation, (2, 2, 3, 4), r"want \[L, 2, T, G, D\]"),
        (kv_deviation, (2, 3, 3, 1, 4), r"got shape \[2, 3, 3, 1, 4\].* of K and V"),
    ],
)
def test_wrong_shapes_are_refused(metric: object, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metric(np.zeros(shape), np.zeros(shape))  # type: ignore[operator]


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
    quality = compare_answers([0, 1], reference, forced, [1, 1])
    kl = 0.6 * np.log(2) + 0.3 * np.log(0.5)
    assert quality.logprob_error == pytest.approx(np.log(2))
    assert quality.kl_last == pytest.approx(kl)
    assert quality.kl_mean == pytest.approx(kl / 2)
    assert quality.top1_agreement == 0.5
    assert quality.delta_nll == pytest.approx(np.log(2) / 2)
    assert quality.greedy_agreement == 0.5
